"""What does a checkpoint's config say about the model? Family flags and RoPE, from config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphengine.errors import ModelError

# Architecture -> transformers' config class, which knows the family's defaults and old spellings.
# The class is named here, never looked up through config.json: `auto_map` code is not run.
_CONFIG_CLASSES = {
    "LlamaForCausalLM": "LlamaConfig",
    "MistralForCausalLM": "MistralConfig",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
}
_MAX_LAYERS = 4096
_ROPE_TYPES = ("default", "linear", "llama3")
_ACTIVATIONS = ("silu", "swish")  # two names of one function
_INT_LIMIT = 2**31  # ids and sizes fit tables of 32 bits
# Stored dtype -> what "auto" computes in.
_DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "float64": "float32",
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. rope_type: "default", "linear" (factor) or "llama3" (all fields)."""

    rope_type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder. Names are Hugging Face's where they exist.

    sliding_windows: one entry a layer, None for full attention, else the tokens a query sees,
    itself included. qkv_bias, o_bias, mlp_bias: which projections have one. qk_norm: RMSNorm of
    each head's query and key before RoPE. dtype: as stored, float64 as float32. eos_token_ids:
    those of config.json, then those only generation_config.json has.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model; a tied head counts once."""
        e, i, d = self.hidden_size, self.intermediate_size, self.head_dim
        q_rows, qkv_rows = self.num_heads * d, (self.num_heads + 2 * self.num_kv_heads) * d
        layer = e * (qkv_rows + q_rows + 3 * i + 2)  # products and two norms
        layer += self.qkv_bias * qkv_rows + self.o_bias * e + self.mlp_bias * (2 * i + e)
        layer += self.qk_norm * 2 * d
        heads = 1 if self.tie_word_embeddings else 2
        return heads * self.vocab_size * e + self.num_layers * layer + e

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of KV cache one token takes in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes


def load_model_config(path: Path) -> ModelConfig:
    """The ModelConfig of the checkpoint directory `path`; reads its json files, runs no code of it.

    Raises ModelError if the directory or config.json is missing or broken, or names something this
    engine has no kernels for."""
    if not path.is_dir():
        raise ModelError(f"no model directory {str(path)!r}; give the directory of a checkpoint")
    file = path / "config.json"
    raw = _read_json(file)
    if raw is None:
        raise ModelError(
            f"no config.json in {str(path)!r}; give the directory of a Hugging Face checkpoint"
        )
    architecture = _architecture(raw, file)
    dtype = _dtype(raw, file)  # before transformers, which stumbles over a wrong one
    for key in ("quantization_config", "compression_config", "per_layer_config"):
        if raw.get(key):
            raise ModelError(
                f"{file} has a {key}, which is not supported; "
                "give a plain checkpoint in bfloat16, float16 or float32"
            )

    num_layers = raw.get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers > _MAX_LAYERS:
        # Before transformers makes a list of so many.
        raise ModelError(
            f"{file} has num_hidden_layers {num_layers}; at most {_MAX_LAYERS} are supported"
        )

    import transformers  # here and not above: it imports torch, which takes seconds

    try:
        hf = getattr(transformers, _CONFIG_CLASSES[architecture]).from_dict(dict(raw))
    except Exception as error:  # whatever the family's own validation raises
        reason = " ".join(str(error).split())
        raise ModelError(f"{file} is refused by {architecture}: {reason}; correct it") from error

    return _from_transformers(hf, architecture=architecture, dtype=dtype, file=file)


def _from_transformers(hf: Any, *, architecture: str, dtype: str, file: Path) -> ModelConfig:
    family = architecture.removesuffix("ForCausalLM")
    if hf.hidden_act not in _ACTIVATIONS:
        raise ModelError(f"{file} has hidden_act {hf.hidden_act!r}; only 'silu' is supported")
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    sizes = {name: _checked_size(name, getattr(hf, name), file) for name in names}
    head_dim = _checked_size(
        "head_dim",
        getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        file,
    )
    num_heads, num_kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{file} has {num_heads} attention heads and {num_kv_heads} key/value heads; "
            "the first must be a multiple of the second"
        )
    if head_dim % 2:
        raise ModelError(f"{file} has head_dim {head_dim}; RoPE needs an even one")
    eos_token_ids = _eos_token_ids(hf.eos_token_id, file)
    if eos_token_ids and max(eos_token_ids) >= sizes["vocab_size"]:
        raise ModelError(
            f"{file} or generation_config.json has eos_token_id {max(eos_token_ids)}; the "
            f"vocabulary is 0..{sizes['vocab_size'] - 1}"
        )
    attention_bias = bool(getattr(hf, "attention_bias", False)) and family != "Mistral"
    return ModelConfig(
        architecture=architecture,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(hf.rms_norm_eps),
        rope=_rope(hf.rope_parameters, file),
        sliding_windows=_sliding_windows(hf, family, file),
        # Qwen2's q, k and v always have a bias and its o never has.
        qkv_bias=attention_bias or family == "Qwen2",
        o_bias=attention_bias and family != "Qwen2",
        mlp_bias=bool(getattr(hf, "mlp_bias", False)) and family == "Llama",
        qk_norm=family == "Qwen3",
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        max_position_embeddings=sizes["max_position_embeddings"],
        dtype=dtype,
        eos_token_ids=eos_token_ids,
        bos_token_id=hf.bos_token_id,
    )


def _checked_size(name: str, size: Any, file: Path) -> int:
    if not isinstance(size, int) or not 1 <= size < _INT_LIMIT:
        raise ModelError(f"{file} has {name} {size!r}; give a whole number in [1, {_INT_LIMIT})")
    return size


def _architecture(raw: Mapping[str, Any], file: Path) -> str:
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in _CONFIG_CLASSES:
        raise ModelError(
            f"{file} names the architecture {name!r}; supported: {', '.join(_CONFIG_CLASSES)}"
        )
    return name


def _dtype(raw: Mapping[str, Any], file: Path) -> str:
    """transformers' two spellings; float32 is what it assumes when there is none."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(name, str) or name not in _DTYPES:
        raise ModelError(f"{file} has dtype {name!r}; supported: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _rope(parameters: Mapping[str, Any], file: Path) -> RopeConfig:
    """From transformers' `rope_parameters`, into which it turns the older `rope_scaling`."""
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise ModelError(f"{file} has RoPE type {rope_type!r}; supported: {', '.join(_ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"{file} has partial_rotary_factor {parameters['partial_rotary_factor']!r}; only RoPE "
            "over the whole head (1.0) is supported"
        )
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }[rope_type]
    values = {"theta": parameters.get("rope_theta"), **{name: parameters[name] for name in names}}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ModelError(f"{file} has RoPE {name} {value!r}; it must be a number above 0")
    return RopeConfig(rope_type, **values)


def _sliding_windows(hf: Any, family: str, file: Path) -> tuple[int | None, ...]:
    num_layers: int = hf.num_hidden_layers
    window = getattr(hf, "sliding_window", None)
    if family == "Llama":
        return (None,) * num_layers
    if family == "Mistral":
        kinds = ["full_attention" if window is None else "sliding_attention"] * num_layers
    else:
        kinds = hf.layer_types
    if len(kinds) != num_layers:
        raise ModelError(f"{file} has {len(kinds)} layer_types for {num_layers} layers")
    windows: list[int | None] = []
    for kind in kinds:
        if kind == "full_attention":
            windows.append(None)
        elif kind == "sliding_attention" and isinstance(window, int) and window >= 1:
            windows.append(window)
        else:
            raise ModelError(
                f"{file} has a layer of type {kind!r} and sliding_window {window!r}; supported: "
                "full_attention, and sliding_attention with a sliding_window of at least 1"
            )
    return tuple(windows)


def _eos_token_ids(from_config: Any, file: Path) -> tuple[int, ...]:
    generation_file = file.with_name("generation_config.json")
    generation = _read_json(generation_file) or {}
    ids: dict[int, None] = {}  # ordered, without repeats
    for source, value in ((file, from_config), (generation_file, generation.get("eos_token_id"))):
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            is_int = isinstance(token_id, int) and not isinstance(token_id, bool)
            if not is_int or not 0 <= token_id < _INT_LIMIT:
                raise ModelError(f"{source} has eos_token_id {value!r}; give a token id or a list")
            ids[token_id] = None
    return tuple(ids)


def _read_json(file: Path) -> Mapping[str, Any] | None:
    """The object in `file`, None if there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read ({error}); it must be a JSON object") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a JSON {type(value).__name__}; it must be a JSON object")
    return value
