"""Decode steps whose results are known: rows over a paged cache of scattered blocks.

Tolerance: probabilities are rounded to bfloat16, as flash-attn rounds them, and the result is. That
is up to 2 ** -9 of a value each: 5e-3 of a tensor's norm against float32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from graphengine.attention import DecodeMetadata
from graphengine.attention.reference import ReferenceAttention

CPU = torch.device("cpu")
BLOCK_SIZE = 256
TOLERANCE = 5e-3
# Contexts that end beside the borders of what a kernel reads at a time.
BORDERS = [1, 15, 16, 17, 63, 64, 65, 127, 255, 256, 257, 640]


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def sizes(self) -> dict[str, int]:
        """As kernels are told of them."""
        return {**dataclasses.asdict(self), "block_size": BLOCK_SIZE}


SHAPES = {
    "qwen3-0.6b": Shape(16, 8, 128),
    "llama-8b": Shape(32, 8, 128),
    "d64": Shape(32, 4, 64),
    "one-each": Shape(8, 8, 128),
    "sixteen-each": Shape(32, 2, 128),
    "seven-each": Shape(28, 4, 128),
}


class Case:
    """Rows of random queries over random keys and values in scattered blocks. A row is the same in
    every case of its shape and seed; slots past its end are NaN. A context of 0 stands for a padded
    row: one token, in the null block 0."""

    def __init__(
        self, shape: Shape, contexts: list[int], device: torch.device = CPU, seed: int = 0
    ) -> None:
        self.shape = shape
        self.contexts = [max(1, n) for n in contexts]
        width = max(-(-n // BLOCK_SIZE) for n in self.contexts) + 1
        num_blocks = 1 + len(contexts) * width
        generator = torch.Generator().manual_seed(seed)
        ids = 1 + torch.randperm(num_blocks - 1, generator=generator)
        tables = ids.view(len(contexts), width)
        cache_shape = (num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        caches = torch.full((2, *cache_shape), float("nan"), dtype=torch.bfloat16)
        caches[:, 0, 0] = 1.0
        queries = []
        self.newest = []
        for row, given in enumerate(contexts):
            of_row = torch.Generator().manual_seed(1000 * seed + row)
            q = torch.randn(shape.num_heads, shape.head_dim, generator=of_row)
            queries.append(2 * q.to(torch.bfloat16))
            if given == 0:
                tables[row] = 0
                continue
            kv = torch.randn(2, given, *cache_shape[2:], generator=of_row).to(torch.bfloat16)
            for start in range(0, given, BLOCK_SIZE):
                part = kv[:, start : start + BLOCK_SIZE]
                caches[:, tables[row, start // BLOCK_SIZE], : part.shape[1]] = part
            last = given - 1
            self.newest.append((int(tables[row, last // BLOCK_SIZE]), last % BLOCK_SIZE))
        # Strided, as the view of a fused product is.
        q = torch.full((len(contexts), shape.num_heads + 3, shape.head_dim), float("nan"))
        self.q = q.to(torch.bfloat16).to(device)[:, : shape.num_heads]
        self.q.copy_(torch.stack(queries))
        self.k_cache, self.v_cache = caches.to(device)
        self.tables = tables.to(torch.int32).to(device)
        self.lens = torch.tensor(self.contexts, dtype=torch.int32, device=device)

    def spread_scores(self) -> None:
        """All scores of a head hundreds below 0 from here on, but one token's, each head's in
        another place; the fourth head has none. So the base of the powers is moved late, once, and
        in one warp alone. D is as large as H or larger, K is 1."""
        num_heads = self.shape.num_heads
        self.q.zero_()
        for head in range(num_heads):
            self.q[:, head, head] = self.shape.head_dim**0.5  # a score is a key's element
        for row, context in enumerate(self.contexts):
            noise = torch.randn(context, num_heads, generator=torch.Generator().manual_seed(row))
            scores = noise - 300
            for head in range(num_heads):
                if head != 3:
                    scores[(40 + 53 * head) % context, head] += 300
            for at in range(context):
                block = int(self.tables[row, at // BLOCK_SIZE])
                key = scores[at].to(self.k_cache)
                self.k_cache[block, at % BLOCK_SIZE, 0, :num_heads] = key

    def spoil_before(self, window: int) -> None:
        """NaN from here on in tokens that the newest does not see."""
        for row, context in enumerate(self.contexts):
            for at in range(max(0, context - window)):
                block = int(self.tables[row, at // BLOCK_SIZE])
                for cache in (self.k_cache, self.v_cache):
                    cache[block, at % BLOCK_SIZE] = float("nan")

    def hide_late(self) -> list[tuple[Tensor, Tensor]]:
        """(where, what) of queries and newest tokens, which the kernel ahead writes. NaN from here
        on."""
        late = [self.q[row] for row in range(len(self.q))]
        late += [cache[at] for cache in (self.k_cache, self.v_cache) for at in self.newest]
        writes = [(tensor, tensor.clone()) for tensor in late]
        for tensor in late:
            tensor.fill_(float("nan"))
        return writes

    def reference(self, window: int | None = None) -> Tensor:
        metadata = DecodeMetadata(
            slot_mapping=torch.zeros(0), block_tables=self.tables, context_lens=self.lens
        )
        backend = ReferenceAttention()
        k_cache, v_cache = self.k_cache.float(), self.v_cache.float()
        return backend.decode(self.q.float(), k_cache, v_cache, metadata, window=window)

    def check(self, out: Tensor, window: int | None = None) -> None:
        exact = self.reference(window)
        assert torch.isfinite(out).all()
        for row, context in enumerate(self.contexts):
            error = (out[row].float() - exact[row]).norm() / exact[row].norm()
            assert error < TOLERANCE, f"row {row} of {context} tokens: {error}"
