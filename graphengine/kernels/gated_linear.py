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

from graphengine.kernels.nvrtc import TensorMap, kernel, tensor_map
from graphengine.kernels.tiles import GATED_ROWS, MULTIPROCESSORS

SOURCE = Path(__file__).with_name("gated_linear.cu")
HEADER = Path(__file__).with_name("hopper.cuh")
ARCHITECTURE = "sm_90a"
# As in gated_linear.cu.
_UNIT_C = 64
# Shared memory of a block, less what aligns it and the barriers.
_ROOM = 232448 - 1024 - 128
_INTS = ("num_rows", "intermediate", "units", "row_tiles", "pairs", "read_once")


class Params(ctypes.Structure):
    """`Params` of gated_linear.cu, field by field."""

    _fields_ = (
        ("x", TensorMap),
        ("weight", TensorMap),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in _INTS),
    )


class Launcher(Protocol):
    """What runs the kernel: a Hopper GPU, or, in the tests, a CPU."""

    num_blocks: int
    """The most that run at once, an even number."""

    def rows_map(self, x: Tensor) -> TensorMap:
        """Boxes of GATED_ROWS / 2 rows of x by 64 columns."""

    def weight_map(self, weight: Tensor, features: int) -> TensorMap:
        """Boxes of 64 columns by features / 16 times 8 rows of gate beside 8 of up."""

    def launch(self, params: Params, features: int, num_blocks: int) -> None:
        """It may start before the kernel ahead has ended."""


def gated_linear(
    x: Tensor, weight: Tensor, features: int, launcher: Launcher | None = None
) -> Tensor:
    """`reference.linear_silu_mul` of bfloat16 without bias: x [N, C], dense rows, and weight
    [2I, C] give [N, I]. features: of a tile, as `tiles.gated_features` gives them; C at least as
    deep as it asks for. On torch's current stream; it reads of the weight before the kernel ahead
    has ended."""
    launcher = launcher or _launcher(x.device)
    num_rows, intermediate = x.shape[0], weight.shape[0] // 2
    out = torch.empty((num_rows, intermediate), dtype=x.dtype, device=x.device)
    params = Params(
        x=launcher.rows_map(x),
        weight=launcher.weight_map(weight, features),
        out=out.data_ptr(),
        num_rows=num_rows,
        intermediate=intermediate,
        units=x.shape[1] // _UNIT_C,
        row_tiles=math.ceil(num_rows / GATED_ROWS),
        pairs=math.ceil(intermediate / features),
        read_once=num_rows <= GATED_ROWS,
    )
    num_blocks = min(2 * params.pairs * params.row_tiles, launcher.num_blocks)
    launcher.launch(params, features, num_blocks)
    return out


class HopperLauncher:
    """Launcher on torch's current stream of a GPU."""

    num_blocks = MULTIPROCESSORS

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._weight_maps: dict[
            tuple[int, ...], TensorMap
        ] = {}  # all of a map follows from its key

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

    def launch(self, params: Params, features: int, num_blocks: int) -> None:
        """See Launcher."""
        padded = ctypes.create_string_buffer(-(-ctypes.sizeof(params) // 64) * 64)
        ctypes.memmove(padded, ctypes.addressof(params), ctypes.sizeof(params))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        kernel(
            "gated_linear",
            SOURCE,
            (HEADER,),
            architecture=ARCHITECTURE,
            defines=defines_for(features),
            device=self._device.index,
        ).launch(padded, num_blocks=num_blocks, stream=stream, early=True)


@functools.cache
def _launcher(device: torch.device) -> HopperLauncher:
    return HopperLauncher(device)


def defines_for(features: int) -> dict[str, int]:
    """What SOURCE is compiled with."""
    stored = 128 * (features + 16)
    stages = (_ROOM - stored) // (2 * _UNIT_C * (GATED_ROWS + features))
    return {"FEATURES": features, "STAGES": stages}
