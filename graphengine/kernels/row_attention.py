"""How does attention of a decode step of many rows run on Hopper? A block for each row's kv head.

`row_attention.cu` says how. This is its host side. A row's result does not depend on the other
rows: not one bit.

A large step draws what its card may draw, so what the kernel does beside reading takes time from
the products: this does less of it than `paged_decode` (perf/LOG.md).

Letters: N rows, H query heads, D head dim.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from graphengine.kernels import decode_attention
from graphengine.kernels.nvrtc import kernel

SOURCE = Path(__file__).with_name("row_attention.cu")
HEADERS = decode_attention.HEADERS
ARCHITECTURE = "sm_90a"
# 48 KiB of keys and values for each of the four warps that a multiprocessor runs. With four query
# heads of 128 each nothing else measured was faster; with heads of 64 nothing else was tried.
_WARPS, _BLOCKS_PER_SM = 2, 2
_WARP_BYTES = 48 << 10
# As in row_attention.cu.
_STRIP = 32
_NO_WINDOW = 2**31 - 1


class Params(ctypes.Structure):
    """`Params` of row_attention.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k_cache", "v_cache", "out")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "context_lens")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_block_stride", "v_block_stride")),
        ("table_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_int),
    )


class Launcher(Protocol):
    """What runs the kernel: a Hopper GPU, or, in the tests, a CPU."""

    def launch(self, params: Params, defines: dict[str, int], num_blocks: int) -> None:
        """It starts when all before it has ended, and lets the next kernel start early."""


def takes(q: Tensor, k_cache: Tensor) -> bool:
    """Whether such a step runs this way: the shapes that `decode_attention` has."""
    return decode_attention.DecodeAttention.takes(
        num_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim=q.shape[2],
        block_size=k_cache.shape[1],
        dtype=k_cache.dtype,
        device=q.device,
    )


def row_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    window: int | None,
    launcher: Launcher | None = None,
) -> Tensor:
    """q [N, H, D] -> [N, H, D], bfloat16; the rest as `AttentionBackend.decode` has it. For what
    `takes` takes. On torch's current stream; it can be captured."""
    num_rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    assert q.dtype == k_cache.dtype == v_cache.dtype == torch.bfloat16
    assert k_cache.shape == v_cache.shape
    for cache in (k_cache, v_cache):
        assert cache.stride()[1:] == (num_kv_heads * head_dim, head_dim, 1)
        # Copied 16 bytes at a time.
        assert cache.data_ptr() % 16 == cache.stride(0) % 8 == 0
    assert q.stride()[1:] == (head_dim, 1)
    assert q.stride(0) % 2 == 0  # read in pairs
    assert block_tables.dtype == context_lens.dtype == torch.int32
    assert len(block_tables) == len(context_lens) == num_rows
    assert block_tables.stride(1) == context_lens.stride(0) == 1
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    params = Params(
        q=q.data_ptr(),
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        out=out.data_ptr(),
        block_tables=block_tables.data_ptr(),
        context_lens=context_lens.data_ptr(),
        q_stride=q.stride(0),
        k_block_stride=k_cache.stride(0),
        v_block_stride=v_cache.stride(0),
        table_stride=block_tables.stride(0),
        scale=head_dim**-0.5 * math.log2(math.e),
        window=window or _NO_WINDOW,
    )
    defines = defines_for(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size
    )
    launcher = launcher or _launcher(q.device)
    launcher.launch(params, defines, num_rows * num_kv_heads)
    return out


class HopperLauncher:
    """Launcher on torch's current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def launch(self, params: Params, defines: dict[str, int], num_blocks: int) -> None:
        """See Launcher."""
        raw = ctypes.create_string_buffer(bytes(params), ctypes.sizeof(params))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        kernel(
            "row_attention",
            SOURCE,
            HEADERS,
            architecture=ARCHITECTURE,
            defines=defines,
            device=self._device.index,
        ).launch(raw, num_blocks=num_blocks, stream=stream, early=False)


@functools.cache
def _launcher(device: torch.device) -> HopperLauncher:
    return HopperLauncher(device)


def defines_for(
    *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> dict[str, int]:
    """What SOURCE is compiled with."""
    stage_bytes = 2 * _STRIP * head_dim * 2
    return {
        "KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "WARPS": _WARPS,
        "STAGES": _WARP_BYTES // stage_bytes,
        "BLOCKS_PER_SM": _BLOCKS_PER_SM,
    }
