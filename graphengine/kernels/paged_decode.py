# mypy: disable-error-code="untyped-decorator"
# (Triton is not installed where mypy runs, so its decorator has no type there.)
"""How does one query per sequence attend through the paged cache? Triton, split over the context.

flash-attn gives each program 64 query rows, of which a decode step has only the H / K heads that
share a kv head: with two of them its arithmetic, not the memory, sets the time. Here a program has
16. Splits follow from the shape alone, so that a captured graph serves every context: each takes an
equal share of the tiles of its sequence, and the one that ends last adds them up, in their order.
The online softmax is FlashAttention's (Dao et al., 2022), its splits are Flash-Decoding's (2023).

Letters: B rows, H query heads, K kv heads, D head dim, G = H / K, S splits, W blocks a sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphengine.kernels.ahead import launch
from graphengine.kernels.launch import early_launch, enter_early

# Positions that a program loads at a time, alone with its row or beside other splits of it: many
# rows hide a long wait for memory, a few cannot. And how many loads ahead.
_TILE, _SPLIT_TILE = 128, 64
_STAGES = 3
_LOG2_E = 1.4426950408889634
# tl.dot takes no fewer rows.
_MIN_DOT = 16


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    arrivals: Tensor,
    *,
    window: int | None,
    num_splits: int,
) -> Tensor:
    """q [B, H, D] -> [B, H, D]; the rest as `AttentionBackend.decode` has it.

    arrivals: int32, zeros, at least B * K if there are splits; zeros again when the launch is done.
    The block size is a multiple of 128, D a power of 2."""
    num_rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    tile = _TILE if num_splits == 1 else _SPLIT_TILE
    assert block_size % tile == 0
    assert head_dim == triton.next_power_of_2(head_dim)
    assert num_splits == 1 or arrivals.numel() >= num_rows * num_kv_heads
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    shape = (num_rows, num_kv_heads, num_splits, group)
    if num_splits > 1:
        partial_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        partial_stats = torch.empty((2, *shape), dtype=torch.float32, device=q.device)
    else:
        partial_out = partial_stats = out
    # Not while `rope_and_cache` still runs where there are many rows: no gain (perf/LOG.md).
    early = early_launch(q, num_rows)
    launch(
        _paged_decode_kernel,
        (num_kv_heads, num_splits, num_rows),
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        context_lens,
        arrivals,
        partial_out,
        partial_stats,
        head_dim**-0.5 * _LOG2_E,
        q.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        block_tables.stride(0),
        partial_stats.stride(0) if num_splits > 1 else 0,
        K=num_kv_heads,
        G=group,
        G_PADDED=max(_MIN_DOT, triton.next_power_of_2(group)),
        D=head_dim,
        BLOCK_SIZE=block_size,
        TILE=tile,
        SPLITS=num_splits,
        WINDOW=window or 0,
        num_warps=4,
        num_stages=_STAGES,
        PREFETCH=early.get("launch_pdl", False),
        **early,
    )
    return out


@triton.jit
def _paged_decode_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    partial_out_ptr: tl.tensor,
    partial_stats_ptr: tl.tensor,
    scale: tl.tensor,
    q_stride: tl.tensor,
    k_block_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    v_block_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    tables_stride: tl.tensor,
    stats_stride: tl.tensor,
    K: tl.constexpr,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    PREFETCH: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    # Inputs of the whole step: they were there before its first kernel began.
    length = tl.load(lens_ptr + row)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0)
    begin_tile = begin // TILE
    end_tile = tl.cdiv(length, TILE)
    per_split = tl.cdiv(end_tile - begin_tile, SPLITS)
    first_tile = begin_tile + split * per_split
    if first_tile >= end_tile:
        return
    last_tile = tl.minimum(first_tile + per_split, end_tile)

    group = tl.arange(0, G_PADDED)
    dims = tl.arange(0, D)
    present = (group < G)[:, None]
    heads = (head * G + group)[:, None] * D + dims[None, :]
    table_ptr = tables_ptr + row.to(tl.int64) * tables_stride
    k_ptr += head * D
    v_ptr += head * D
    if PREFETCH:
        # Only asks for the first tile: the L2 cache is where all see the same, so the newest token
        # may still be written to it.
        block = tl.load(table_ptr + first_tile * TILE // BLOCK_SIZE).to(tl.int64)
        slots = first_tile * TILE % BLOCK_SIZE + tl.arange(0, TILE)
        _prefetch(k_ptr + block * k_block_stride + slots * k_slot_stride, D * 2)
        _prefetch(v_ptr + block * v_block_stride + slots * v_slot_stride, D * 2)
    enter_early(EARLY)
    q = tl.load(q_ptr + row.to(tl.int64) * q_stride + heads, mask=present, other=0.0)
    largest = tl.full((G_PADDED,), float("-inf"), tl.float32)
    mass = tl.zeros((G_PADDED,), tl.float32)
    sums = tl.zeros((G_PADDED, D), tl.float32)
    for tile in range(first_tile, last_tile):
        block = tl.load(table_ptr + tile * TILE // BLOCK_SIZE).to(tl.int64)
        slots = tile * TILE % BLOCK_SIZE + tl.arange(0, TILE)
        positions = tile * TILE + tl.arange(0, TILE)
        inside = positions < length
        if WINDOW > 0:
            inside = inside & (positions >= begin)
        # What lies past the end was never written and may be NaN: v must not bring it in.
        k_ptrs = k_ptr + block * k_block_stride + slots[:, None] * k_slot_stride + dims[None, :]
        v_ptrs = v_ptr + block * v_block_stride + slots[:, None] * v_slot_stride + dims[None, :]
        k = tl.load(k_ptrs, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, k.trans()) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        mass = mass * shrink + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None])
        largest = new_largest

    out_ptrs = out_ptr + row.to(tl.int64) * (K * G * D) + heads
    if SPLITS == 1:
        tl.store(out_ptrs, sums / mass[:, None], mask=present)
    else:
        num_active = tl.cdiv(end_tile - begin_tile, per_split)
        if num_active == 1:
            tl.store(out_ptrs, sums / mass[:, None], mask=present)
        else:
            line = (row.to(tl.int64) * K + head) * SPLITS
            at = (line + split) * G + group
            tl.store(partial_out_ptr + at[:, None] * D + dims[None, :], sums, mask=present)
            tl.store(partial_stats_ptr + at, largest, mask=group < G)
            tl.store(partial_stats_ptr + stats_stride + at, mass, mask=group < G)
            # All threads' stores, then the count: who counts last reads what all have stored.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + row * K + head, 1, sem="acq_rel")
            if arrived == num_active - 1:
                largest = tl.full((G_PADDED,), float("-inf"), tl.float32)
                mass = tl.zeros((G_PADDED,), tl.float32)
                sums = tl.zeros((G_PADDED, D), tl.float32)
                for other in range(num_active):
                    at = (line + other) * G + group
                    other_largest = tl.load(
                        partial_stats_ptr + at,
                        mask=group < G,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    other_mass = tl.load(
                        partial_stats_ptr + stats_stride + at,
                        mask=group < G,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    other_sums = tl.load(
                        partial_out_ptr + at[:, None] * D + dims[None, :],
                        mask=present,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    new_largest = tl.maximum(largest, other_largest)
                    shrink = tl.exp2(largest - new_largest)
                    weight = tl.exp2(other_largest - new_largest)
                    mass = mass * shrink + other_mass * weight
                    sums = sums * shrink[:, None] + other_sums * weight[:, None]
                    largest = new_largest
                tl.store(out_ptrs, sums / mass[:, None], mask=present)
                tl.store(arrivals_ptr + row * K + head, 0)


@triton.jit
def _prefetch(ptrs: tl.tensor, NUM_BYTES: tl.constexpr) -> None:
    """Asks for NUM_BYTES, a multiple of 16, from each pointer on to be brought to the L2 cache.
    PTX ISA: cp.async.bulk.prefetch.L2."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [ptrs, NUM_BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
