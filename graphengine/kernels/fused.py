# mypy: disable-error-code="untyped-decorator"
# (Triton is not installed where mypy runs, so its decorator has no type there.)
"""How do the kernels run on a GPU? Triton, one launch each; `reference` says what they compute.

Letters as in `kernels`. Every tensor's last dimension is dense; offsets that grow with N or the
number of blocks are int64: a long prefill or a large cache passes 2^31 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphengine.kernels.ahead import launch
from graphengine.kernels.decode_chain import DecodeChain
from graphengine.kernels.fused_linear import add_linear, linear, linear_silu_mul
from graphengine.kernels.fused_sampling import sample
from graphengine.kernels.launch import early_launch, enter_early
from graphengine.model_config import ModelConfig

__all__ = [
    "add_linear",
    "add_rms_norm",
    "decode_chain",
    "linear",
    "linear_silu_mul",
    "rms_norm",
    "rope_and_cache",
    "sample",
]

# One thread moves 8 elements: 16 bytes of a 16-bit dtype, the widest load there is.
_ELEMENTS_PER_WARP = 32 * 8
# Few heads a program: a decode step of few tokens has no other parallelism.
_HEADS_PER_PROGRAM = 8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_tokens, hidden_size = x.shape
    block = triton.next_power_of_2(hidden_size)
    launch(
        _rms_norm_kernel,
        (num_tokens,),
        x,
        weight,
        out,
        x.stride(0),
        hidden_size,
        eps,
        BLOCK=block,
        num_warps=_num_warps(block),
        **early_launch(x, num_tokens),
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.add_rms_norm`."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    num_tokens, hidden_size = residual.shape
    block = triton.next_power_of_2(hidden_size)
    num_splits, split_stride = _splits(x)
    launch(
        _add_rms_norm_kernel,
        (num_tokens,),
        x,
        residual,
        weight,
        out,
        x.stride(-2),
        split_stride,
        residual.stride(0),
        hidden_size,
        eps,
        SPLITS=num_splits,
        BLOCK=block,
        num_warps=_num_warps(block),
        **early_launch(x, num_tokens, follows_ours=x.dim() == 3),
    )
    return out


def rope_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.rope_and_cache`. The caches may be strided in their first two dimensions."""
    num_tokens, head_dim = qkv.shape[-2], cos_sin.shape[1]
    all_heads = num_heads + 2 * num_kv_heads
    num_splits, split_stride = _splits(qkv)
    if num_splits == 1:
        out = qkv.view(qkv.shape[-2:]) if qkv.dim() == 3 else qkv
    else:
        out = torch.empty(qkv.shape[1:], dtype=k_cache.dtype, device=qkv.device)
    half_padded = triton.next_power_of_2(head_dim // 2)
    launch(
        _rope_and_cache_kernel,
        (num_tokens, triton.cdiv(all_heads, _HEADS_PER_PROGRAM)),
        qkv,
        out,
        positions,
        cos_sin,
        k_cache,
        v_cache,
        slot_mapping,
        q_weight,
        k_weight,
        qkv.stride(-2),
        split_stride,
        out.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        eps,
        BLOCK_SIZE=k_cache.shape[1],
        H=num_heads,
        K=num_kv_heads,
        HALF=head_dim // 2,
        HALF_PADDED=half_padded,
        HEADS_PER_PROGRAM=_HEADS_PER_PROGRAM,
        SPLITS=num_splits,
        num_warps=_num_warps(_HEADS_PER_PROGRAM * half_padded),
        **early_launch(qkv, num_tokens, follows_ours=qkv.dim() == 3),
    )
    heads = out.view(num_tokens, all_heads, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    return q, k, v


def decode_chain(
    config: ModelConfig,
    *,
    cos_sin: Tensor,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecodeChain | None:
    """`reference.decode_chain`."""
    if not DecodeChain.takes(config, dtype=dtype, device=device):
        return None
    return DecodeChain(config, cos_sin=cos_sin, block_size=block_size, device=device)


def _splits(x: Tensor) -> tuple[int, int]:
    """How many partial sums x holds, and how far apart: S of [S, N, F], one of [N, F]."""
    return (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)


def _num_warps(num_elements: int) -> int:
    return min(max(num_elements // _ELEMENTS_PER_WARP, 1), 16)


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    enter_early(EARLY)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps) * weight
    tl.store(out_ptr + row * size + columns, normed, mask=inside)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    split_stride: tl.tensor,
    residual_stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    residual_ptrs = residual_ptr + row * residual_stride + columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    enter_early(EARLY)
    x = _load_sum(x_ptr + row * x_stride + columns, inside, split_stride, SPLITS)
    total = x + tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual_ptrs, total, mask=inside)
    normed = total * tl.rsqrt(tl.sum(total * total, axis=0) / size + eps) * weight
    tl.store(out_ptr + row * size + columns, normed, mask=inside)


@triton.jit
def _rope_and_cache_kernel(
    qkv_ptr: tl.tensor,
    out_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    qkv_stride: tl.tensor,
    split_stride: tl.tensor,
    out_stride: tl.tensor,
    k_block_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    v_block_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    eps: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS_PER_PROGRAM + tl.arange(0, HEADS_PER_PROGRAM)[:, None]
    dims = tl.arange(0, HALF_PADDED)[None, :]
    inside = dims < HALF
    is_q = heads < H
    is_k = (heads >= H) & (heads < H + K)
    is_v = (heads >= H + K) & (heads < H + 2 * K)

    qkv_ptrs = qkv_ptr + token * qkv_stride + heads * (2 * HALF) + dims
    present = inside & (heads < H + 2 * K)
    # Inputs of the step, and what they lead to: nothing below waits for one load after another.
    # All are loaded for each head, though the same, so that they lie as its elements do.
    slot = tl.load(slot_mapping_ptr + token)
    cos_ptrs = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF) + dims
    is_rotated = inside & (is_q | is_k)
    cos = tl.load(cos_ptrs, mask=is_rotated, other=0.0)
    sin = tl.load(cos_ptrs + HALF, mask=is_rotated, other=0.0)
    if q_weight_ptr is not None:
        q_first = tl.load(q_weight_ptr + dims, mask=inside & is_q, other=0.0).to(tl.float32)
        q_second = tl.load(q_weight_ptr + dims + HALF, mask=inside & is_q, other=0.0).to(tl.float32)
    if k_weight_ptr is not None:
        k_first = tl.load(k_weight_ptr + dims, mask=inside & is_k, other=0.0).to(tl.float32)
        k_second = tl.load(k_weight_ptr + dims + HALF, mask=inside & is_k, other=0.0).to(tl.float32)
    enter_early(EARLY)
    first = _load_sum(qkv_ptrs, present, split_stride, SPLITS)
    second = _load_sum(qkv_ptrs + HALF, present, split_stride, SPLITS)

    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    v_ptrs = v_cache_ptr + block * v_block_stride + offset * v_slot_stride
    v_ptrs += (heads - H - K) * (2 * HALF) + dims
    tl.store(v_ptrs, first, mask=inside & is_v)
    tl.store(v_ptrs + HALF, second, mask=inside & is_v)
    out_ptrs = out_ptr + token * out_stride + heads * (2 * HALF) + dims
    if SPLITS > 1:
        tl.store(out_ptrs, first, mask=inside & is_v)
        tl.store(out_ptrs + HALF, second, mask=inside & is_v)

    scale = tl.rsqrt(
        tl.sum(first * first + second * second, axis=1, keep_dims=True) / (2 * HALF) + eps
    )
    if q_weight_ptr is not None:
        first = tl.where(is_q, first * scale * q_first, first)
        second = tl.where(is_q, second * scale * q_second, second)
    if k_weight_ptr is not None:
        first = tl.where(is_k, first * scale * k_first, first)
        second = tl.where(is_k, second * scale * k_second, second)

    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    tl.store(out_ptrs, rotated_first, mask=is_rotated)
    tl.store(out_ptrs + HALF, rotated_second, mask=is_rotated)

    k_ptrs = k_cache_ptr + block * k_block_stride + offset * k_slot_stride
    k_ptrs += (heads - H) * (2 * HALF) + dims
    tl.store(k_ptrs, rotated_first, mask=inside & is_k)
    tl.store(k_ptrs + HALF, rotated_second, mask=inside & is_k)


@triton.jit
def _load_sum(
    ptrs: tl.tensor, inside: tl.tensor, split_stride: tl.tensor, SPLITS: tl.constexpr
) -> tl.tensor:
    """The sum over SPLITS partial sums, in their order, in float32."""
    total = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptrs + split * split_stride, mask=inside, other=0.0).to(tl.float32)
    return total
