"""What would fit? Weights, KV cache, graphs and sequences of a model, from its config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from graphengine.attention.flash import FlashAttention
from graphengine.attention.flash4 import FlashAttention4
from graphengine.build import blocks_in, check_one_sequence_fits, cpu_kv_bytes
from graphengine.config import EngineConfig
from graphengine.errors import CapacityError
from graphengine.hub import resolve_model
from graphengine.metrics import Laps
from graphengine.model_config import load_model_config
from graphengine.prefill_graphs import prefill_ladder
from graphengine.resolve import Resolved, as_on_cuda, resolve

# What a CUDA context and the libraries' workspaces are taken to need.
_CONTEXT_BYTES = 700 * 2**20
# Of one graph and layer; a bucket of decode steps has one for each bank. With it all graphs of an
# 8B and a 0.6B at 256 and 32 rows come to 279, 101, 507 and 319 MiB, and took 288, 126, 400 and 224
# on an H200 (perf/LOG.md, 2026-11-29, fourth).
_GRAPH_BYTES_PER_LAYER = 32 * 2**10
_NUM_BANKS = 2
_SEQUENCE_LENGTHS = (256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes and counts; `working_bytes` and `graph_bytes` are estimates, the engine measures them.

    sequences_by_length: how many sequences of so many tokens run at once, capped by max_num_seqs.
    """

    model: str
    architecture: str
    device: str
    dtype: str
    attention: str
    num_parameters: int
    weight_bytes: int
    total_bytes: int | None
    working_bytes: int
    graph_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    block_size: int
    num_blocks: int
    max_model_len: int
    buckets: tuple[int, ...]
    sequences_by_length: dict[int, int]


def plan(config: EngineConfig, *, gpu_memory_bytes: int | None = None) -> Plan:
    """The plan of an engine with `config`; loads no weights and allocates nothing on the device.

    gpu_memory_bytes: plan for a card of that size instead of the one in this machine. Raises what
    making the engine would raise, CapacityError included."""
    model_path = resolve_model(config.model, with_weights=False)
    resolved = resolve(config, model_path, load_model_config(model_path), laps=Laps())
    attention = resolved.attention.name
    if gpu_memory_bytes is None and resolved.device.type == "cuda":
        gpu_memory_bytes = torch.cuda.get_device_properties(resolved.device).total_memory
    elif gpu_memory_bytes is not None and resolved.device.type != "cuda":
        resolved = as_on_cuda(resolved)
        attention = FlashAttention.name if config.attention == "auto" else attention
    weight_bytes = resolved.model_config.num_parameters * resolved.dtype.itemsize
    working_bytes = _working_bytes(resolved)
    graph_bytes = _graph_bytes(resolved) if gpu_memory_bytes and not config.enforce_eager else 0
    num_blocks = _num_blocks(resolved, gpu_memory_bytes, weight_bytes + working_bytes + graph_bytes)
    check_one_sequence_fits(num_blocks, resolved)
    block_size, max_model_len = resolved.block_size, resolved.max_model_len
    lengths = sorted({n for n in _SEQUENCE_LENGTHS if n < max_model_len} | {max_model_len})
    return Plan(
        model=str(resolved.model_path),
        architecture=resolved.model_config.architecture,
        device=resolved.device.type,
        dtype=str(resolved.dtype).removeprefix("torch."),
        attention=attention,
        num_parameters=resolved.model_config.num_parameters,
        weight_bytes=weight_bytes,
        total_bytes=gpu_memory_bytes,
        working_bytes=working_bytes,
        graph_bytes=graph_bytes,
        kv_bytes=(num_blocks + 1) * resolved.bytes_per_block,
        kv_bytes_per_token=resolved.bytes_per_block // block_size,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        buckets=resolved.ladder.sizes,
        sequences_by_length={
            n: min(config.max_num_seqs, num_blocks // math.ceil(n / block_size)) for n in lengths
        },
    )


def _num_blocks(resolved: Resolved, total_bytes: int | None, taken_bytes: int) -> int:
    config = resolved.config
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        return blocks_in(config.kv_cache_memory_bytes, resolved)
    if total_bytes is None:
        return blocks_in(cpu_kv_bytes(resolved), resolved)
    granted = int(config.gpu_memory_utilization * total_bytes) - _CONTEXT_BYTES
    if granted < taken_bytes:
        raise CapacityError(
            f"weights, graphs and a full prefill need about {taken_bytes / 2**30:.1f} GiB, "
            f"{granted / 2**30:.1f} GiB are granted; take a larger card, raise "
            "gpu_memory_utilization or lower max_num_batched_tokens"
        )
    return blocks_in(granted - taken_bytes, resolved)


def _working_bytes(resolved: Resolved) -> int:
    """A full prefill at its widest point, the MLP: residual, its norm, gate and up, their product;
    or its logits; or residual, q, k, v, attention's output and the context that it copies."""
    model, config = resolved.model_config, resolved.config
    num_tokens = config.max_num_batched_tokens
    mlp = num_tokens * (2 * model.hidden_size + 3 * model.intermediate_size)
    logits = min(config.max_num_seqs, num_tokens) * model.vocab_size
    attention = 0
    if resolved.attention.name == FlashAttention4.name:
        kv_width = 2 * model.num_kv_heads * model.head_dim
        attention = num_tokens * (model.hidden_size + 2 * model.num_heads * model.head_dim)
        attention += (num_tokens + resolved.max_model_len) * kv_width
    return resolved.dtype.itemsize * max(mlp, logits, attention)


def _graph_bytes(resolved: Resolved) -> int:
    """The shared pool, which holds the largest bucket's logits and what the sampler makes of them,
    and each graph's nodes; the same of prefills, whose pool holds a layer's activations beside what
    lies between its pieces."""
    model, ladder, itemsize = resolved.model_config, resolved.ladder, resolved.dtype.itemsize
    num_graphs = _NUM_BANKS * len(ladder.sizes)
    pool = itemsize * ladder.max_rows * (5 * model.vocab_size // 2 + 10 * model.hidden_size)
    config = resolved.config
    max_tokens = min(config.max_num_batched_tokens, config.max_num_seqs * resolved.max_model_len)
    prefills = prefill_ladder(model, max_tokens)
    if prefills is not None:
        num_graphs += len(prefills.sizes)
        heads = 2 * model.num_heads + 2 * model.num_kv_heads
        width = 2 * model.hidden_size + heads * model.head_dim + 3 * model.intermediate_size
        pool += itemsize * prefills.max_rows * width
    return pool + num_graphs * model.num_layers * _GRAPH_BYTES_PER_LAYER
