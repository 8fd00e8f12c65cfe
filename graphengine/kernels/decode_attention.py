"""How does attention of a decode step run on Hopper? One launch a layer, begun early.

`decode_attention.cu` says how. This is its host side: which shapes it takes and its buffers. A
row's result does not depend on the other rows, but for how its context is cut where they are more
than Tuning.few_rows: not one bit.

Letters: N rows, H query heads, K kv heads, D head dim, W blocks per sequence.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from graphengine.kernels.nvrtc import Kernel, kernel

# Of more rows kernels.row_attention is as fast or faster.
MAX_ROWS = 64
SOURCE = Path(__file__).with_name("decode_attention.cu")
HEADERS = tuple(Path(__file__).with_name(name) for name in ("hopper.cuh", "attention.cuh"))
ARCHITECTURE = "sm_90a"
_CAPABILITY = (9, 0)  # not measured elsewhere
_HEAD_DIMS = (64, 128)
_MAX_GROUP = 16
# As in decode_attention.cu.
_STRIP = 16
SHARE_INTS = 8


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernel cuts its work. stages: strips of 16 tokens that a warp has room for, keys and
    values counted apart. segments: of a row, over all its kv heads: parts of its context whose sums
    are kept apart, so that one row alone keeps half of the blocks busy; segments_of_many in steps
    of more than few_rows. least_tiles: of warps * 16 tokens in a segment, since the end of one
    takes 1 us. end_tiles: that the end of a row's kv head counts as, when the work is shared."""

    blocks_per_sm: int = 2
    warps: int = 4
    stages: int = 4
    segments: int = 128
    least_tiles: int = 2
    end_tiles: int = 1
    few_rows: int = 32
    segments_of_many: int = 16

    def max_segments(self, num_rows: int, num_kv_heads: int) -> int:
        """Of a row and kv head, in a step of num_rows."""
        segments = self.segments if num_rows <= self.few_rows else self.segments_of_many
        return max(1, segments // num_kv_heads)


TUNING = Tuning()  # the best of those measured


_POINTERS = (
    "q",
    "k_cache",
    "v_cache",
    "out",
    "block_tables",
    "context_lens",
    "shares",
    "partials",
    "stats",
    "prefixes",
    "arrivals",
)
_STRIDES = (
    "q_stride",
    "k_block_stride",
    "k_slot_stride",
    "v_block_stride",
    "v_slot_stride",
    "table_stride",
)


class Params(ctypes.Structure):
    """`Params` of decode_attention.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        ("scale", ctypes.c_float),
        ("num_rows", ctypes.c_int),
        ("max_segments", ctypes.c_int),
    )


class Launcher(Protocol):
    """What runs the kernel: a Hopper GPU, or, in the tests, a CPU."""

    num_blocks: int

    def plan(self, params: Params) -> None:
        """plan_shares, which starts when all before it has ended."""

    def attend(self, params: Params) -> None:
        """decode_attention, which may start before the kernel ahead of it has ended."""


class DecodeAttention:
    """Attention of steps of up to MAX_ROWS rows of one shape, on torch's current stream; it can be
    captured. A step begins with `plan`. Calls share their buffers, so they must follow each other
    on one stream. On 132 multiprocessors they take 9 MB for 8 kv heads of 4 query heads, 128 wide,
    and 15 or 30 times that for two or one of 16."""

    max_rows = MAX_ROWS

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        device: torch.device,
        tuning: Tuning = TUNING,
        launcher: Launcher | None = None,
    ) -> None:
        """Unless a launcher is given, the kernel begins to compile, or is taken from the user's
        cache. A tuning other than TUNING is slower, and right."""
        self._block_shape = (block_size, num_kv_heads, head_dim)
        self._tuning = tuning
        if launcher is None:
            num_blocks = tuning.blocks_per_sm * _num_multiprocessors(device)
            defines = defines_for(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                block_size=block_size,
                num_blocks=num_blocks,
                tuning=tuning,
            )
            launcher = HopperLauncher(defines, device)
        self._launcher = launcher

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # What blocks write out and count: see Params in decode_attention.cu.
        num_blocks, group = launcher.num_blocks, num_heads // num_kv_heads
        most = max(tuning.max_segments(rows, num_kv_heads) for rows in (1, MAX_ROWS))
        lines = (num_blocks, most + 1, group)
        self._out = buffer(MAX_ROWS, num_heads, head_dim, dtype=torch.bfloat16)
        self._shares = buffer(num_blocks + 1, SHARE_INTS, dtype=torch.int32)
        self._partials = buffer(*lines, head_dim)
        self._stats = buffer(*lines, 2)
        self._prefixes = buffer(num_blocks, dtype=torch.int32)
        self._arrivals = buffer(num_blocks, dtype=torch.int32)

        # Of the step that was planned last.
        self._step = Params()
        for name in ("shares", "partials", "stats", "prefixes", "arrivals"):
            setattr(self._step, name, getattr(self, f"_{name}").data_ptr())
        self._step.scale = head_dim**-0.5 * math.log2(math.e)

    @staticmethod
    def takes(
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        capability: tuple[int, int] | None = None,
    ) -> bool:
        """Whether a shape runs this way. capability: the device's, if it is not to be asked."""
        if capability is None:
            if device.type != "cuda":
                return False
            capability = torch.cuda.get_device_capability(device)
        group = num_heads // num_kv_heads
        return (
            capability == _CAPABILITY
            and dtype == torch.bfloat16
            and head_dim in _HEAD_DIMS
            and 1 <= group <= _MAX_GROUP
            and block_size % (TUNING.warps * _STRIP) == 0
        )

    def plan(self, block_tables: Tensor, context_lens: Tensor) -> None:
        """Cuts the step that the next calls of `decode` belong to: block_tables int32 [N, W],
        context_lens int32 [N], at least 1 each, neither of which may change before the last.

        Between it and the first of them a kernel must lie that does not start early: `decode` reads
        the plan before it waits for the kernel ahead."""
        num_rows = len(context_lens)
        assert len(block_tables) == num_rows <= MAX_ROWS
        assert block_tables.stride(1) == 1
        assert block_tables.dtype == context_lens.dtype == torch.int32
        params = self._step
        params.block_tables = block_tables.data_ptr()
        params.context_lens = context_lens.data_ptr()
        params.table_stride = block_tables.stride(0)
        params.num_rows = num_rows
        params.max_segments = self._tuning.max_segments(num_rows, self._block_shape[1])
        self._launcher.plan(params)

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """q [N, H, D] -> [N, H, D], overwritten by the next call: as `AttentionBackend.decode` has
        it, without a window, over the tables and lengths that `plan` had last.

        What the kernel ahead on the stream writes may be q and each row's newest key and value.
        Nothing that it or a kernel that it overlaps writes may be an older one's, block_tables or
        context_lens."""
        params = self._step
        num_rows, num_heads, head_dim = q.shape
        assert num_rows == params.num_rows
        assert (num_heads, head_dim) == self._out.shape[1:]
        assert k_cache.shape[1:] == v_cache.shape[1:] == self._block_shape
        assert q.dtype == k_cache.dtype == v_cache.dtype == torch.bfloat16
        for cache in (k_cache, v_cache):
            assert cache.stride()[2:] == (head_dim, 1)
            # Copied 16 bytes at a time.
            assert cache.data_ptr() % 16 == 0
            assert cache.stride(0) % 8 == cache.stride(1) % 8 == 0
        assert q.stride()[1:] == (head_dim, 1)
        assert q.stride(0) % 2 == 0  # read in pairs
        out = self._out[:num_rows]
        params.q, params.out = q.data_ptr(), out.data_ptr()
        params.k_cache, params.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
        params.q_stride = q.stride(0)
        params.k_block_stride, params.k_slot_stride = k_cache.stride()[:2]
        params.v_block_stride, params.v_slot_stride = v_cache.stride()[:2]
        self._launcher.attend(params)
        return out


class HopperLauncher:
    """Launcher on torch's current stream of a GPU."""

    def __init__(self, defines: dict[str, int], device: torch.device) -> None:
        self._device = device
        self.num_blocks = defines["GRID"]
        self._plan, self._attend = (
            kernel(
                name,
                SOURCE,
                HEADERS,
                architecture=ARCHITECTURE,
                defines=defines,
                device=device.index,
            )
            for name in ("plan_shares", "decode_attention")
        )

    def plan(self, params: Params) -> None:
        """See Launcher."""
        self._launch(self._plan, params, num_blocks=1, early=False)

    def attend(self, params: Params) -> None:
        """See Launcher."""
        self._launch(self._attend, params, num_blocks=self.num_blocks, early=True)

    def _launch(self, kernel: Kernel, params: Params, *, num_blocks: int, early: bool) -> None:
        raw = ctypes.create_string_buffer(bytes(params), ctypes.sizeof(params))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        kernel.launch(raw, num_blocks=num_blocks, stream=stream, early=early)


def defines_for(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_blocks: int,
    tuning: Tuning,
) -> dict[str, int]:
    """What SOURCE is compiled with."""
    return {
        "GRID": num_blocks,
        "HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "STAGES": tuning.stages,
        "WARPS": tuning.warps,
        "BLOCKS_PER_SM": tuning.blocks_per_sm,
        "LEAST_TILES": tuning.least_tiles,
        "END_TILES": tuning.end_tiles,
        "MAX_ROWS": MAX_ROWS,
    }


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
