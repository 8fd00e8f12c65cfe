"""What does a step tell attention, and what must an attention backend offer?

Letters: N tokens, B decode rows, S sequences of a prefill, H query heads, K kv heads, D head dim,
T keys, W blocks per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeMetadata:
    """Where B rows of one token each find their context. All device tensors, which keep their
    addresses inside a captured graph.

    slot_mapping: int64 [B], slot the row's token is written to (block * block_size + offset).
    block_tables: int32 [B, W]. context_lens: int32 [B], this step's token included, at least 1.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor


@dataclass(frozen=True, slots=True)
class PrefillMetadata:
    """Where S sequences, N tokens in one ragged row, find their context.

    slot_mapping: int64 [N], or of more tokens, padded. cu_seqlens_q: int32 [S+1], borders of the
    sequences in the N tokens. cu_seqlens_k: int32 [S+1], the same with each sequence's earlier
    chunks included.
    last_rows: int64 [S], each sequence's last of the N tokens.
    block_tables: int32 [S, W]. max_seqlen_q, max_seqlen_k: the longest of each.
    has_context: some sequence has keys in the cache from an earlier chunk.
    key_slots: with context, for a backend that reads_key_slots, int64 [T]: the slot of each
    sequence's every key, as cu_seqlens_k says.
    """

    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    last_rows: Tensor
    block_tables: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    has_context: bool
    key_slots: Tensor | None = None

    def of_last_tokens(self) -> PrefillMetadata:
        """The same keys, for the last query of each sequence alone: S of them."""
        borders = torch.arange(
            len(self.last_rows) + 1, dtype=torch.int32, device=self.last_rows.device
        )
        last_rows = borders[:-1].long()
        return replace(self, cu_seqlens_q=borders, last_rows=last_rows, max_seqlen_q=1)


class PlannedDecode(Protocol):
    """Decodes steps of up to max_rows rows of one shape, without a window, and cuts the work once a
    step, for all layers."""

    max_rows: int

    def plan(self, block_tables: Tensor, context_lens: Tensor) -> None:
        """Begins a step: block_tables int32 [B, W], context_lens int32 [B], which stay as they are
        to its end. Other work of the step lies between it and the first `decode`."""

    def decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """As AttentionBackend.decode, in the step planned last; the next call overwrites the
        result."""


class AttentionBackend(Protocol):
    """Causal attention through a paged cache.

    k_cache and v_cache are [num_blocks, block_size, K, D] and hold the step's own keys and values
    already. The softmax scale is D ** -0.5. With `window` w a query sees itself and the w - 1
    tokens before it; None sees all.

    reads_key_slots: prefill reads PrefillMetadata.key_slots, so it must be made."""

    name: str
    default_block_size: int
    reads_key_slots: bool

    def check(
        self, *, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises ConfigError or BackendError if this backend cannot run with these."""

    def planned_decode(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PlannedDecode | None:
        """What decodes steps without a window faster than `decode`, with its kernel and buffers;
        None where nothing does. One model's, since its captured steps use the buffers."""

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
        """q [N, H, D] -> [N, H, D], k and v [T, K, D] where no sequence has context: T is N but
        for PrefillMetadata.of_last_tokens. May sync; never captured."""

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: DecodeMetadata,
        *,
        window: int | None,
    ) -> Tensor:
        """q [B, H, D] -> [B, H, D]. On CUDA never syncs, so that it can be captured."""
