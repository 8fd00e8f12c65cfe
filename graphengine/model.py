"""How do token ids become logits? One dense decoder for every family, driven by ModelConfig.

Letters: N tokens, n rows, E hidden, V vocab.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphengine.attention.base import (
    AttentionBackend,
    DecodeMetadata,
    PlannedDecode,
    PrefillMetadata,
)
from graphengine.kernels import Kernels
from graphengine.kernels.exclusive import held
from graphengine.kv_cache import KVCache
from graphengine.layers import DecoderLayer, empty_parameter, rope_table
from graphengine.model_config import ModelConfig

if TYPE_CHECKING:
    from graphengine.kernels.decode_chain import DecodeChain


@dataclass(frozen=True, slots=True)
class PrefillBuffers:
    """What the pieces of a prefill of N tokens read and write in place, beside the KV cache.

    inputs: int64 [N] each: input_ids, positions, slot_mapping. residual: [N, E]. qkv:
    [N, (H+2K)*D]. attended: [N, H*D], finite from the start."""

    inputs: dict[str, Tensor]
    residual: Tensor
    qkv: Tensor
    attended: Tensor

    @classmethod
    def empty(cls, model: DecoderModel, num_tokens: int) -> PrefillBuffers:
        """For prefills of up to num_tokens: see `head`."""
        config, weight = model.config, model.embed_tokens

        def zeros(width: int) -> Tensor:
            return torch.zeros(num_tokens, width, dtype=weight.dtype, device=weight.device)

        heads = config.num_heads + 2 * config.num_kv_heads
        return cls(
            {
                name: torch.zeros(num_tokens, dtype=torch.int64, device=weight.device)
                for name in ("input_ids", "positions", "slot_mapping")
            },
            residual=zeros(config.hidden_size),
            qkv=zeros(heads * config.head_dim),
            attended=zeros(config.num_heads * config.head_dim),
        )

    def head(self, num_tokens: int) -> PrefillBuffers:
        """The same memory, of the first num_tokens."""
        return PrefillBuffers(
            {name: tensor[:num_tokens] for name, tensor in self.inputs.items()},
            residual=self.residual[:num_tokens],
            qkv=self.qkv[:num_tokens],
            attended=self.attended[:num_tokens],
        )


def layers_to_try(windows: Sequence[int | None]) -> list[int]:
    """Indices of as few layers as launch all kernels that any of them do, and need as much memory:
    the first of each window, and the last, which prefills few tokens (see `finish_prefill`)."""
    last = len(windows) - 1
    first = {window: index for index, window in reversed(list(enumerate(windows[:last])))}
    return sorted({*first.values(), last})


class DecoderModel(nn.Module):
    """Embedding, decoder layers, norm and head, allocated on `device` and unset until weights.py
    fills them. Call it under torch.inference_mode. A tied head is the embedding itself."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        attention: AttentionBackend,
        max_model_len: int,
        block_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.block_size = block_size
        self._kernels = kernels
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = empty_parameter(shape, dtype=dtype, device=device)
        # A window nobody can reach past is none: flash-attn is faster without.
        windows = [
            window if window is not None and window < max_model_len else None
            for window in config.sliding_windows
        ]
        self._planned: PlannedDecode | None = None
        if any(window is None for window in windows):
            self._planned = attention.planned_decode(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                block_size=block_size,
                dtype=dtype,
                device=device,
            )
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                window=window,
                dtype=dtype,
                device=device,
                kernels=kernels,
                attention=attention,
                planned=self._planned if window is None else None,
            )
            for window in windows
        )
        self.norm = empty_parameter((config.hidden_size,), dtype=dtype, device=device)
        self.lm_head = (
            self.embed_tokens
            if config.tie_word_embeddings
            else empty_parameter(shape, dtype=dtype, device=device)
        )
        self.cos_sin = rope_table(
            config.rope, head_dim=config.head_dim, num_positions=max_model_len, device=device
        )
        self._chain = kernels.decode_chain(
            config, cos_sin=self.cos_sin, block_size=block_size, dtype=dtype, device=device
        )

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv: KVCache,
        metadata: DecodeMetadata | PrefillMetadata,
    ) -> Tensor:
        """input_ids and positions: int64 [N] -> hidden states after the last norm, [N, E]; of a
        prefill those of each sequence's last token alone, [S, E]: see `finish_prefill`.

        Writes the tokens' keys and values to `kv` at metadata.slot_mapping. Positions must be below
        max_model_len. With DecodeMetadata it does not sync on CUDA."""
        if isinstance(metadata, DecodeMetadata):
            self.plan(metadata)
            chain, num_rows = self._chain, len(input_ids)
            if chain is not None and num_rows <= chain.max_rows:
                return self._chained(chain, input_ids, positions, kv, metadata)
        residual = F.embedding(input_ids, self.embed_tokens)
        layers: list[DecoderLayer] = list(self.layers)  # type: ignore[arg-type]
        # A model `of_few_layers` leaves some of the cache alone.
        *before, last = zip(layers, kv.k, kv.v, strict=False)
        added: Tensor | None = None
        for layer, k_cache, v_cache in before:
            added = layer(added, residual, positions, self.cos_sin, k_cache, v_cache, metadata)
        layer, k_cache, v_cache = last
        if isinstance(metadata, PrefillMetadata):
            heads = layer.begin(
                None,
                residual,
                positions,
                self.cos_sin,
                k_cache,
                v_cache,
                metadata.slot_mapping,
                decode=False,
            )
            return self.finish_prefill(heads, residual, kv, metadata)
        added = layer(added, residual, positions, self.cos_sin, k_cache, v_cache, metadata)
        return self._kernels.add_rms_norm(added, residual, self.norm, self.config.rms_norm_eps)

    def plan(self, metadata: DecodeMetadata) -> None:
        """What the attention of a decode step's layers shares: before the first of them."""
        planned = self._planned
        if planned is not None and len(metadata.context_lens) <= planned.max_rows:
            planned.plan(metadata.block_tables, metadata.context_lens)

    def finish_prefill(
        self,
        heads: tuple[Tensor, Tensor, Tensor],
        residual: Tensor,
        kv: KVCache,
        metadata: PrefillMetadata,
    ) -> Tensor:
        """A prefill from the last layer's attention on. Nothing but keys and values is wanted of
        that layer's tokens except of the last of each sequence: [S, E].

        heads: q, k, v of all N tokens, as DecoderLayer.begin gives them. residual: [N, E]."""
        layer: DecoderLayer = self.layers[-1]  # type: ignore[assignment]
        q, k, v = heads
        rows = metadata.last_rows
        attended = layer.prefill_attention(
            q[rows], k, v, kv.k[-1], kv.v[-1], metadata.of_last_tokens()
        )
        residual = residual[rows]
        layer.end(attended.flatten(1), residual, decode=False)
        return self._kernels.rms_norm(residual, self.norm, self.config.rms_norm_eps)

    def prefill_piece(self, index: int, buffers: PrefillBuffers, kv: KVCache) -> None:
        """What `forward` does of a prefill between the attentions of layer index - 1, or its start,
        and `index`. All of it depends on the number of tokens alone, and can be captured."""
        layers: list[DecoderLayer] = list(self.layers)  # type: ignore[arg-type]
        residual, inputs = buffers.residual, buffers.inputs
        if index == 0:
            torch.index_select(self.embed_tokens, 0, inputs["input_ids"], out=residual)
        else:
            layers[index - 1].end(buffers.attended, residual, decode=False)
        layers[index].begin(
            None,
            residual,
            inputs["positions"],
            self.cos_sin,
            kv.k[index],
            kv.v[index],
            inputs["slot_mapping"],
            decode=False,
            qkv=buffers.qkv,
        )

    def prefill_attention(
        self,
        index: int,
        buffers: PrefillBuffers,
        num_tokens: int,
        kv: KVCache,
        metadata: PrefillMetadata,
    ) -> None:
        """The attention of layer `index`, of the first num_tokens, between two pieces."""
        layer: DecoderLayer = self.layers[index]  # type: ignore[assignment]
        q, k, v = self.prefill_heads(buffers, num_tokens)
        attended = layer.prefill_attention(q, k, v, kv.k[index], kv.v[index], metadata)
        buffers.attended[:num_tokens].copy_(attended.flatten(1))

    def prefill_heads(
        self, buffers: PrefillBuffers, num_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the first num_tokens, after a piece."""
        config = self.config
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        heads = buffers.qkv[:num_tokens].view(num_tokens, -1, config.head_dim)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        return q, k, v

    def _chained(
        self,
        chain: DecodeChain,
        input_ids: Tensor,
        positions: Tensor,
        kv: KVCache,
        metadata: DecodeMetadata,
    ) -> Tensor:
        """`forward` with one launch between two attentions."""
        layers: list[DecoderLayer] = list(self.layers)  # type: ignore[arg-type]
        caches = kv.k[0], kv.v[0]
        q = chain.begin(input_ids, positions, self.embed_tokens, layers[0], *caches, metadata)
        for index, layer in enumerate(layers[:-1]):
            attended = layer.decode_attention(q, kv.k[index], kv.v[index], metadata)
            caches = kv.k[index + 1], kv.v[index + 1]
            following = layers[index + 1]
            q = chain.between(index, attended, positions, layer, following, *caches, metadata)
        attended = layers[-1].decode_attention(q, kv.k[-1], kv.v[-1], metadata)
        return chain.end(attended, layers[-1], self.norm)

    def of_few_layers(self) -> DecoderModel:
        """The same weights, but only the layers that `layers_to_try` gives. A prefill by it takes
        as much memory."""
        few = copy.copy(self)
        layers: list[DecoderLayer] = list(self.layers)  # type: ignore[arg-type]
        tried = [layers[index] for index in layers_to_try([layer.window for layer in layers])]
        few._modules = {**self._modules, "layers": nn.ModuleList(tried)}
        return few

    def exclusive(self) -> AbstractContextManager[None]:
        """Within it the model may decode. Raises BusyError where another of this process does,
        if blocks of the two could wait for each other: see `kernels.exclusive`."""
        if self._chain is None:
            return contextlib.nullcontext()
        return held(self.embed_tokens.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, E] -> [n, V] in the model's dtype."""
        return self._kernels.linear(hidden, self.lm_head, None, whole=True)
