# mypy: disable-error-code="untyped-decorator"
# (Triton is not installed where mypy runs, so its decorator has no type there.)
"""How does a Triton kernel read a product that came in parts? In their order, in float32.

Letters: S splits, N tokens, F output features.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def splits_of(x: Tensor) -> tuple[int, int]:
    """How many partial sums x holds, and how far apart: S of [S, N, F], one of [N, F]."""
    return (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)


@triton.jit
def load_sum(
    ptrs: tl.tensor, inside: tl.tensor, split_stride: tl.tensor, SPLITS: tl.constexpr
) -> tl.tensor:
    """The sum over SPLITS partial sums, in float32."""
    total = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptrs + split * split_stride, mask=inside, other=0.0).to(tl.float32)
    return total
