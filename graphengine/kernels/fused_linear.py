# mypy: disable-error-code="untyped-decorator"
# (Triton is not installed where mypy runs, so its decorator has no type there.)
"""How does a matrix product run on a GPU? A decode step's of few rows of 16 bits in Triton, and on
Hopper of more if the weight is small; gate and up of many rows there in `gated_linear`; all else in
cuBLAS.

A decode step reads every weight once and does little with it: a product of few rows is bound by
memory bandwidth, and what it loses is that a kernel starts and drains while nothing is read. So its
programs split the input features where the output features alone give too few of them, and leave
their partial sums to the next kernel, which reads its input anyway; it starts before the kernel
that makes its input has ended (see `launch`); and SiLU happens on the sums.

Of more rows, and a small weight, starting early is what there is to gain; the tensor cores count
too. Both operands come by TMA: with the cuts that are fast, threads that load pointers are slower
at 128 rows. It needs no allocator, but for each launch the host makes two descriptors, so only a
decode step does this, whose launches a graph saves: a prefill's are the host's each time.

Letters: N tokens, F output features, C input features, S splits of C, I intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from graphengine.kernels.ahead import launch
from graphengine.kernels.gated_linear import gated_linear
from graphengine.kernels.launch import early_launch, enter_early, is_hopper
from graphengine.kernels.tiles import Tiles, WideTiles, gated_features, linear_tiles, padded_rows
from graphengine.kernels.ways import GatedTiles, Means, Product, Way, rule

_HALF = (torch.bfloat16, torch.float16)
_SILU_BLOCK = 1024


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    whole: bool = False,
    decode: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.linear`. What comes as [S, N, F] is of a kernel of ours."""
    if out is not None:
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    way: Way = None
    if whole and x.dtype in _HALF:
        way = linear_tiles(x.shape[0], *weight.shape, whole=True)
    elif decode and not whole:
        way = rule(product_of(x, weight, silu=False), means_of(x, bias))
    return linear_by(way, x, weight, bias)


def linear_by(way: Way, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear`, in one of its `ways`. Raises ValueError for one of others."""
    if way is None:
        return F.linear(x, weight, bias)
    if isinstance(way, WideTiles):
        return _launch_wide(x, weight, bias, way, silu=False)
    if not isinstance(way, Tiles):
        raise ValueError(f"{way} is no way to run a product without SiLU")
    num_rows, num_features = x.shape[0], weight.shape[0]
    if way.splits == 1:
        out = torch.empty((num_rows, num_features), dtype=x.dtype, device=x.device)
    else:
        shape = (way.splits, num_rows, num_features)
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, out, way, silu=False)
    return out


def add_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    """`reference.add_linear`. cuBLAS adds, in float32, as it stores: a norm has half to read."""
    if bias is not None:
        residual += bias
    torch.addmm(residual, x, weight.t(), out=residual)


def linear_silu_mul(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, decode: bool = False
) -> Tensor:
    """`reference.linear_silu_mul`."""
    way: Way = None
    if decode:
        way = rule(product_of(x, weight, silu=True), means_of(x, bias))
    elif x.dtype == torch.bfloat16 and bias is None and is_hopper(x.device):
        features = gated_features(x.shape[0], weight.shape[0] // 2, weight.shape[1])
        way = None if features is None else GatedTiles(features)
    return linear_silu_mul_by(way, x, weight, bias)


def linear_silu_mul_by(way: Way, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_silu_mul`, in one of its `ways`. Raises ValueError for one of others."""
    if way is None:
        return _silu_mul(F.linear(x, weight, bias))
    if isinstance(way, WideTiles):
        return _launch_wide(x, weight, bias, way, silu=True)[0]
    if isinstance(way, GatedTiles):
        return gated_linear(x, weight, way.features)
    if way.splits != 1:
        raise ValueError(f"{way} splits what SiLU must have whole")
    out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, way, silu=True)
    return out


def product_of(x: Tensor, weight: Tensor, *, silu: bool) -> Product:
    """weight: [F, C], or with silu [2I, C]."""
    num_features, depth = weight.shape
    return Product(x.shape[0], num_features // 2 if silu else num_features, depth, silu)


def means_of(x: Tensor, bias: Tensor | None) -> Means:
    return means_on(x.device, x.dtype, has_bias=bias is not None)


def means_on(device: torch.device, dtype: torch.dtype, *, has_bias: bool) -> Means:
    is_half, on_hopper = dtype in _HALF, is_hopper(device)
    is_gated = on_hopper and dtype == torch.bfloat16 and not has_bias
    return Means(triton=is_half, tma=is_half and on_hopper, gated=is_gated)


def _launch_wide(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: WideTiles, *, silu: bool
) -> Tensor:
    """[S, N, F]."""
    num_rows, depth = x.shape
    num_features = weight.shape[0] // (2 if silu else 1)
    dtype = x.dtype if tiles.splits == 1 else torch.float32
    out = torch.empty((tiles.splits, num_rows, num_features), dtype=dtype, device=x.device)
    row_tiles = triton.cdiv(num_rows, tiles.block_n)
    launch(
        _wide_linear_kernel,
        (num_features // tiles.block_f, tiles.splits, row_tiles),
        TensorDescriptor.from_tensor(x, [tiles.block_n, tiles.block_c]),
        TensorDescriptor.from_tensor(weight, [tiles.block_f, tiles.block_c]),
        bias,
        out,
        num_rows,
        num_features,
        depth // tiles.splits,
        BLOCK_N=tiles.block_n,
        BLOCK_F=tiles.block_f,
        BLOCK_C=tiles.block_c,
        SILU=silu,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        # Mostly a norm, attention or a product of ours comes before it; where none does, this waits
        # about 1 us longer.
        **early_launch(x, num_rows, follows_ours=True),
    )
    return out


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tiles: Tiles, *, silu: bool
) -> None:
    num_rows, depth = x.shape
    num_features = out.shape[-1]
    launch(
        _linear_kernel,
        (num_features // tiles.block_f, tiles.splits),
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
    launch(
        _silu_mul_kernel,
        (num_tokens, triton.cdiv(size, _SILU_BLOCK)),
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
    _store(
        sums, up_sums, bias_ptr, out_ptr, split, rows, features, num_rows, num_features, SILU=SILU
    )


@triton.jit(do_not_specialize=["num_rows"])
def _wide_linear_kernel(
    x_desc: tl.tensor,
    weight_desc: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_features: tl.tensor,
    split_depth: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    split = tl.program_id(1)
    feature = tl.program_id(0) * BLOCK_F
    row = tl.program_id(2) * BLOCK_N
    column = split * split_depth
    sums = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    up_sums = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    enter_early(EARLY)
    for offset in range(0, split_depth, BLOCK_C):
        # Rows past the last one come as zeros.
        x = x_desc.load([row, column + offset])
        sums = tl.dot(x, weight_desc.load([feature, column + offset]).trans(), sums)
        if SILU:
            up = weight_desc.load([num_features + feature, column + offset])
            up_sums = tl.dot(x, up.trans(), up_sums)
    rows = row + tl.arange(0, BLOCK_N)
    features = feature + tl.arange(0, BLOCK_F)
    _store(
        sums, up_sums, bias_ptr, out_ptr, split, rows, features, num_rows, num_features, SILU=SILU
    )


@triton.jit
def _store(
    sums: tl.tensor,
    up_sums: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    split: tl.tensor,
    rows: tl.tensor,
    features: tl.tensor,
    num_rows: tl.tensor,
    num_features: tl.tensor,
    SILU: tl.constexpr,
) -> None:
    """Sums [N, F] of a program, with the bias, or SiLU of them times up_sums, to out [S, N, F]."""
    if bias_ptr is not None:  # noqa: SIM102  # known when compiled, the other when run
        if split == 0:
            sums += tl.load(bias_ptr + features).to(tl.float32)[None, :]
            if SILU:
                up_sums += tl.load(bias_ptr + num_features + features).to(tl.float32)[None, :]
    if SILU:
        # Rounded as they are where they are stored between two kernels.
        gate = sums.to(out_ptr.dtype.element_ty).to(tl.float32)
        up = up_sums.to(out_ptr.dtype.element_ty).to(tl.float32)
        sums = gate * tl.sigmoid(gate) * up
    lines = (split * num_rows + rows).to(tl.int64)[:, None]
    out_ptrs = out_ptr + lines * num_features + features[None, :]
    tl.store(out_ptrs, sums, mask=(rows < num_rows)[:, None])


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
