"""How does the demo model take a big model's shape, and still give the same logits?

Every old coordinate becomes several new ones of the same value, in a random order, and what reads
them has random shares of the old weight that add up to it, so that no two tiles of a product are
alike. The RMSNorm of copies is copies of the RMSNorm. It shows that answers stay right; of logits,
which tell of a wrong tile sooner, see test_gpu_logits.

Letters: E hidden, H query heads, K kv heads, D head dim; new sizes unless they are called old.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shutil import copy
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from graphengine.hub import resolve_model


@dataclass(frozen=True)
class Width:
    """Multiples of the demo model's sizes, but for the vocabulary, of any size from its own on."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True)
class Copies:
    """of: int64 [N], the old coordinate behind each new one. shares: float32 [N], of its weight."""

    of: Tensor
    shares: Tensor


def make_shares(of: Tensor, num_old: int, generator: Generator) -> Tensor:
    """Of either sign and about as large as 1 / sqrt(copies), so that copies which are wrong in
    different ways do not come to about what is right; larger ones would round off more than the old
    weights do."""
    times = len(of) // num_old
    shares = torch.randn(len(of), generator=generator, device=of.device) / times**0.5
    sums = shares.new_zeros(num_old).index_add_(0, of, shares)
    return shares + (1 - sums[of]) / times


def make_copies(num_old: int, num_new: int, generator: Generator) -> Copies:
    times = num_new // num_old
    assert times * num_old == num_new, f"{num_new} is no multiple of {num_old}"
    device = generator.device
    order = torch.randperm(num_new, generator=generator, device=device)
    of = torch.arange(num_old, device=device).repeat_interleave(times)[order]
    return Copies(of, make_shares(of, num_old, generator))


def widen_demo(path: Path, width: Width, *, device: str = "cpu") -> Path:
    """Writes the demo model to `path` in the shape of `width`, in bfloat16, with its tokenizer.
    It is computed on `device`.

    The words that the vocabulary gets beside the old ones have logits that are means of theirs, so
    the greedy one stays."""
    generator = Generator(device).manual_seed(0)
    source = resolve_model("demo")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
    old: LlamaConfig = model.config
    weights = {name.removesuffix(".weight"): tensor for name, tensor in model.state_dict().items()}
    hidden = make_copies(old.hidden_size, width.hidden_size, generator)

    def vocabulary(weight: Tensor) -> Tensor:
        num_old = len(weight)
        shares = torch.rand(
            width.vocab_size - num_old, num_old, generator=generator, device=weight.device
        )
        return torch.cat([weight, shares / shares.sum(dim=1, keepdim=True) @ weight])

    wide = {
        "model.embed_tokens": vocabulary(weights["model.embed_tokens"])[:, hidden.of],
        "lm_head": vocabulary(weights["lm_head"])[:, hidden.of] * hidden.shares,
        "model.norm": weights["model.norm"][hidden.of],
    }
    for index in range(old.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = {
            name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
        widened = {
            **widen_attention(layer, old, width, hidden, generator),
            **widen_mlp(layer, width, hidden, generator),
            "input_layernorm": layer["input_layernorm"][hidden.of],
            "post_attention_layernorm": layer["post_attention_layernorm"][hidden.of],
        }
        wide |= {prefix + name: weight for name, weight in widened.items()}
    config: dict[str, Any] = old.to_dict() | vars(width)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    state = {f"{name}.weight": weight.bfloat16() for name, weight in wide.items()}
    empty.load_state_dict(state, assign=True, strict=True)
    empty.save_pretrained(path, max_shard_size="9GB")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        copy(source / name, path / name)
    return path


def widen_mlp(
    layer: dict[str, Tensor], width: Width, hidden: Copies, generator: Generator
) -> dict[str, Tensor]:
    gate, up, down = (layer[f"mlp.{name}_proj"] for name in ("gate", "up", "down"))
    inner = make_copies(len(gate), width.intermediate_size, generator)
    return {
        "mlp.gate_proj": gate[inner.of][:, hidden.of] * hidden.shares,
        "mlp.up_proj": up[inner.of][:, hidden.of] * hidden.shares,
        "mlp.down_proj": down[hidden.of][:, inner.of] * inner.shares,
    }


def widen_attention(
    layer: dict[str, Tensor],
    old: LlamaConfig,
    width: Width,
    hidden: Copies,
    generator: Generator,
) -> dict[str, Tensor]:
    q, k, v, o = (layer[f"self_attn.{name}_proj"] for name in "qkvo")
    num_kv, dim, device = width.num_key_value_heads, width.head_dim, generator.device
    group = width.num_attention_heads // num_kv
    old_group = old.num_attention_heads // old.num_key_value_heads
    # Old heads behind the new ones: [K], and [H] in groups of one kv head.
    kv_of = make_copies(old.num_key_value_heads, num_kv, generator).of
    in_group = [make_copies(old_group, group, generator).of for _ in range(num_kv)]
    q_of = torch.cat([kv * old_group + of for kv, of in zip(kv_of, in_group, strict=True)])
    # Pairs of dims that no old pair has: noise in the queries, or in the keys, where the other
    # side's are zero, is not seen.
    is_free = torch.arange(dim // 2, device=device) % (dim // old.head_dim) != 0
    is_noise_of_q = torch.rand(dim // 2, generator=generator, device=device) < 0.5
    scale = (dim / old.head_dim) ** 0.5  # scores are divided by the root of the head dim
    q = spread_pairs(q * scale, q_of, old.head_dim, is_free & is_noise_of_q, generator)
    k = spread_pairs(k, kv_of, old.head_dim, is_free & ~is_noise_of_q, generator)
    # The values' dims, another order for each kv head, and what o_proj reads of each query head.
    dims = [make_copies(old.head_dim, dim, generator) for _ in range(num_kv)]
    v_of = torch.stack([copies.of for copies in dims])  # [K, D]
    o_of = q_of[:, None] * old.head_dim + v_of.repeat_interleave(group, 0)  # [H, D]
    head_shares = make_shares(q_of, old.num_attention_heads, generator)
    dim_shares = torch.stack([copies.shares for copies in dims]).repeat_interleave(group, 0)
    shares = head_shares[:, None] * dim_shares  # [H, D]
    v = v[(kv_of[:, None] * old.head_dim + v_of).flatten()]
    wide = {"q": q, "k": k, "v": v}
    return {
        **{f"self_attn.{n}_proj": w[:, hidden.of] * hidden.shares for n, w in wide.items()},
        "self_attn.o_proj": o[hidden.of][:, o_of.flatten()] * shares.flatten(),
    }


def spread_pairs(
    weight: Tensor, heads: Tensor, old_dim: int, is_noise: Tensor, generator: Generator
) -> Tensor:
    """q_proj's or k_proj's rows [old heads * old dim, E] as [heads * D, E]. is_noise: bool [D / 2].

    Pair i of RoPE, the dims i and i + D/2, turns at theta ** (-2i / D) a position: the old pair i
    turns as the new pair i * D / old D does."""
    old = weight.unflatten(0, (-1, 2, old_dim // 2))[heads]  # [heads, 2, old D / 2, E]
    new = old.new_zeros(*old.shape[:2], len(is_noise), old.shape[3])
    new[:, :, :: len(is_noise) // (old_dim // 2)] = old
    shape = new[:, :, is_noise].shape
    noise = torch.randn(shape, generator=generator, device=new.device)
    new[:, :, is_noise] = old.std() * noise
    return new.flatten(0, 2)
