"""What does a checkpoint's config say about the model? Family flags and RoPE, from config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphengine.errors import ModelError
from graphengine.rope_config import RopeConfig, rope_config

# What a config.json may leave out, and what it then means: the defaults of transformers' classes
# (models/*/configuration_*.py). None: follows from other keys, or there is none. transformers is
# not asked itself, since importing it takes longer than loading the weights of an 8B.
_COMMON: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN: Mapping[str, Any] = {
    **_COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "MistralForCausalLM": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Qwen2ForCausalLM": _QWEN,
    "Qwen3ForCausalLM": {**_QWEN, "head_dim": 128, "attention_bias": False},
}
_MAX_LAYERS = 4096
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
    for key in ("quantization_config", "compression_config", "per_layer_config"):
        if raw.get(key):
            raise ModelError(
                f"{file} has a {key}, which is not supported; "
                "give a plain checkpoint in bfloat16, float16 or float32"
            )
    values = {**_DEFAULTS[architecture], **raw}
    return _model_config(architecture, values, file)


def _model_config(architecture: str, values: Mapping[str, Any], file: Path) -> ModelConfig:
    """values: config.json with what it leaves out filled in."""
    family = architecture.removesuffix("ForCausalLM")
    if values["hidden_act"] not in _ACTIVATIONS:
        raise ModelError(
            f"{file} has hidden_act {values['hidden_act']!r}; only 'silu' is supported"
        )
    sizes = {
        name: _checked_int(name, values[name], file, least=1)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
    }
    num_layers, num_heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    num_positions = sizes["max_position_embeddings"]
    if num_layers > _MAX_LAYERS:
        raise ModelError(
            f"{file} has num_hidden_layers {num_layers}; at most {_MAX_LAYERS} are supported"
        )
    num_kv_heads = num_heads
    if values["num_key_value_heads"] is not None:
        num_kv_heads = _checked_int(
            "num_key_value_heads", values["num_key_value_heads"], file, least=1
        )
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{file} has {num_heads} attention heads and {num_kv_heads} key/value heads; "
            "the first must be a multiple of the second"
        )
    if family == "Llama" and sizes["hidden_size"] % num_heads:
        raise ModelError(
            f"{file} has hidden_size {sizes['hidden_size']} and {num_heads} attention heads; the "
            "first must be a multiple of the second"
        )
    head_dim = values["head_dim"]
    if head_dim is None and family != "Qwen3":  # whose own never follows from other keys
        head_dim = sizes["hidden_size"] // num_heads
    head_dim = _checked_int("head_dim", head_dim, file, least=1)
    if head_dim % 2:
        raise ModelError(f"{file} has head_dim {head_dim}; RoPE needs an even one")
    rms_norm_eps = values["rms_norm_eps"]
    if not isinstance(rms_norm_eps, float) or not 0.0 <= rms_norm_eps < 1.0:
        raise ModelError(f"{file} has rms_norm_eps {rms_norm_eps!r}; give a small number like 1e-6")
    bos_token_id = values["bos_token_id"]
    if bos_token_id is not None and not _is_int(bos_token_id):
        raise ModelError(f"{file} has bos_token_id {bos_token_id!r}; give a token id or null")
    eos_token_ids = _eos_token_ids(values["eos_token_id"], file)
    if eos_token_ids and max(eos_token_ids) >= sizes["vocab_size"]:
        raise ModelError(
            f"{file} or generation_config.json has eos_token_id {max(eos_token_ids)}; the "
            f"vocabulary is 0..{sizes['vocab_size'] - 1}"
        )
    # Mistral has no biases and Qwen2's are fixed, whatever their config.json says.
    attention_bias = family in ("Llama", "Qwen3") and _checked_bool("attention_bias", values, file)
    return ModelConfig(
        architecture=architecture,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=rms_norm_eps,
        rope=rope_config(values, file, head_dim=head_dim, num_positions=num_positions),
        sliding_windows=_sliding_windows(values, family, num_layers, file),
        # Qwen2's q, k and v always have a bias and its o never has.
        qkv_bias=attention_bias or family == "Qwen2",
        o_bias=attention_bias,
        mlp_bias=family == "Llama" and _checked_bool("mlp_bias", values, file),
        qk_norm=family == "Qwen3",
        tie_word_embeddings=_checked_bool("tie_word_embeddings", values, file),
        max_position_embeddings=num_positions,
        dtype=_dtype(values, file),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_int(name: str, value: Any, file: Path, *, least: int) -> int:
    if not _is_int(value) or not least <= value < _INT_LIMIT:
        raise ModelError(
            f"{file} has {name} {value!r}; give a whole number in [{least}, {_INT_LIMIT})"
        )
    number: int = value
    return number


def _checked_bool(name: str, values: Mapping[str, Any], file: Path) -> bool:
    value = values[name]
    if not isinstance(value, bool):
        raise ModelError(f"{file} has {name} {value!r}; give true or false")
    return value


def _architecture(raw: Mapping[str, Any], file: Path) -> str:
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in _DEFAULTS:
        raise ModelError(
            f"{file} names the architecture {name!r}; supported: {', '.join(_DEFAULTS)}"
        )
    return name


def _dtype(raw: Mapping[str, Any], file: Path) -> str:
    """transformers' two spellings; float32 is what it assumes when there is none."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if not isinstance(name, str) or name not in _DTYPES:
        raise ModelError(f"{file} has dtype {name!r}; supported: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _sliding_windows(
    values: Mapping[str, Any], family: str, num_layers: int, file: Path
) -> tuple[int | None, ...]:
    if family == "Llama":
        return (None,) * num_layers
    window = values["sliding_window"]
    if window is not None and not _is_int(window):
        raise ModelError(f"{file} has sliding_window {window!r}; give a number of tokens or null")
    if family == "Mistral":
        kinds = ["full_attention" if window is None else "sliding_attention"] * num_layers
    else:
        if not _checked_bool("use_sliding_window", values, file):
            window = None
        kinds = values["layer_types"]
        if kinds is None:
            num_full = num_layers
            if window is not None:
                num_full = _checked_int(
                    "max_window_layers", values["max_window_layers"], file, least=0
                )
            kinds = [
                "full_attention" if layer < num_full else "sliding_attention"
                for layer in range(num_layers)
            ]
    if not isinstance(kinds, list):
        raise ModelError(f"{file} has a {type(kinds).__name__} as layer_types; give a list")
    if len(kinds) != num_layers:
        raise ModelError(f"{file} has {len(kinds)} layer_types for {num_layers} layers")
    windows: list[int | None] = []
    for kind in kinds:
        if kind == "full_attention":
            windows.append(None)
        elif kind == "sliding_attention" and window is not None and window >= 1:
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
            if not _is_int(token_id) or not 0 <= token_id < _INT_LIMIT:
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
