"""Random weights, caches and inputs of a decode step, and what it should give, in float32."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphengine.attention.base import DecodeMetadata
from graphengine.attention.reference import ReferenceAttention
from graphengine.kernels import reference
from graphengine.kernels.decode_chain import MAX_ROWS, DecodeChain
from graphengine.layers import rope_table
from graphengine.model_config import ModelConfig, RopeConfig

EPS = 1e-5


def config(**changes: object) -> ModelConfig:
    """Of the shape of Qwen3-0.6B, with fewer layers."""
    fields: dict[str, object] = {
        "architecture": "Qwen3ForCausalLM",
        "vocab_size": 999,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_layers": 3,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": EPS,
        "rope": RopeConfig("default", 10000.0),
        "sliding_windows": (),
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1 << 17,
        "dtype": "bfloat16",
        "eos_token_ids": (0,),
        "bos_token_id": None,
    }
    fields |= changes
    fields["sliding_windows"] = (None,) * int(fields["num_layers"])  # type: ignore[call-overload]
    return ModelConfig(**fields)  # type: ignore[arg-type]


@dataclass
class Layer:
    input_norm: Tensor
    qkv_proj: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Tensor
    post_norm: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor


@dataclass
class Case:
    """A row is the same whatever num_rows is. Slots that no token was written to hold NaN."""

    config: ModelConfig
    num_rows: int
    device: torch.device
    block_size: int = 256
    max_model_len: int = 700
    seed: int = 0
    layers: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        c = self.config
        generator = torch.Generator(device=self.device).manual_seed(self.seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=self.device) * scale
            return values.to(torch.bfloat16)

        def weight(features: int, depth: int) -> Tensor:
            return randn(features, depth, scale=depth**-0.5)

        e, i, d = c.hidden_size, c.intermediate_size, c.head_dim
        features = (c.num_heads + 2 * c.num_kv_heads) * d
        for _ in range(c.num_layers):
            self.layers.append(
                Layer(
                    input_norm=1 + randn(e, scale=0.1),
                    qkv_proj=weight(features, e),
                    qkv_bias=randn(features) if c.qkv_bias else None,
                    q_norm=1 + randn(d, scale=0.1) if c.qk_norm else None,
                    k_norm=1 + randn(d, scale=0.1) if c.qk_norm else None,
                    o_proj=weight(e, c.num_heads * d),
                    post_norm=1 + randn(e, scale=0.1),
                    gate_up_proj=weight(2 * i, e),
                    down_proj=weight(e, i),
                )
            )
        self.norm = 1 + randn(e, scale=0.1)
        self.embedding = randn(c.vocab_size, e)
        width = -(-self.max_model_len // self.block_size)
        num_blocks = MAX_ROWS * width + 1
        shape = (c.num_layers, 2, num_blocks, self.block_size, c.num_kv_heads, d)
        self.kv = randn(*shape)

        host = torch.Generator().manual_seed(self.seed)
        lens = torch.randint(1, self.max_model_len, (MAX_ROWS,), generator=host)
        lens[:4] = torch.tensor([1, self.max_model_len - 1, 64, 257])
        tables = (torch.randperm(num_blocks - 1, generator=host) + 1).view(MAX_ROWS, width)
        token_ids = torch.randint(c.vocab_size, (MAX_ROWS,), generator=host)
        positions = lens - 1
        blocks = tables.gather(1, (positions // self.block_size)[:, None])[:, 0]
        slots = blocks * self.block_size + positions % self.block_size
        places = torch.arange(self.block_size)
        for row in range(MAX_ROWS):
            for column in range(width):
                is_unset = column * self.block_size + places >= positions[row]
                block = self.kv[:, :, int(tables[row, column])]
                block[:, :, is_unset.to(self.device)] = float("nan")
        n = self.num_rows
        self.positions = positions[:n].to(self.device)
        self.token_ids = token_ids[:n].to(self.device)
        self.metadata = DecodeMetadata(
            slots[:n].to(self.device),
            tables[:n].int().contiguous().to(self.device),
            lens[:n].int().to(self.device),
        )
        self.cos_sin = rope_table(
            c.rope, head_dim=d, num_positions=self.max_model_len, device=self.device
        )

    def run(self, chain: DecodeChain) -> Tensor:
        """Last hidden states [N, E]; writes to self.kv."""
        return chain.run(
            self.token_ids,
            self.positions,
            self.metadata,
            embedding=self.embedding,
            layers=self.layers,
            norm=self.norm,
            k_caches=list(self.kv[:, 0]),
            v_caches=list(self.kv[:, 1]),
        )

    def exact(self) -> tuple[Tensor, Tensor]:
        """The same by the plain twins, all in float32, and the cache after it."""
        c, attention = self.config, ReferenceAttention()
        kv = self.kv.float()
        residual = self.embedding[self.token_ids].float()
        added: Tensor | None = None
        for layer, (keys, values) in zip(self.layers, kv, strict=True):
            weights = {
                name: None if value is None else value.float()
                for name, value in vars(layer).items()
            }
            if added is None:
                normed = reference.rms_norm(residual, weights["input_norm"], EPS)
            else:
                normed = reference.add_rms_norm(added, residual, weights["input_norm"], EPS)
            q, _, _ = reference.rope_and_cache(
                reference.linear(normed, weights["qkv_proj"], weights["qkv_bias"]),
                self.positions,
                self.cos_sin,
                keys,
                values,
                self.metadata.slot_mapping,
                num_heads=c.num_heads,
                num_kv_heads=c.num_kv_heads,
                q_weight=weights["q_norm"],
                k_weight=weights["k_norm"],
                eps=EPS,
            )
            attended = attention.decode(q, keys, values, self.metadata, window=None)
            hidden = reference.linear(attended.flatten(1), weights["o_proj"], None)
            normed = reference.add_rms_norm(hidden, residual, weights["post_norm"], EPS)
            activated = reference.linear_silu_mul(normed, weights["gate_up_proj"], None)
            added = reference.linear(activated, weights["down_proj"], None)
        assert added is not None
        return reference.add_rms_norm(added, residual, self.norm.float(), EPS), kv


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative, of the norm."""
    assert torch.isfinite(ours).all()
    return float((ours.float() - exact).norm() / exact.norm())
