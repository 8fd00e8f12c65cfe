"""Keys and values scattered over the blocks of a paged cache, for the tests of attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphengine.attention import DecodeMetadata, PrefillMetadata
from graphengine.attention.flash4_kernels import installed
from graphengine.errors import BackendError

CPU = torch.device("cpu")
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8


class Cache:
    """Random keys and values of some sequences, scattered over blocks; the rest is NaN."""

    def __init__(
        self,
        lengths: list[int],
        *,
        block_size: int = 4,
        num_kv_heads: int = NUM_KV_HEADS,
        head_dim: int = HEAD_DIM,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.width = max(-(-n // block_size) for n in lengths) + 1  # one column nobody uses
        num_blocks = 1 + len(lengths) * self.width
        ids = 1 + torch.randperm(num_blocks - 1, generator=generator)
        self.tables = ids.view(len(lengths), self.width).to(torch.int32)
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.k_cache, self.v_cache = torch.full((2, *shape), float("nan"), dtype=dtype)
        self.k, self.v = [], []
        for table, length in zip(self.tables, lengths, strict=True):
            k, v = torch.randn(2, length, *shape[2:], generator=generator).to(dtype)
            for position in range(length):
                block = table[position // block_size]
                self.k_cache[block, position % block_size] = k[position]
                self.v_cache[block, position % block_size] = v[position]
            self.k.append(k)
            self.v.append(v)
        self.k_cache, self.v_cache = self.k_cache.to(device), self.v_cache.to(device)
        self.tables = self.tables.to(device)

    def prefill_metadata(self, q_lengths: list[int], *, has_context: bool) -> PrefillMetadata:
        k_lengths = [len(k) for k in self.k]
        block_size = self.k_cache.shape[1]
        slots = [
            int(table[position // block_size]) * block_size + position % block_size
            for table, length in zip(self.tables.cpu(), k_lengths, strict=True)
            for position in range(length)
        ]
        return PrefillMetadata(
            slot_mapping=torch.zeros(sum(q_lengths), dtype=torch.int64),  # already written
            cu_seqlens_q=borders(q_lengths).to(self.tables.device),
            cu_seqlens_k=borders(k_lengths).to(self.tables.device),
            last_rows=last_rows(q_lengths).to(self.tables.device),
            block_tables=self.tables,
            max_seqlen_q=max(q_lengths),
            max_seqlen_k=max(k_lengths),
            has_context=has_context,
            key_slots=torch.tensor(slots, device=self.tables.device) if has_context else None,
        )

    def decode_metadata(self) -> DecodeMetadata:
        lengths = torch.tensor([len(k) for k in self.k], dtype=torch.int32)
        return DecodeMetadata(
            slot_mapping=torch.zeros(len(self.k), dtype=torch.int64),  # already written
            block_tables=self.tables,
            context_lens=lengths.to(self.tables.device),
        )


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def last_rows(lengths: list[int]) -> Tensor:
    return torch.tensor(lengths).cumsum(0) - 1


def random_queries(num_rows: int, head_dim: int = HEAD_DIM) -> Tensor:
    """Strided, as the view of a fused product is."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(num_rows, NUM_HEADS + 3, head_dim, generator=generator)[:, :NUM_HEADS]


def skip_without_flash4() -> None:
    """Skips a GPU test where attention "flash4" cannot be had."""
    try:
        installed()
    except BackendError as error:
        pytest.skip(str(error))
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("flash-attn 4 is used on Hopper only")
