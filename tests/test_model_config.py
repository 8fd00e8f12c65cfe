"""Is config.json understood, in its old and new spellings, and refused where it must be?"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from checkpoints import VARIANTS, WINDOW, hf_config
from hypothesis import given, settings
from hypothesis import strategies as st

from graphengine.errors import ModelError
from graphengine.hub import resolve_model
from graphengine.layers import rope_table
from graphengine.model_config import ModelConfig, load_model_config
from graphengine.rope_config import RopeConfig, has_finite_angles

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "bos_token_id": 1,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
OLD_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

ABSURD_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1e-300}


def write(path: Path, config: object, generation: object = None) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model_config(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_old_spelling_is_understood(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, LLAMA))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert config.rope == RopeConfig("default", theta=500000.0)
    assert (config.dtype, config.bos_token_id, config.eos_token_ids) == ("bfloat16", 1, (2,))
    assert config.sliding_windows == (None, None)
    assert not config.qkv_bias
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_old_linear_rope_scaling_is_understood(tmp_path: Path, key: str) -> None:
    scaling = {key: "linear", "factor": 4.0}
    config = load_model_config(write(tmp_path, {**LLAMA, "rope_scaling": scaling}))
    assert config.rope == RopeConfig("linear", theta=500000.0, factor=4.0)


def test_old_and_new_llama3_rope_are_the_same(tmp_path: Path) -> None:
    old = load_model_config(write(tmp_path, {**LLAMA, "rope_scaling": OLD_LLAMA3}))
    new_raw = {**LLAMA, "rope_parameters": {**OLD_LLAMA3, "rope_theta": 500000.0}}
    del new_raw["rope_theta"]
    assert old.rope == RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 64)
    assert load_model_config(write(tmp_path, new_raw)) == old


def test_missing_kv_heads_are_as_many_as_heads(tmp_path: Path) -> None:
    raw = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert load_model_config(write(tmp_path, raw)).num_kv_heads == 4


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 7}, (None, None)),  # use_sliding_window is false
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, (None, 7)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (7, None),
        ),
    ],
)
def test_qwen2_windows(
    tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert load_model_config(write(tmp_path, {**QWEN2, **changes})).sliding_windows == windows


@pytest.mark.parametrize("window", [None, WINDOW])
def test_mistral_windows_hold_for_every_layer(tmp_path: Path, window: int | None) -> None:
    raw = {
        **LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": window,
        "attention_bias": True,  # which Mistral has none of, whatever its config says
    }
    config = load_model_config(write(tmp_path, raw))
    assert config.sliding_windows == (window, window)
    assert not config.qkv_bias


def test_biases_by_family(tmp_path: Path) -> None:
    def biases(raw: dict[str, Any]) -> tuple[bool, bool, bool, bool]:
        config = load_model_config(write(tmp_path, raw))
        return config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm

    qwen3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    both = {"attention_bias": True, "mlp_bias": True}
    assert biases({**LLAMA, **both}) == (True, True, True, False)
    assert biases(QWEN2) == (True, False, False, False)
    assert biases(qwen3) == (False, False, False, True)
    assert biases({**qwen3, **both}) == (True, True, False, True)


def test_qwen3_head_dim_defaults_to_128(tmp_path: Path) -> None:
    raw = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    config = load_model_config(write(tmp_path, raw))
    assert config.head_dim == 128
    assert config.kv_bytes_per_token(2) == 2 * 2 * 2 * 128 * 2  # k and v, layers, heads, D, bytes


@pytest.mark.parametrize(
    ("ours", "generation", "expected"),
    [
        (2, None, (2,)),
        (2, {"eos_token_id": [7, 2, 5]}, (2, 7, 5)),
        ([3, 2], {"eos_token_id": 9}, (3, 2, 9)),
        (None, {"eos_token_id": 9}, (9,)),
        (None, {}, ()),
    ],
)
def test_eos_ids_of_both_files_are_united(
    tmp_path: Path, ours: object, generation: object, expected: tuple[int, ...]
) -> None:
    path = write(tmp_path, {**LLAMA, "eos_token_id": ours}, generation)
    assert load_model_config(path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": None}, "float32"),
        ({"torch_dtype": "float64"}, "float32"),
    ],
)
def test_dtype_as_stored(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert load_model_config(write(tmp_path, {**LLAMA, **changes})).dtype == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_saves_is_understood(tmp_path: Path, variant: str) -> None:
    architecture = VARIANTS[variant][0].replace("Config", "ForCausalLM")
    hf_config(variant, architectures=[architecture]).save_pretrained(tmp_path)
    assert load_model_config(tmp_path).architecture == architecture


# --- transformers, which reads the same files, as the reference

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LLAMA3_ROPE = {**OLD_LLAMA3, "rope_theta": 5e5}
# Values for keys that a config.json may have or leave out. Left out by most; some are refused.
KEYS: dict[str, list[Any]] = {
    "vocab_size": [199, "many", True],
    "hidden_size": [64, 96, 100, 64.0, None],
    "intermediate_size": [96, 0],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [4, 8, 0],
    "num_key_value_heads": [1, 2, 3],
    "head_dim": [8, 24, 15],
    "hidden_act": ["silu", "swish", "gelu", None],
    "max_position_embeddings": [512],
    "rms_norm_eps": [1e-5, "small", None],
    "rope_theta": [1e6, 1000, None],
    "rope_scaling": [
        None,
        {},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 2, "rope_theta": 7.0},
        {"rope_type": "linear"},
        OLD_LLAMA3,
        {k: v for k, v in OLD_LLAMA3.items() if k != "original_max_position_embeddings"},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        "linear",
    ],
    "rope_parameters": [
        None,
        {},
        {"rope_theta": 3e5},
        {"rope_type": "default", "rope_theta": 3e5},
        {"type": "linear", "factor": 4.0},
        LLAMA3_ROPE,
        {k: v for k, v in LLAMA3_ROPE.items() if k != "low_freq_factor"},
    ],
    "partial_rotary_factor": [1.0, 0.5, None],
    "original_max_position_embeddings": [128],
    "tie_word_embeddings": [True, False, None],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "use_sliding_window": [True, True, False, 1],
    "sliding_window": [7, None, 0, "7"],
    "max_window_layers": [0, 1, 2],
    "layer_types": [
        None,
        ["full_attention", "sliding_attention", "full_attention"],
        ["full_attention"],
        ["full_attention", "dense", "full_attention"],
    ],
    "bos_token_id": [5, None, "<s>"],
    "eos_token_id": [7, [7, 8], None, "</s>"],
    "torch_dtype": ["float16", None],
    "dtype": ["bfloat16", "float32"],
}


def by_transformers(raw: dict[str, Any]) -> ModelConfig | None:
    """What transformers understands by `raw`; None where it, or this engine, has to refuse."""
    architecture = raw["architectures"][0]
    family = architecture.removesuffix("ForCausalLM")
    raw = json.loads(json.dumps(raw))  # of its own, since it is written to
    if family in ("Llama", "Mistral"):
        raw.pop("layer_types", None)  # which their models never read
    try:
        hf: Any = getattr(transformers, f"{family}Config").from_dict(raw)
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    except Exception:  # each check has its own
        return None
    rope = hf.rope_parameters
    scaling = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }.get(rope["rope_type"])
    layers, window = hf.num_hidden_layers, getattr(hf, "sliding_window", None)
    slides = [False] * layers
    if family == "Mistral":
        slides = [window is not None] * layers
    elif family != "Llama":
        slides = [kind == "sliding_attention" for kind in hf.layer_types]
        if not set(hf.layer_types) <= {"full_attention", "sliding_attention"}:
            return None
    if (
        scaling is None
        or rope["rope_theta"] is None
        or rope.get("partial_rotary_factor", 1.0) != 1.0
        or hf.hidden_act not in ("silu", "swish")
        or min(hf.intermediate_size, hf.num_attention_heads) < 1
        or head_dim % 2
        or hf.num_attention_heads % hf.num_key_value_heads
        or (any(slides) and not window)
    ):
        return None
    has_bias = family in ("Llama", "Qwen3") and hf.attention_bias
    eos = hf.eos_token_id
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=hf.rms_norm_eps,
        rope=RopeConfig(rope["rope_type"], rope["rope_theta"], **{k: rope[k] for k in scaling}),
        sliding_windows=tuple(window if slide else None for slide in slides),
        qkv_bias=has_bias or family == "Qwen2",
        o_bias=has_bias,
        mlp_bias=family == "Llama" and hf.mlp_bias,
        qk_norm=family == "Qwen3",
        tie_word_embeddings=hf.tie_word_embeddings,
        max_position_embeddings=hf.max_position_embeddings,
        dtype="float32" if hf.dtype is None else str(hf.dtype).removeprefix("torch."),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        bos_token_id=hf.bos_token_id,
    )


def check_as_transformers(path: Path, raw: dict[str, Any]) -> bool:
    """Whether `raw` was understood; what it means is compared."""
    expected = by_transformers(raw)
    write(path, raw)
    if expected is None:
        assert str(path / "config.json") in refusal(path)
    else:
        assert load_model_config(path) == expected
    return expected is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("key", [None, *KEYS])
def test_each_key_means_what_transformers_says(
    tmp_path: Path, architecture: str, key: str | None
) -> None:
    """Alone among defaults, where a wrong default shows too."""
    values = [0] if key is None else KEYS[key]
    for value in values:
        raw = {"architectures": [architecture]} | ({} if key is None else {key: value})
        understood = check_as_transformers(tmp_path, raw)
        assert understood or key is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_keys_together_mean_what_transformers_says(
    tmp_path_factory: pytest.TempPathFactory, architecture: str
) -> None:
    path = tmp_path_factory.mktemp("config")
    num_understood = 0

    @given(
        st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in KEYS.items()}),
        st.fixed_dictionaries({}, optional={k: st.just(v[0]) for k, v in KEYS.items()}),
    )
    @settings(max_examples=400, derandomize=True, database=None, deadline=None)
    def check(some: dict[str, Any], sound: dict[str, Any]) -> None:
        nonlocal num_understood
        keep = {key: value for key, value in some.items() if len(some) < 5 or key in sound}
        raw = {"architectures": [architecture], "num_hidden_layers": 3, **sound, **keep}
        num_understood += check_as_transformers(path, raw)

    check()
    assert num_understood > 30, "most were refused, so little was compared"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "'full_attention'"),
        ({"num_hidden_layers": 5000}, "at most 4096"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings 2147483648"),
    ],
)
def test_what_transformers_would_let_pass_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(write(tmp_path, {**LLAMA, **changes}))


def test_transformers_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from graphengine.model_config import load_model_config\n"
        f"load_model_config(Path({str(write(tmp_path, LLAMA))!r}))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_llama_8b_counts(tmp_path: Path) -> None:
    """The published 8,030,261,248 parameters of Llama 3.1 8B."""
    raw = {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    config = load_model_config(write(tmp_path, raw))
    assert config.num_parameters == 8_030_261_248
    assert config.kv_bytes_per_token(2) == 131072


def test_missing_directory() -> None:
    assert "no model directory 'nowhere/at/all'" in refusal(Path("nowhere/at/all"))


def test_missing_config(tmp_path: Path) -> None:
    assert f"no config.json in '{tmp_path}'" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json_names_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path, LLAMA)
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path)
    assert str(tmp_path / name) in message
    assert "must be a JSON object" in message


@pytest.mark.parametrize("names", [["GPT2LMHeadModel"], [], None, "LlamaForCausalLM", [{}]])
def test_unsupported_architecture_lists_what_is_supported(tmp_path: Path, names: object) -> None:
    message = refusal(write(tmp_path, {**LLAMA, "architectures": names}))
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        assert f"{name}ForCausalLM" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"compression_config": {"format": "int"}}, "compression_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type 'yarn'; supported:"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "RoPE type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "RoPE factor 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "RoPE factor '4'"),
        ({"rope_theta": None}, "RoPE theta None"),
        ({"rope_theta": math.nan}, "RoPE theta nan; it must be a finite number above 0"),
        ({"rope_parameters": {"rope_theta": math.inf}}, "RoPE theta inf"),
        ({"rope_theta": 10**400}, "RoPE theta 1000"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.inf}}, "RoPE factor inf"),
        *(
            ({"rope_scaling": {**OLD_LLAMA3, name: math.nan}}, f"RoPE {name} nan")
            for name in OLD_LLAMA3
            if name != "rope_type"
        ),
        # Finite numbers, with which every logit was NaN and every token 0.
        ({"rope_theta": 1e-300}, "RoPE theta 1e-300, whose angles at 512 positions float32"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e-300}}, "factor 1e-300, whose"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e-37}}, "factor 1e-37, whose"),
        (
            {"rope_scaling": dict.fromkeys(OLD_LLAMA3, 1e300) | ABSURD_LLAMA3},
            "low_freq_factor 1e-300, high_freq_factor 1e+300, original_max_position_embeddings",
        ),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps 1e+300"),
        ({"rms_norm_eps": 1.0}, "rms_norm_eps 1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_attention_heads": 0}, ""),
        ({"num_hidden_layers": -1}, ""),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "4 attention heads and 3 key/value heads"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"torch_dtype": 16}, "dtype 16"),
        ({"torch_dtype": ["bfloat16"]}, "dtype ['bfloat16']"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"rope_scaling": "linear"}, ""),
    ],
)
def test_what_is_unsupported_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    message = refusal(write(tmp_path, {**LLAMA, **changes}))
    assert str(tmp_path / "config.json") in message
    assert words in message


def rope_tables() -> Iterator[RopeConfig]:
    """Absurd and sound numbers, in every combination."""
    numbers = (1e-300, 1e-37, 1.0, 4.0, 8192.0, 1e38, 1e300)
    for theta, factor in itertools.product(numbers, numbers):
        yield RopeConfig("default", theta)
        yield RopeConfig("linear", theta, factor)
        for others in itertools.product(numbers, repeat=3):
            yield RopeConfig("llama3", theta, factor, *others)


def test_rope_is_refused_exactly_where_its_table_would_not_be_finite() -> None:
    verdicts = {True: 0, False: 0}
    for rope in rope_tables():
        table = rope_table(rope, head_dim=16, num_positions=513, device=torch.device("cpu"))
        is_finite = bool(table.isfinite().all())
        assert has_finite_angles(rope, head_dim=16, num_positions=512) == is_finite, rope
        verdicts[is_finite] += 1
    assert min(verdicts.values()) > 1000


def test_whole_numbers_that_torch_does_not_take_reach_it_as_floats(tmp_path: Path) -> None:
    rope = load_model_config(write(tmp_path, {**LLAMA, "rope_theta": 10**30})).rope
    table = rope_table(rope, head_dim=16, num_positions=9, device=torch.device("cpu"))
    assert bool(table.isfinite().all())


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"layer_types": ["full_attention"]},
        {"num_attention_heads": 0},
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": False},
    ],
)
def test_unsupported_qwen2_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert str(tmp_path / "config.json") in refusal(write(tmp_path, {**QWEN2, **changes}))


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name in ("configuration_evil", "modeling_evil"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(marker)!r}, 'w').close()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class Evil(LlamaConfig): pass\nclass EvilModel(LlamaForCausalLM): pass\n"
        )
    auto_map = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
    }
    raw = {**LLAMA, "auto_map": auto_map, "trust_remote_code": True}
    assert load_model_config(write(tmp_path, raw)).hidden_size == 64
    assert "supported" in refusal(write(tmp_path, {**raw, "architectures": ["EvilModel"]}))
    assert not marker.exists()


def test_module_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, graphengine.model_config, graphengine.hub\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_demo_and_directories_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # and nothing is fetched
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("demo").parts[-3:] == ("graphengine", "demo", "model")


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "a/b/c", "nowhere", "../a", "~/no"])
def test_a_local_path_that_is_missing_is_not_looked_up(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ModelError, match="give a model directory"):
        resolve_model(model)


@pytest.mark.parametrize("model", ["x" * 300, "~nosuchuser/x"])
def test_name_that_no_file_can_have_is_told_in_one_line(model: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be looked up \(.+\); give a model directory"):
        resolve_model(model)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is a file; give the directory"):
        resolve_model(str(file))


def test_hub_id_fetches_no_code_and_no_pickles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("Qwen/Qwen3-0.6B") == tmp_path
    assert asked["repo_id"] == "Qwen/Qwen3-0.6B"
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "pytorch_model.bin",
        "modeling_x.py",
        "consolidated.safetensors",
        "original/params.json",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == files[:4]


def test_failed_download_is_one_line() -> None:
    """conftest.py sets the hub offline, so this is the error of a machine without network."""
    with pytest.raises(ModelError, match="fetching it from the hub failed") as caught:
        resolve_model("graphengine-tests/no-such-model")
    assert "\n" not in str(caught.value)
