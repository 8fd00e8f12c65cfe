# mypy: disable-error-code="untyped-decorator"
# (Triton is not installed where mypy runs, so its decorator has no type there.)
"""May a kernel start before the one it follows has ended? Programmatic dependent launch.

Where it may, a kernel begins with `enter_early`: it lets the kernel after it start, then waits
until all before it have ended and their writes can be seen. A kernel ends only after its own wait,
or began in the usual way when all before it had ended, so one wait covers all that came before,
whatever they were. What stands above the wait may read what no kernel of the step writes: weights,
and the step's inputs; in `gated_linear`'s second launch also what the first, which began in the
usual way, may. CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda

from graphengine.kernels.tiles import MAX_ROWS

_HOPPER = (9, 0)


def early_launch(x: Tensor, num_rows: int, *, follows_ours: bool = False) -> dict[str, bool]:
    """Launch options of a kernel that reads `x` of `num_rows` rows; its EARLY among them.

    It starts early up to the rows of which a decode step's products are all ours, and of more rows
    if the kernel before it is ours: cuBLAS does not let the next kernel in, and waiting for it in
    this way costs about 1 us more than in the usual one, as the few rows at a prefill's end do. It
    lets the next kernel in either way."""
    if _capability(x.device) < _HOPPER:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": follows_ours or num_rows <= MAX_ROWS}


def is_hopper(device: torch.device) -> bool:
    return _capability(device) == _HOPPER


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@triton.jit
def enter_early(EARLY: tl.constexpr) -> None:
    if EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()
