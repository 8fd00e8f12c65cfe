"""Where does a layer's prefill time go, kernel by kernel? The Llama-8B shape, on an H200.

Floors are those of that card: its read bandwidth and bf16 products, as in perf/LOG.md.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from graphengine.attention import AttentionBackend, PrefillMetadata
from graphengine.kernels import kernels_for
from graphengine.kv_cache import KVCache
from graphengine.model import DecoderModel
from graphengine.model_config import load_model_config
from graphengine.weights import dummy_weights
from perf.kernel_accounts import FLOPS_PER_S
from perf.prefill_inputs import BLOCK_SIZE, attention_flops, prefill_metadata_of, time_us
from perf.shapes import SHAPES

BYTES_PER_S = 4.47e12
LAYERS = 4


def row_kernels(num_tokens: int) -> dict[str, Any]:
    """us of the row kernels of an 8B layer as they are, and cut otherwise, beside their floor."""
    import triton

    from graphengine.kernels import fused, fused_linear

    hidden, inner, heads, kv_heads, head_dim = 4096, 14336, 32, 8, 128
    all_heads = heads + 2 * kv_heads
    x, residual, out = torch.randn(3, num_tokens, hidden, device="cuda").bfloat16()
    weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.randn(num_tokens, 2 * inner, device="cuda", dtype=torch.bfloat16)
    activated = torch.empty(num_tokens, inner, device="cuda", dtype=torch.bfloat16)
    qkv = torch.randn(num_tokens, all_heads * head_dim, device="cuda", dtype=torch.bfloat16)
    cos_sin = torch.randn(num_tokens, head_dim, device="cuda")
    metadata = prefill_metadata_of([num_tokens // 2] * 2, 0)
    positions = torch.arange(num_tokens, device="cuda") % (num_tokens // 2)
    shape = (2, int(metadata.block_tables.max()) + 1, BLOCK_SIZE, kv_heads, head_dim)
    k_cache, v_cache = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    row_bytes = 2.0 * num_tokens
    figures: dict[str, Any] = {
        "floor": {
            "add_rms_norm": 1e6 * row_bytes * 4 * hidden / BYTES_PER_S,
            "rope_and_cache": 1e6
            * row_bytes
            * head_dim
            * (all_heads + heads + kv_heads + 2 * kv_heads)
            / BYTES_PER_S,
            "silu_mul": 1e6 * row_bytes * 3 * inner / BYTES_PER_S,
        }
    }

    def norm(warps: int) -> Callable[[], object]:
        return lambda: fused._add_rms_norm_kernel[(num_tokens,)](
            *(x, residual, weight, out, hidden, 0, hidden, hidden, 1e-5),
            SPLITS=1,
            BLOCK=hidden,
            EARLY=False,
            num_warps=warps,
        )

    def rope(per_program: int, warps: int) -> Callable[[], object]:
        grid = (num_tokens, triton.cdiv(all_heads, per_program))
        strides = (qkv.stride(0), 0, qkv.stride(0), *k_cache.stride()[:2], *v_cache.stride()[:2])
        sizes = {"BLOCK_SIZE": BLOCK_SIZE, "H": heads, "K": kv_heads, "HALF": head_dim // 2}
        tensors = (qkv, qkv, positions, cos_sin, k_cache, v_cache, metadata.slot_mapping)
        return lambda: fused._rope_and_cache_kernel[grid](
            *(*tensors, None, None, *strides, 1e-5),
            **sizes,
            HALF_PADDED=head_dim // 2,
            HEADS_PER_PROGRAM=per_program,
            SPLITS=1,
            EARLY=False,
            num_warps=warps,
        )

    def silu(block: int, warps: int) -> Callable[[], object]:
        grid = (num_tokens, triton.cdiv(inner, block))
        return lambda: fused_linear._silu_mul_kernel[grid](
            gate_up, activated, 2 * inner, inner, BLOCK=block, num_warps=warps
        )

    for warps in (16, 8, 4):
        figures[f"add_rms_norm, {warps} warps"] = time_us(norm(warps))
    for per_program, warps in ((8, 2), (8, 1), (8, 4), (16, 2), (16, 4), (64, 4), (64, 8)):
        label = f"rope_and_cache, {per_program} heads, {warps} warps"
        figures[label] = time_us(rope(per_program, warps))
    for block, warps in ((1024, 4), (1024, 2), (2048, 4), (2048, 8), (4096, 8), (16384, 16)):
        figures[f"silu_mul, {block} columns, {warps} warps"] = time_us(silu(block, warps))
    return figures


def chunk(backends: dict[str, AttentionBackend]) -> dict[str, Any]:
    """us a layer that is not the last, kernel by kernel, of the engine's own prefill of 2 x 4096
    tokens, and its rate over two seconds."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES["llama-8b"] | {"num_hidden_layers": LAYERS, "vocab_size": 1024}
        shape |= {"bos_token_id": 1, "eos_token_id": 2}
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        config = load_model_config(Path(folder))
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    for name, backend in backends.items():
        model = DecoderModel(
            config,
            dtype=dtype,
            device=device,
            kernels=kernels_for(device),
            attention=backend,
            max_model_len=4096,
            block_size=BLOCK_SIZE,
        )
        dummy_weights(model, seed=0)
        lengths = [4096] * 2
        metadata = prefill_metadata_of(lengths, 0)
        num_blocks = int(metadata.block_tables.max()) + 1
        kv = KVCache(config, num_blocks, block_size=BLOCK_SIZE, dtype=dtype, device=device)
        ids = torch.randint(0, 1024, (sum(lengths),), device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])

        run = functools.partial(_forward, model, ids, positions, kv, metadata)
        stages = _profiled(run)
        floors = _floors(sum(lengths), lengths)
        us = time_us(run, repeats=5, budget_s=2.0) / LAYERS
        figures[name] = {
            "us_a_layer": us,
            "tflops": 1e-6 * sum(_layer_flops(sum(lengths), lengths).values()) / us,
            "stages": {
                stage: {"us": time, "floor_us": floors.get(stage)} for stage, time in stages.items()
            },
        }
    return figures


def _profiled(function: Callable[[], object]) -> dict[str, float]:
    """us a layer by stage, of one call after two."""
    function()
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and event.device_time_total > 0
    ]
    kernels.sort(key=lambda event: event.time_range.start)
    stages: dict[str, float] = {}
    # A product is known by the kernel before it.
    after = {"input_norm": "qkv", "attention": "o", "post_norm": "gate_up"}
    after |= {"silu": "down", "gate_up_silu": "down"}
    stage = "start"
    for event in kernels:
        if "rms_norm" in event.name:
            stage = "post_norm" if stage == "o" else "input_norm"
        elif "rope_and_cache" in event.name:
            stage = "rope"
        elif "silu_mul" in event.name:
            stage = "silu"
        elif "gated_linear" in event.name:
            stage = "gate_up_silu"
        elif "flash" in event.name.lower():
            stage = "attention"
        else:
            stage = after.get(stage, stage)  # a second kernel of a product stays with it
        stages[stage] = stages.get(stage, 0.0) + event.device_time_total / LAYERS
    return stages


def _layer_flops(num_tokens: int, lengths: list[int]) -> dict[str, float]:
    sizes = {"qkv": 6144 * 4096, "o": 4096 * 4096, "gate_up": 28672 * 4096, "down": 4096 * 14336}
    flops = {name: 2.0 * num_tokens * size for name, size in sizes.items()}
    return flops | {"attention": attention_flops(lengths, 0, num_heads=32, head_dim=128)}


def _floors(num_tokens: int, lengths: list[int]) -> dict[str, float]:
    """us: arithmetic of products and attention, bytes of the rest."""
    floors = {
        name: 1e6 * flops / FLOPS_PER_S for name, flops in _layer_flops(num_tokens, lengths).items()
    }
    floors["gate_up_silu"] = floors["gate_up"]
    moved = {"input_norm": 2 * 4096, "post_norm": 2 * 4096, "rope": 104 * 128, "silu": 3 * 14336}
    return floors | {name: 2e6 * num_tokens * n / BYTES_PER_S for name, n in moved.items()}


def _forward(
    model: DecoderModel, ids: Tensor, positions: Tensor, kv: KVCache, metadata: PrefillMetadata
) -> None:
    """Every layer for all tokens; the engine leaves out most of the last one."""
    with torch.inference_mode():
        residual = torch.nn.functional.embedding(ids, model.embed_tokens)
        for layer, k_cache, v_cache in zip(model.layers, kv.k, kv.v, strict=True):
            layer(None, residual, positions, model.cos_sin, k_cache, v_cache, metadata)
