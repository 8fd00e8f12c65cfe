"""What does one decoder layer compute? Eight kernels over fused weights; and the RoPE table.

Letters: N tokens, E hidden, H query heads, K kv heads, D head dim, I intermediate, P positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graphengine.attention.base import (
    AttentionBackend,
    DecodeMetadata,
    PlannedDecode,
    PrefillMetadata,
)
from graphengine.kernels import Kernels
from graphengine.model_config import ModelConfig
from graphengine.rope_config import RopeConfig


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP. Weights are unset until weights.py fills them.

    qkv_proj [(H+2K)*D, E] holds the rows of q, k and v in that order, gate_up_proj [2I, E] those of
    gate and up."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        attention: AttentionBackend,
        planned: PlannedDecode | None = None,
    ) -> None:
        super().__init__()
        self._kernels = kernels
        self._attention, self._planned = attention, planned
        self.window = window
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._eps = config.rms_norm_eps
        e, i, d = config.hidden_size, config.intermediate_size, config.head_dim
        q_rows, qkv_rows = config.num_heads * d, (config.num_heads + 2 * config.num_kv_heads) * d

        def weight(*shape: int) -> Tensor:
            return empty_parameter(shape, dtype=dtype, device=device)

        self.input_norm = weight(e)
        self.qkv_proj = weight(qkv_rows, e)
        self.qkv_bias = weight(qkv_rows) if config.qkv_bias else None
        self.q_norm = weight(d) if config.qk_norm else None
        self.k_norm = weight(d) if config.qk_norm else None
        self.o_proj = weight(e, q_rows)
        self.o_bias = weight(e) if config.o_bias else None
        self.post_norm = weight(e)
        self.gate_up_proj = weight(2 * i, e)
        self.gate_up_bias = weight(2 * i) if config.mlp_bias else None
        self.down_proj = weight(e, i)
        self.down_bias = weight(e) if config.mlp_bias else None

    def forward(
        self,
        added: Tensor | None,
        residual: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: DecodeMetadata | PrefillMetadata,
    ) -> Tensor | None:
        """What this layer's MLP adds to the residual stream, [N, E] or partial sums of it,
        [S, N, E], left for the next norm to add; None in a prefill, whose products add themselves.

        added: the same of the layer before, None in the first. residual: [N, E], gets `added`,
        attention's output and, in a prefill, the MLP's in place."""
        decode = isinstance(metadata, DecodeMetadata)
        q, k, v = self.begin(
            added,
            residual,
            positions,
            cos_sin,
            k_cache,
            v_cache,
            metadata.slot_mapping,
            decode=decode,
        )
        if isinstance(metadata, DecodeMetadata):
            attended = self.decode_attention(q, k_cache, v_cache, metadata)
        else:
            attended = self.prefill_attention(q, k, v, k_cache, v_cache, metadata)
        return self.end(attended.flatten(1), residual, decode=decode)

    def begin(
        self,
        added: Tensor | None,
        residual: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        decode: bool,
        qkv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` up to its attention: q [N, H, D], k and v [N, K, D]. qkv: [N, (H+2K)*D], where
        they are to lie."""
        kernels = self._kernels
        if added is None:
            normed = kernels.rms_norm(residual, self.input_norm, self._eps)
        else:
            normed = kernels.add_rms_norm(added, residual, self.input_norm, self._eps)
        product = kernels.linear(normed, self.qkv_proj, self.qkv_bias, decode=decode, out=qkv)
        return kernels.rope_and_cache(
            product,
            positions,
            cos_sin,
            k_cache,
            v_cache,
            slot_mapping,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            q_weight=self.q_norm,
            k_weight=self.k_norm,
            eps=self._eps,
        )

    def end(self, attended: Tensor, residual: Tensor, *, decode: bool) -> Tensor | None:
        """`forward` from attention's output on, [N, H*D]."""
        kernels = self._kernels
        if decode:
            hidden = kernels.linear(attended, self.o_proj, self.o_bias, decode=True)
            normed = kernels.add_rms_norm(hidden, residual, self.post_norm, self._eps)
        else:
            kernels.add_linear(attended, self.o_proj, self.o_bias, residual)
            normed = kernels.rms_norm(residual, self.post_norm, self._eps)
        activated = kernels.linear_silu_mul(
            normed, self.gate_up_proj, self.gate_up_bias, decode=decode
        )
        if decode:
            return kernels.linear(activated, self.down_proj, self.down_bias, decode=True)
        kernels.add_linear(activated, self.down_proj, self.down_bias, residual)
        return None

    def prefill_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: PrefillMetadata,
    ) -> Tensor:
        """See AttentionBackend.prefill."""
        return self._attention.prefill(q, k, v, k_cache, v_cache, metadata, window=self.window)

    def decode_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: DecodeMetadata
    ) -> Tensor:
        """See AttentionBackend.decode. The next layer's call may overwrite the result. Of a step
        that `planned` takes, it has the plan."""
        planned = self._planned
        if planned is not None and q.shape[0] <= planned.max_rows:
            return planned.decode(q, k_cache, v_cache)
        return self._attention.decode(q, k_cache, v_cache, metadata, window=self.window)


def empty_parameter(
    shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    """An unset weight on `device`, without gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def rope_table(
    rope: RopeConfig, *, head_dim: int, num_positions: int, device: torch.device
) -> Tensor:
    """float32 [P, D]: cosines in the first D/2 columns, sines in the others.

    Products in float32 as transformers takes them, so that late positions round alike."""
    inv_freq = _inverse_frequencies(rope, head_dim).to(device)
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = positions[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [D/2] on the CPU; transformers' modeling_rope_utils.py, expression by expression."""
    inv_freq = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.rope_type == "default":
        return inv_freq
    if rope.rope_type == "linear":
        return inv_freq / rope.factor
    # llama3: long wavelengths are stretched, short ones kept, those between interpolated.
    wavelengths = 2 * math.pi / inv_freq
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (original / wavelengths - low) / (high - low)
    scaled = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(wavelengths > original / low, inv_freq / rope.factor, scaled)
    return torch.where(wavelengths < original / high, inv_freq, scaled)
