# mypy: disable-error-code="untyped-decorator"
# (Triton is not installed where mypy runs, so its decorator has no type there.)
"""How does a matrix product run on a GPU? Few rows of 16 bits in Triton, all else in cuBLAS.

A decode step reads every weight once and does little with it: a product of few rows is bound by
memory bandwidth, and what it loses is that a kernel starts and drains while nothing is read. So its
programs split the input features where the output features alone give too few of them, and leave
their partial sums to the next kernel, which reads its input anyway; it starts before the kernel
that makes its input has ended (see `launch`); and SiLU happens on the sums.

Letters: N tokens, F output features, C input features, S splits of C, I intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from graphengine.kernels.launch import early_launch, enter_early
from graphengine.kernels.tiles import Tiles, linear_tiles, padded_rows, silu_tiles

_HALF = (torch.bfloat16, torch.float16)
_SILU_BLOCK = 1024


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, whole: bool = False) -> Tensor:
    """`reference.linear`."""
    tiles = linear_tiles(x.shape[0], *weight.shape, whole=whole)
    if tiles is None or x.dtype not in _HALF:
        return F.linear(x, weight, bias)
    num_rows, num_features = x.shape[0], weight.shape[0]
    if tiles.splits == 1:
        out = torch.empty((num_rows, num_features), dtype=x.dtype, device=x.device)
    else:
        shape = (tiles.splits, num_rows, num_features)
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, out, tiles, silu=False)
    return out


def linear_silu_mul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear_silu_mul`."""
    tiles = silu_tiles(x.shape[0], weight.shape[0] // 2, weight.shape[1])
    if tiles is None or x.dtype not in _HALF:
        return _silu_mul(F.linear(x, weight, bias))
    out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, tiles, silu=True)
    return out


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tiles: Tiles, *, silu: bool
) -> None:
    num_rows, depth = x.shape
    num_features = out.shape[-1]
    _linear_kernel[(num_features // tiles.block_f, tiles.splits)](
        x,
        weight,
        bias,
        out,
        num_rows,
        num_features,
        depth // tiles.splits,
        x.stride(0),
        weight.stride(0),
        BLOCK_N=padded_rows(num_rows),
        BLOCK_F=tiles.block_f,
        BLOCK_C=tiles.block_c,
        SILU=silu,
        num_warps=4,
        num_stages=tiles.num_stages,
        **early_launch(x, num_rows),
    )


def _silu_mul(gate_up: Tensor) -> Tensor:
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(num_tokens, triton.cdiv(size, _SILU_BLOCK))](
        gate_up,
        out,
        gate_up.stride(0),
        size,
        BLOCK=_SILU_BLOCK,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_features: tl.tensor,
    split_depth: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    split = tl.program_id(1)
    features = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    rows = tl.arange(0, BLOCK_N)
    columns = split * split_depth + tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + rows[:, None] * x_stride + columns[None, :]
    weight_ptrs = weight_ptr + features.to(tl.int64)[:, None] * weight_stride + columns[None, :]
    up_ptrs = weight_ptrs + num_features.to(tl.int64) * weight_stride
    inside = (rows < num_rows)[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    up_sums = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    enter_early(EARLY)
    for _ in range(0, split_depth, BLOCK_C):
        x = tl.load(x_ptrs, mask=inside, other=0.0)
        sums = tl.dot(x, tl.load(weight_ptrs).trans(), sums)
        if SILU:
            up_sums = tl.dot(x, tl.load(up_ptrs).trans(), up_sums)
            up_ptrs += BLOCK_C
        x_ptrs += BLOCK_C
        weight_ptrs += BLOCK_C

    if bias_ptr is not None:  # noqa: SIM102  # known when compiled, the other when run
        if split == 0:
            sums += tl.load(bias_ptr + features).to(tl.float32)[None, :]
            if SILU:
                up_sums += tl.load(bias_ptr + num_features + features).to(tl.float32)[None, :]
    if SILU:
        # Rounded as they are where they are stored between two kernels.
        gate = sums.to(x_ptr.dtype.element_ty).to(tl.float32)
        up = up_sums.to(x_ptr.dtype.element_ty).to(tl.float32)
        sums = gate * tl.sigmoid(gate) * up
    lines = (split * num_rows + rows).to(tl.int64)[:, None]
    tl.store(out_ptr + lines * num_features + features[None, :], sums, mask=inside)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stride: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate_ptrs = gate_up_ptr + row * stride + columns
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + size, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + columns, gate * tl.sigmoid(gate) * up, mask=inside)
