"""Where do keys and values live? One paged tensor for all layers, and its size in bytes.

Letters: L layers, K kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphengine.model_config import ModelConfig


class KVCache:
    """`k[layer]` and `v[layer]`: [num_blocks, block_size, K, D] in `dtype`.

    num_blocks includes block 0, the null block, which padded rows write to and read: it is zeroed
    so that they stay finite. Other slots are read only after they were written, so they start
    unset."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        # One allocation: what the allocator rounds up, it rounds up once.
        kv = torch.empty((config.num_layers, 2, *shape), dtype=dtype, device=device)
        kv[:, :, 0].zero_()
        self.num_bytes = kv.nbytes
        self.k: list[Tensor] = [layer[0] for layer in kv]
        self.v: list[Tensor] = [layer[1] for layer in kv]
