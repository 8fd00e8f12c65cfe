"""How do many rows go through gate and up of a large model on Hopper? In whole waves, SiLU with it.

`gated_linear.cu` says how. This is its host side: how the copy engine is told where weights and
inputs lie.

Letters: N rows, C input features, I intermediate.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from graphengine.kernels.nvrtc import Kernel, TensorMap, kernel, tensor_map
from graphengine.kernels.tiles import GATED_ROWS, MULTIPROCESSORS, quad_share

SOURCE = Path(__file__).with_name("gated_linear.cu")
HEADER = Path(__file__).with_name("hopper.cuh")
ARCHITECTURE = "sm_90a"
# As in gated_linear.cu.
_UNIT_C = 64
# Shared memory of a block, less what aligns it and the barriers.
_ROOM = 232448 - 1024 - 128
_TILING = ("num_rows", "intermediate", "units", "row_steps", "row_step", "pairs")
_SHARE = ("first", "last", "read_once", "is_beside")


class Params(ctypes.Structure):
    """`Params` of gated_linear.cu, field by field."""

    _fields_ = (
        ("x", TensorMap),
        ("weight", TensorMap),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in (*_TILING, *_SHARE)),
    )


class Launcher(Protocol):
    """What runs the kernel: a Hopper GPU, or, in the tests, a CPU."""

    num_blocks: int
    """The most that run at once, an even number."""

    def num_quads(self, features: int) -> int:
        """Clusters of four blocks that run at once, of the same num_blocks."""

    def rows_map(self, x: Tensor) -> TensorMap:
        """Boxes of GATED_ROWS / 2 rows of x by 64 columns."""

    def weight_map(self, weight: Tensor, features: int) -> TensorMap:
        """Boxes of 64 columns by features / 16 times 8 rows of gate beside 8 of up."""

    def launch(
        self, params: Params, features: int, num_blocks: int, *, cluster_rows: int, early: bool
    ) -> None:
        """cluster_rows: 2 in clusters of four blocks, 1 of two. early: it may start before the
        kernel ahead has ended."""


def gated_linear(
    x: Tensor, weight: Tensor, features: int, launcher: Launcher | None = None
) -> Tensor:
    """`reference.linear_silu_mul` of bfloat16 without bias: x [N, C], dense rows, and weight
    [2I, C] give [N, I]. features: of a tile, as `tiles.gated_features` gives them; C at least as
    deep as it asks for. On torch's current stream; it reads of the weight before the kernel ahead
    has ended. One launch, or two that run beside each other and end together."""
    launcher = launcher or _launcher(x.device)
    num_rows, intermediate = x.shape[0], weight.shape[0] // 2
    row_tiles, pairs = math.ceil(num_rows / GATED_ROWS), math.ceil(intermediate / features)
    num_blocks = launcher.num_blocks
    of_quads = quad_share(
        row_tiles, pairs, num_blocks=num_blocks, num_quads=lambda: launcher.num_quads(features)
    )
    row_step = 2 if of_quads else 1
    out = torch.empty((num_rows, intermediate), dtype=x.dtype, device=x.device)
    params = Params(
        x=launcher.rows_map(x),
        out=out.data_ptr(),
        num_rows=num_rows,
        intermediate=intermediate,
        units=x.shape[1] // _UNIT_C,
        row_steps=row_tiles // row_step,
        row_step=row_step,
        pairs=pairs,
        read_once=num_rows <= GATED_ROWS,
    )
    if of_quads:
        quad_blocks = 4 * launcher.num_quads(features)
        params.last = of_quads
        params.weight = launcher.weight_map(weight, features // 2)
        # Not early: the launch beside it reads x, and writes out, without waiting. It may, as it
        # starts only after this one, and this one after all that comes before.
        launcher.launch(params, features, quad_blocks, cluster_rows=2, early=False)
        params.first = 2 * of_quads
        params.is_beside = True
        num_blocks -= quad_blocks
    params.last = row_tiles * pairs
    if params.first < params.last:
        params.weight = launcher.weight_map(weight, features)
        num_blocks = min(2 * (params.last - params.first), num_blocks)
        launcher.launch(params, features, num_blocks, cluster_rows=1, early=True)
    return out


class HopperLauncher:
    """Launcher on torch's current stream of a GPU."""

    num_blocks = MULTIPROCESSORS

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._weight_maps: dict[
            tuple[int, ...], TensorMap
        ] = {}  # all of a map follows from its key

    def num_quads(self, features: int) -> int:
        """See Launcher."""
        return self._kernel(features, 2).max_clusters(4)

    def rows_map(self, x: Tensor) -> TensorMap:
        """See Launcher."""
        return tensor_map(x, x.shape[::-1], (x.stride(0),), (_UNIT_C, GATED_ROWS // 2))

    def weight_map(self, weight: Tensor, features: int) -> TensorMap:
        """See Launcher."""
        num_features, depth = weight.shape
        stride, half = weight.stride(0), num_features // 2
        key = (weight.data_ptr(), num_features, depth, stride, features)
        if key not in self._weight_maps:
            sizes, strides = (depth, 8, 2, half // 8), (stride, half * stride, 8 * stride)
            box = (_UNIT_C, 8, 2, features // 16)
            self._weight_maps[key] = tensor_map(weight, sizes, strides, box)
        return self._weight_maps[key]

    def launch(
        self, params: Params, features: int, num_blocks: int, *, cluster_rows: int, early: bool
    ) -> None:
        """See Launcher."""
        padded = ctypes.create_string_buffer(-(-ctypes.sizeof(params) // 64) * 64)
        ctypes.memmove(padded, ctypes.addressof(params), ctypes.sizeof(params))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._kernel(features, cluster_rows).launch(
            padded, num_blocks=num_blocks, stream=stream, early=early
        )

    def _kernel(self, features: int, cluster_rows: int) -> Kernel:
        return kernel(
            "gated_linear",
            SOURCE,
            (HEADER,),
            architecture=ARCHITECTURE,
            defines=defines_for(features, cluster_rows),
            device=self._device.index,
        )


@functools.cache
def _launcher(device: torch.device) -> HopperLauncher:
    return HopperLauncher(device)


def defines_for(features: int, cluster_rows: int) -> dict[str, int]:
    """What SOURCE is compiled with."""
    stored = 128 * (features + 16)
    stages = (_ROOM - stored) // (2 * _UNIT_C * (GATED_ROWS + features))
    return {"FEATURES": features, "STAGES": stages, "CLUSTER_ROWS": cluster_rows}
