"""What do measurements of a prefill run on? A step's tensors, its arithmetic, and a stopwatch.

Random values on the GPU; sequences lie in blocks side by side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from graphengine.attention import PrefillMetadata

BLOCK_SIZE = 256


def attention_inputs(
    lengths: list[int],
    context: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, PrefillMetadata]:
    """A backend's prefill arguments: q, k, v views of one product, as a layer makes them."""
    torch.manual_seed(0)
    all_heads = num_heads + 2 * num_kv_heads
    qkv = torch.randn(sum(lengths), all_heads, head_dim, device="cuda", dtype=dtype)
    q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    metadata = prefill_metadata_of(lengths, context)
    shape = (2, int(metadata.block_tables.max()) + 1, BLOCK_SIZE, num_kv_heads, head_dim)
    k_cache, v_cache = torch.randn(shape, device="cuda", dtype=dtype)
    return q, k, v, k_cache, v_cache, metadata


def prefill_metadata_of(lengths: list[int], context: int) -> PrefillMetadata:
    """As the engine makes it, for sequences in blocks side by side."""
    totals = [context + n for n in lengths]
    width = -(-max(totals) // BLOCK_SIZE)
    tables = torch.arange(1, 1 + len(lengths) * width).view(len(lengths), width)
    every = [
        torch.arange(total) % BLOCK_SIZE + BLOCK_SIZE * table[torch.arange(total) // BLOCK_SIZE]
        for total, table in zip(totals, tables, strict=True)
    ]
    slots = torch.cat([slots[context:] for slots in every])
    return PrefillMetadata(
        slot_mapping=slots.cuda(),
        cu_seqlens_q=borders(lengths),
        cu_seqlens_k=borders(totals),
        last_rows=borders(lengths)[1:].long() - 1,
        block_tables=tables.to("cuda", torch.int32),
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(totals),
        has_context=context > 0,
        key_slots=torch.cat(every).cuda() if context else None,
    )


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")


def attention_flops(lengths: list[int], context: int, *, num_heads: int, head_dim: int) -> float:
    pairs = sum(n * context + n * (n + 1) / 2 for n in lengths)
    return 4.0 * num_heads * head_dim * pairs


def time_us(function: Callable[[], object], *, repeats: int = 5, budget_s: float = 0.15) -> float:
    """Median device time of a call, each repeat as many calls as fit its share of `budget_s`."""
    function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    once_s = time.perf_counter() - begin
    calls = max(1, min(200, int(budget_s / repeats / max(once_s, 1e-6))))
    samples: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(samples)
