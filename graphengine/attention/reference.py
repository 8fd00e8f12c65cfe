"""What should paged attention give? Plain torch, float32 inside: the CPU path and the oracle.

Letters: N tokens, B decode rows, S sequences, H query heads, K kv heads, G query heads a kv head,
D head dim, W blocks per sequence, T keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphengine.attention.base import DecodeMetadata, PrefillMetadata

# Queries of a prefill scored at once: bounds the score matrix to H * 256 * T floats.
_QUERY_ROWS = 256


class ReferenceAttention:
    """AttentionBackend for any device and dtype."""

    name = "reference"
    default_block_size = 16
    reads_key_slots = False

    def check(
        self, *, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Anything goes."""

    def planned_decode(self, **shape: Any) -> None:
        """Nothing is faster: this is the plain twin."""

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: PrefillMetadata,
        *,
        window: int | None,
    ) -> Tensor:
        """See AttentionBackend. Reads the borders on the host, which syncs on CUDA."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        q_borders = metadata.cu_seqlens_q.tolist()
        k_borders = metadata.cu_seqlens_k.tolist()
        for s in range(len(q_borders) - 1):
            start, end = q_borders[s], q_borders[s + 1]
            num_keys = k_borders[s + 1] - k_borders[s]
            if metadata.has_context:
                table = metadata.block_tables[s : s + 1]
                keys = _gather(k_cache, table)[:, :num_keys]
                values = _gather(v_cache, table)[:, :num_keys]
            else:
                keys, values = (x[None, k_borders[s] : k_borders[s + 1]] for x in (k, v))
            key_positions = torch.arange(num_keys, device=q.device)
            for first in range(start, end, _QUERY_ROWS):
                last = min(first + _QUERY_ROWS, end)
                # The sequence's last query sits at its last key.
                positions = torch.arange(first, last, device=q.device) + (num_keys - end)
                visible = _visible(key_positions, positions[:, None], window)  # [n, T]
                out[first:last] = _attend(q[None, first:last], keys, values, visible[None])[0]
        return out

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: DecodeMetadata,
        *,
        window: int | None,
    ) -> Tensor:
        """See AttentionBackend. On CUDA it reads the whole table's width, to stay capturable."""
        tables = metadata.block_tables
        if not q.is_cuda:
            block_size = k_cache.shape[1]
            tables = tables[:, : -(-int(metadata.context_lens.max()) // block_size)]
        keys, values = _gather(k_cache, tables), _gather(v_cache, tables)  # [B, T, K, D]
        key_positions = torch.arange(keys.shape[1], device=q.device)
        visible = _visible(key_positions, metadata.context_lens[:, None] - 1, window)  # [B, T]
        return _attend(q[:, None], keys, values, visible[:, None])[:, 0]


def _gather(cache: Tensor, tables: Tensor) -> Tensor:
    """cache [num_blocks, block_size, K, D], tables int32 [R, W] -> [R, W * block_size, K, D]."""
    return cache[tables.long()].flatten(1, 2)


def _visible(key_positions: Tensor, query_positions: Tensor, window: int | None) -> Tensor:
    """bool [rows, T]: which keys each query sees."""
    visible = key_positions <= query_positions
    if window is not None:
        visible &= key_positions > query_positions - window
    return visible


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [R, n, H, D], k and v [R, T, K, D], visible bool [R, n, T] -> [R, n, H, D] in q's dtype.

    Keys no query of a row sees may be anything, NaN included: they lie in slots never written.
    """
    num_kv_heads, head_dim = k.shape[2:]
    heads = q.float().reshape(*q.shape[:2], num_kv_heads, -1, head_dim)  # [R, n, K, G, D]
    scores = torch.einsum("rnkgd,rtkd->rkgnt", heads, k.float()) * head_dim**-0.5
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    seen = visible.any(dim=1)[:, :, None, None]  # [R, T, 1, 1]; 0 * NaN would be NaN
    values = v.float().masked_fill(~seen, 0.0)
    out = torch.einsum("rkgnt,rtkd->rnkgd", scores.softmax(dim=-1), values)
    return out.flatten(2, 3).to(q.dtype)
