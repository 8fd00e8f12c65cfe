"""Which checkpoints do the tests run on? Tiny random ones of every family and variant, written by
transformers' own save_pretrained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB_SIZE = 199
WINDOW = 7

# Everything small but nothing equal: a swapped dimension cannot go unseen.
_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# With head_dim 16 and theta 10000 the wavelengths are 6.3, 19.9, 62.8 and up. This scaling keeps
# the first, interpolates the second and stretches the rest, so each of its three branches is used.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_MIXED_LAYERS = ["full_attention", "sliding_attention", "full_attention"]

# name -> (transformers config class, what differs from _COMMON)
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama_gqa_llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "llama_linear": ("LlamaConfig", {"rope_parameters": _LINEAR_ROPE}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("LlamaConfig", {"head_dim": 24}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_window": ("MistralConfig", {"sliding_window": WINDOW}),
    "mistral_head_dim": ("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_layer_types": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED_LAYERS},
    ),
    "qwen2_max_window_layers": (
        "Qwen2Config",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3_bias_window": (
        "Qwen3Config",
        {
            "head_dim": 24,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": _MIXED_LAYERS,
            "tie_word_embeddings": True,
        },
    ),
}


def hf_config(variant: str, **overrides: object) -> Any:
    """transformers' config of a variant; `overrides` are its fields by transformers' names."""
    config_class, differences = VARIANTS[variant]
    return getattr(transformers, config_class)(**{**_COMMON, **differences, **overrides})


def write_checkpoint(
    path: Path,
    variant: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    **overrides: object,
) -> Path:
    """Writes the checkpoint of a variant to `path` and returns it. No tokenizer comes with it."""
    model = transformers.AutoModelForCausalLM.from_config(hf_config(variant, **overrides))
    randomize(model, seed=seed)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def reference_model(path: Path) -> Any:
    """transformers' model of a checkpoint, float32, with attention spelled out."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def randomize(model: nn.Module, *, seed: int) -> None:
    """Values with which every weight shows in the logits, whose standard deviation is about 3.

    transformers would start norms at one and biases at zero, which hides their absence."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, *, mean: float, std: float) -> None:
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    for name, parameter in model.named_parameters():
        if "norm" in name:
            normal(parameter, mean=1.0, std=0.3)
        elif parameter.dim() == 1:
            normal(parameter, mean=0.0, std=0.5)
        elif "embed_tokens" in name or "lm_head" in name:
            normal(parameter, mean=0.0, std=3.0 / parameter.shape[1] ** 0.5)
        else:
            normal(parameter, mean=0.0, std=1.2 / parameter.shape[1] ** 0.5)
