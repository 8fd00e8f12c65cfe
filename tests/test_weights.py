"""Do checkpoints load, and is each broken one refused by the name of what is wrong with it?"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import hf_config, write_checkpoint
from safetensors.torch import load_file, save_file
from test_models import empty_model, load_model
from torch import Tensor

from graphengine import weights
from graphengine.errors import ModelError, WeightsError
from graphengine.model_config import load_model_config
from graphengine.weights import check_weights, dummy_weights, load_weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Written once; tests break copies."""
    root = tmp_path_factory.mktemp("originals")
    return {
        "single": write_checkpoint(root / "single", "llama"),
        "sharded": write_checkpoint(root / "sharded", "llama", max_shard_size="60KB"),
        "tied": write_checkpoint(root / "tied", "llama_tied"),
    }


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(originals[name], tmp_path / name))

    return copied


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Edits the tensors of a single-file checkpoint."""
    tensors = load_file(path / SINGLE)
    edit(tensors)
    save_file(tensors, path / SINGLE)
    return path


def refusal(path: Path) -> str:
    """What the header check says; loading must say the same, and leave the parameters alone."""
    config = load_model_config(path)
    with pytest.raises(WeightsError) as caught:
        check_weights(path, config)
    model = empty_model(config)
    for parameter in model.parameters():
        parameter.fill_(7.0)
    with pytest.raises(WeightsError) as caught_again:
        load_weights(model, path, config)
    assert str(caught.value) == str(caught_again.value)
    assert all((parameter == 7.0).all() for parameter in model.parameters())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_tensor_lands_in_its_rows(originals: dict[str, Path]) -> None:
    stored = load_file(originals["single"] / SINGLE)
    model = load_model(originals["single"])
    ours = dict(model.named_parameters())
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    qkv = [stored[f"{attention}.{name}_proj.weight"] for name in "qkv"]
    gate_up = [stored[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(ours["layers.1.qkv_proj"], torch.cat(qkv))
    assert torch.equal(ours["layers.1.gate_up_proj"], torch.cat(gate_up))
    assert torch.equal(ours["layers.1.o_proj"], stored[f"{attention}.o_proj.weight"])
    assert torch.equal(ours["layers.1.down_proj"], stored[f"{mlp}.down_proj.weight"])
    assert torch.equal(ours["lm_head"], stored[HEAD])
    assert sum(p.numel() for p in ours.values()) == sum(t.numel() for t in stored.values())


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_pieces_and_threads_do_not_matter(
    originals: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of 16 KiB and more in pieces of 1000 bytes, by more threads than cores."""
    expected = load_model(originals[name]).state_dict()
    monkeypatch.setattr(weights, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(weights, "_CPU_THREADS", 7)
    actual = load_model(originals[name]).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_several_files_without_an_index_load(copy: Callable[[str], Path]) -> None:
    path = copy("sharded")
    expected = load_model(path).state_dict()
    (path / INDEX).unlink()
    actual = load_model(path).state_dict()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_the_makers_own_format_beside_ours_is_ignored(copy: Callable[[str], Path]) -> None:
    for name in ("single", "sharded"):
        path = copy(name)
        save_file({"tok_embeddings.weight": torch.zeros(1)}, path / "consolidated.safetensors")
        load_model(path)


def test_rotary_tables_in_the_checkpoint_are_ignored(copy: Callable[[str], Path]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_model(change(copy("single"), lambda tensors: tensors.update({name: torch.ones(8)})))


def test_tied_head_may_be_stored_too_or_alone(copy: Callable[[str], Path]) -> None:
    path = copy("tied")
    stored = load_file(path / SINGLE)[EMBEDDING]
    change(path, lambda tensors: tensors.update({HEAD: stored.clone()}))
    assert torch.equal(load_model(path).embed_tokens, stored)
    change(path, lambda tensors: tensors.pop(EMBEDDING))
    assert torch.equal(load_model(path).embed_tokens, stored)


@pytest.mark.parametrize("value", [torch.zeros(199, 64), torch.zeros(199, 64).half()])
def test_tied_head_with_other_values_is_refused(copy: Callable[[str], Path], value: Tensor) -> None:
    path = change(copy("tied"), lambda tensors: tensors.update({HEAD: value}))
    with pytest.raises(WeightsError, match='set "tie_word_embeddings" to false') as caught:
        load_model(path)
    assert HEAD in str(caught.value)


def test_missing_tensor_is_named_with_its_file_and_shape(copy: Callable[[str], Path]) -> None:
    path = change(copy("single"), lambda tensors: tensors.pop(Q_PROJ))
    message = refusal(path)
    assert message.startswith(f"{path / SINGLE}: tensor {Q_PROJ!r} is missing")
    assert "[64, 64]" in message


def test_missing_tensor_of_a_shard_is_named_with_the_indexs_file(
    copy: Callable[[str], Path],
) -> None:
    path = copy("sharded")
    shard = path / json.loads((path / INDEX).read_text())["weight_map"][Q_PROJ]
    tensors = load_file(shard)
    del tensors[Q_PROJ]
    save_file(tensors, shard)
    assert refusal(path).startswith(f"{shard}: tensor {Q_PROJ!r} is missing")


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x"]
)
def test_extra_tensor_is_named_with_its_file_and_shape(
    copy: Callable[[str], Path], name: str
) -> None:
    path = change(copy("single"), lambda tensors: tensors.update({name: torch.zeros(2, 3)}))
    message = refusal(path)
    assert message.startswith(f"{path / SINGLE}: tensor {name!r} of shape [2, 3] is unexpected")


@pytest.mark.parametrize("shape", [(64, 63), (32, 64), (64,), (64, 64, 1), (0,)])
def test_wrong_shape_is_named_with_both_shapes(
    copy: Callable[[str], Path], shape: tuple[int, ...]
) -> None:
    path = change(copy("single"), lambda tensors: tensors.update({Q_PROJ: torch.zeros(shape)}))
    message = refusal(path)
    assert message.startswith(f"{path / SINGLE}: tensor {Q_PROJ!r} has shape {list(shape)}, ")
    assert "config.json gives [64, 64]" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_dtypes_that_are_no_plain_floats_are_refused(
    copy: Callable[[str], Path], dtype: torch.dtype
) -> None:
    wrong = torch.zeros(64, 64).to(dtype)
    path = change(copy("single"), lambda tensors: tensors.update({Q_PROJ: wrong}))
    message = refusal(path)
    assert f"{path / SINGLE}: tensor {Q_PROJ!r} has dtype" in message
    assert "BF16, F16, F32, F64" in message


def test_tensor_in_two_files_is_refused(copy: Callable[[str], Path]) -> None:
    path = copy("sharded")
    (path / INDEX).unlink()
    first = sorted(path.glob("*.safetensors"))[0]
    shutil.copy(first, path / "zz.safetensors")
    assert f"is in {first.name} too" in refusal(path)


def truncate(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:num_bytes])


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


BREAKS: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: truncate(file, 0),
    "within the length": lambda file: truncate(file, 5),
    "within the header": lambda file: truncate(file, 300),
    "within the values": lambda file: truncate(file, file.stat().st_size - 1),
    "bytes at the end": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "huge header": lambda file: file.write_bytes(b"\xff" * 64),
    "not JSON": lambda file: file.write_bytes(header(b"{nonsense")),
    "a list": lambda file: file.write_bytes(header(b"[]")),
    "deep": lambda file: file.write_bytes(header(b"[" * 100_000)),
    "git-lfs pointer": lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec\n"),
    "size and shape differ": lambda file: file.write_bytes(
        header(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}') + b"\0" * 4
    ),
    "a gap": lambda file: file.write_bytes(
        header(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}') + b"\0" * 8
    ),
}


@pytest.mark.parametrize("name", ["single", "sharded"])
@pytest.mark.parametrize("how", BREAKS)
def test_truncated_or_corrupt_file_is_named(
    copy: Callable[[str], Path], name: str, how: str
) -> None:
    path = copy(name)
    file = sorted(path.glob("*.safetensors"))[-1]
    BREAKS[how](file)
    assert refusal(path).startswith(f"{file} is truncated or corrupt")


def test_file_cut_while_loading_is_refused(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map of the file would kill the process with SIGBUS."""
    path = copy("single")
    config = load_model_config(path)
    checked = check_weights(path, config)
    monkeypatch.setattr(weights, "check_weights", lambda *_: checked)
    truncate(path / SINGLE, 20_000)
    with pytest.raises(WeightsError, match=f"{SINGLE} ends before byte "):
        load_weights(empty_model(config), path, config)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unopened(copy: Callable[[str], Path], name: str) -> None:
    path = copy("single")
    (path / SINGLE).rename(path / name)
    message = refusal(path)
    assert name in message
    assert "convert them to safetensors" in message


def test_no_weights_at_all(copy: Callable[[str], Path]) -> None:
    path = copy("single")
    (path / SINGLE).unlink()
    assert f"{path} has no *.safetensors file" in refusal(path)


def test_index_naming_a_missing_shard(copy: Callable[[str], Path]) -> None:
    path = copy("sharded")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    message = refusal(path)
    assert f"{path / INDEX} names {shard.name!r}, which is not in" in message


def test_index_naming_a_shard_that_no_file_can_be(copy: Callable[[str], Path]) -> None:
    path = copy("sharded")
    name = "x" * 300 + ".safetensors"
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "complete the checkpoint" in refusal(path)


@pytest.mark.parametrize("kind", ["../x", "absolute", "sub/x", "../", "..", "x.bin", "", 5, None])
def test_index_may_not_name_files_elsewhere(
    copy: Callable[[str], Path], kind: str | int | None
) -> None:
    path = copy("sharded")
    (path / "sub").mkdir()
    target = path / INDEX
    raw = json.loads(target.read_text())
    shard = path / raw["weight_map"][Q_PROJ]
    outside = {"../x": path.parent, "absolute": path.parent, "sub/x": path / "sub"}
    if kind in outside:
        moved = shutil.move(shard, outside[str(kind)] / "x.safetensors")
        name: Any = str(moved) if kind == "absolute" else f"{kind}.safetensors"
    else:
        name = kind
    for tensor, file in raw["weight_map"].items():
        if file == shard.name:
            raw["weight_map"][tensor] = name
    target.write_text(json.dumps(raw))
    message = refusal(path)
    assert str(target) in message
    assert "in the same directory" in message or "not an index of shards" in message


@pytest.mark.parametrize("letter", ["\0", "\n"])
def test_odd_letters_in_a_shards_name_stay_on_one_line(
    copy: Callable[[str], Path], letter: str
) -> None:
    path = copy("sharded")
    name = f"x{letter}y.safetensors"
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"names {name!r}, which is not in" in refusal(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}', "[" * 100_000, "\xff"])
def test_broken_index_is_named(copy: Callable[[str], Path], text: str) -> None:
    path = copy("sharded")
    (path / INDEX).write_bytes(text.encode("latin-1"))
    assert refusal(path).startswith(f"{path / INDEX} is not an index of shards")


def test_quantized_config_is_refused(copy: Callable[[str], Path]) -> None:
    path = copy("single")
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8"}
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="quantization_config, which is not supported"):
        load_model_config(path)


def test_symbolic_links_as_in_the_hubs_cache_are_followed(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    for file in originals["sharded"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    load_model(tmp_path)


def memory_bytes(key: str) -> int:
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_peak_stays_under_the_largest_shard(tmp_path: Path) -> None:
    """On the CPU the parameters count too, so they are touched first. Buffers take half a shard."""
    hf = hf_config("llama", vocab_size=8192, hidden_size=1024, architectures=["LlamaForCausalLM"])
    hf.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(hf).state_dict()
    shards: dict[str, dict[str, Tensor]] = {EMBEDDING: {}, HEAD: {}, "rest": {}}
    for name, tensor in shapes.items():
        shards[name if name in shards else "rest"][name] = torch.full(tensor.shape, 2.0)
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    del shards, tensors
    largest = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert largest > 32e6
    config = load_model_config(tmp_path)
    model = empty_model(config)
    for parameter in model.parameters():
        parameter.fill_(1.0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory_bytes("VmRSS")
    load_weights(model, tmp_path, config)
    assert memory_bytes("VmHWM") - before < largest
    assert all((parameter == 2.0).all() for parameter in model.parameters())


def test_dummy_weights_are_seeded_by_name_not_by_order(originals: dict[str, Path]) -> None:
    config = load_model_config(originals["single"])
    first, second, third = (empty_model(config) for _ in range(3))
    dummy_weights(first, seed=3)
    before = first.state_dict()
    # Another order of parameters: those of a module come before its children's.
    second.layers = torch.nn.ModuleList(second.layers)
    second.embed_tokens = second._parameters.pop("embed_tokens")
    dummy_weights(second, seed=3)
    after = second.state_dict()
    assert list(before) != list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    dummy_weights(third, seed=4)
    assert not torch.equal(third.lm_head, first.lm_head)


def test_dummy_weights_are_small_and_finite_and_differ(originals: dict[str, Path]) -> None:
    model = empty_model(load_model_config(originals["single"]), dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    dummy_weights(model, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm"):
            assert (parameter == 1.0).all()
        else:
            assert 0.015 < parameter.float().std() < 0.025
            assert parameter.abs().max() < 0.2
    assert not torch.equal(model.lm_head, model.embed_tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece_bytes", [1000, 8 << 20])
def test_cuda_gets_the_same_values(
    originals: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    piece_bytes: int,
    dtype: torch.dtype,
) -> None:
    """Small pieces reuse each staging buffer hundreds of times."""
    monkeypatch.setattr(weights, "_PIECE_BYTES", piece_bytes)
    expected = load_model(originals["sharded"], dtype=dtype).state_dict()
    config = load_model_config(originals["sharded"])
    model = empty_model(config, dtype=dtype, device=torch.device("cuda"))
    load_weights(model, originals["sharded"], config)
    for name, value in model.state_dict().items():
        assert value.is_cuda
        assert torch.equal(value.cpu(), expected[name])
