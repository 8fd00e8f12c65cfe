"""How does the demo model take a big model's shape, and still give the same logits?

Every old coordinate becomes several new ones of the same value, in a random order, and what reads
them gets random shares of the old weight that add up to it: so each tile of a product counts, and
none may stand in for another. The RMSNorm of copies is copies of the RMSNorm.

Letters: E hidden, I intermediate, H query heads, K kv heads, D head dim; new sizes unless they are
called old.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shutil import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from graphengine.hub import resolve_model


@dataclass(frozen=True)
class Width:
    """Multiples of the demo model's sizes: its heads in whole groups, its head dim by doubling."""

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


def make_shares(of: Tensor, num_old: int, generator: torch.Generator) -> Tensor:
    """Of either sign and about as large as 1 / sqrt(copies), so that copies which are wrong in
    different ways do not come to about what is right; larger ones would round off more than the old
    weights do."""
    times = len(of) // num_old
    shares = torch.randn(len(of), generator=generator, device=of.device) / times**0.5
    sums = shares.new_zeros(num_old).index_add_(0, of, shares)
    return shares + (1 - sums[of]) / times


def make_copies(num_old: int, num_new: int, generator: torch.Generator) -> Copies:
    times = num_new // num_old
    assert times * num_old == num_new, f"{num_new} is no multiple of {num_old}"
    device = generator.device
    order = torch.randperm(num_new, generator=generator, device=device)
    of = torch.arange(num_old, device=device).repeat_interleave(times)[order]
    return Copies(of, make_shares(of, num_old, generator))


@dataclass(frozen=True)
class Heads:
    """kv_of: int64 [K] and q_of: int64 [H], the old heads behind the new. out: int64 [H * D] and
    shares: float32 [H * D], what o_proj reads by which share. v_of: int64 [K, D], old dims."""

    kv_of: Tensor
    q_of: Tensor
    v_of: Tensor
    out: Tensor
    shares: Tensor


def make_heads(old: LlamaConfig, width: Width, generator: torch.Generator) -> Heads:
    num_kv, num_old_kv = width.num_key_value_heads, old.num_key_value_heads
    group, old_group = width.num_attention_heads // num_kv, old.num_attention_heads // num_old_kv
    kv_of = make_copies(num_old_kv, num_kv, generator).of
    orders = [make_copies(old_group, group, generator).of for _ in range(num_kv)]
    q_of = torch.cat([kv * old_group + order for kv, order in zip(kv_of, orders, strict=True)])
    by_head = make_shares(q_of, old.num_attention_heads, generator)
    dims = [make_copies(old.head_dim, width.head_dim, generator) for _ in range(num_kv)]
    v_of = torch.stack([copies.of for copies in dims])  # [K, D]
    v_of_heads = v_of.repeat_interleave(group, 0)  # [H, D]
    v_shares = torch.stack([copies.shares for copies in dims]).repeat_interleave(group, 0)
    out = q_of[:, None] * old.head_dim + v_of_heads
    return Heads(kv_of, q_of, v_of, out.flatten(), (by_head[:, None] * v_shares).flatten())


def spread_queries_or_keys(
    weight: Tensor, heads: Tensor, old_dim: int, dim: int, *, noisy: Tensor
) -> Tensor:
    """q_proj's or k_proj's rows [old heads * old dim, E] as [heads * dim, E].

    Pair i of RoPE, the dims i and i + D/2, turns at theta ** (-2i / D) a position: the old pair i
    turns as the new pair i * D / old D does. noisy: bool [D / 2], other pairs to be filled with
    noise, which is not seen where the keys, or the queries, are zero."""
    times = dim // old_dim
    old = weight.unflatten(0, (-1, 2, old_dim // 2))[heads]  # [heads, 2, old D / 2, E]
    new = old.new_zeros(*old.shape[:2], dim // 2, old.shape[3])
    new[:, :, ::times] = old
    new[:, :, noisy] = old.std() * torch.randn_like(new[:, :, noisy])
    return new.flatten(0, 2)


def widen_demo(path: Path, width: Width, *, device: str = "cpu") -> Path:
    """Writes the demo model to `path` in the shape of `width`, in bfloat16, with its tokenizer.
    It is computed on `device`.

    The words that the vocabulary gets beside the old ones have logits that are means of theirs, so
    the greedy one stays."""
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(0)
    source = resolve_model("demo")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
    old: LlamaConfig = model.config
    hidden = make_copies(old.hidden_size, width.hidden_size, generator)
    scale = (width.head_dim / old.head_dim) ** 0.5  # attention divides by the root of head_dim

    def reading(weight: Tensor) -> Tensor:
        return weight[:, hidden.of] * hidden.shares

    state: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind == "q_proj":
            # What a layer's weights share is made with its first, q_proj.
            heads = make_heads(old, width, generator)
            inner = make_copies(old.intermediate_size, width.intermediate_size, generator)
            times = width.head_dim // old.head_dim
            free = torch.arange(width.head_dim // 2, device=device) % times != 0
            of_q = torch.rand(free.shape, generator=generator, device=device) < 0.5
            rows = spread_queries_or_keys(
                weight * scale, heads.q_of, old.head_dim, width.head_dim, noisy=free & of_q
            )
            state[name] = reading(rows)
        elif kind == "k_proj":
            rows = spread_queries_or_keys(
                weight, heads.kv_of, old.head_dim, width.head_dim, noisy=free & ~of_q
            )
            state[name] = reading(rows)
        elif kind == "v_proj":
            state[name] = reading(
                weight[(heads.kv_of[:, None] * old.head_dim + heads.v_of).flatten()]
            )
        elif kind == "o_proj":
            state[name] = weight[hidden.of][:, heads.out] * heads.shares
        elif kind in ("gate_proj", "up_proj"):
            state[name] = reading(weight[inner.of])
        elif kind == "down_proj":
            state[name] = weight[hidden.of][:, inner.of] * inner.shares
        elif kind == "embed_tokens":
            state[name] = widen_vocabulary(weight, width.vocab_size, generator)[:, hidden.of]
        elif kind == "lm_head":
            state[name] = reading(widen_vocabulary(weight, width.vocab_size, generator))
        else:
            assert "norm" in kind, f"{name} of {layer} is not known"
            state[name] = weight[hidden.of]
    config: dict[str, Any] = old.to_dict() | vars(width)
    with torch.device("meta"):
        wide = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    wide.load_state_dict(
        {name: weight.bfloat16() for name, weight in state.items()}, assign=True, strict=True
    )
    wide.save_pretrained(path, max_shard_size="9GB")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        copy(source / name, path / name)
    return path


def widen_vocabulary(weight: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[old, E] and below them means of them all by random shares, [size, E]."""
    num_old = len(weight)
    shares = torch.rand(size - num_old, num_old, generator=generator, device=weight.device)
    return torch.cat([weight, shares / shares.sum(dim=1, keepdim=True) @ weight])
