"""What happens at the limits? Absurd sizes and rows that would once have ended a whole run."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from graphengine import LLM, EngineConfig, Request, SamplingParams
from graphengine.demo.sums import answer, prompt
from graphengine.errors import CapacityError, ConfigError, ModelError, RequestError
from graphengine.hub import resolve_model
from graphengine.plan import plan

DEMO = resolve_model("demo")
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def demo_copy(path: Path, **changes: Any) -> Path:
    shutil.copytree(DEMO, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def test_chat_token_outside_the_vocabulary_fails_that_request_alone(tmp_path: Path) -> None:
    path = demo_copy(tmp_path / "model")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    added = dict(tokenizer["added_tokens"][0], id=16, content="<|turn|>", special=True)
    tokenizer["added_tokens"].append(added)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "chat_template.jinja").write_text("<|turn|>{{ messages[0]['content'] }}")
    chat = {"messages": [{"role": "user", "content": "1+1="}]}
    with LLM(str(path), max_num_seqs=2) as llm:
        refused, served = llm.generate([chat, prompt(12, 34)], GREEDY)
    assert "holds 16" in refused.error
    assert served.outputs[0].text == answer(12, 34)


def test_largest_counts_of_sampling_params_are_taken() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, min_tokens=2**31 - 1)
    with LLM("demo", max_num_seqs=1) as llm:
        (output,) = llm.generate(prompt(1, 2), params)
    assert len(output.outputs[0].token_ids) == llm.max_model_len - len(output.prompt_token_ids)


def test_refusals_are_heard_of_before_the_whole_list_is_read() -> None:
    read = itertools.count()

    class Refused(list[str]):
        def __iter__(self) -> Any:
            for item in super().__iter__():
                next(read)
                yield item

    with LLM("demo", max_num_seqs=4) as llm:
        stream = llm.stream(Refused(["1" * 100 + "+"] * 500), GREEDY)
        assert "max_model_len" in next(stream).error
        assert next(read) < 50
        stream.close()


def test_memory_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CapacityError, match=r"kv_cache_memory_bytes") as caught:
        LLM("demo", kv_cache_memory_bytes=10**15)
    assert "\n" not in str(caught.value)


def test_block_longer_than_any_sequence_is_told_first() -> None:
    with pytest.raises(CapacityError, match=r"holds 0; lower block_size or raise kv_cache_memory"):
        plan(EngineConfig(str(DEMO), device="cpu", block_size=10**9))


@pytest.mark.parametrize(("block_size", "is_named"), [(16, False), (64, False), (65, True)])
def test_block_size_is_named_only_where_a_block_is_longer_than_a_sequence(
    block_size: int, *, is_named: bool
) -> None:
    options: dict[str, Any] = {"max_model_len": 64, "kv_cache_memory_bytes": 1}
    with pytest.raises(CapacityError, match="holds 0; ") as caught:
        plan(EngineConfig(str(DEMO), device="cpu", block_size=block_size, **options))
    _, _, remedy = str(caught.value).partition("holds 0; ")
    expected = "lower block_size or raise kv_cache_memory_bytes"
    assert remedy == (expected if is_named else "raise kv_cache_memory_bytes")


def test_too_little_memory_is_known_before_the_weights_are_read(tmp_path: Path) -> None:
    path = demo_copy(tmp_path / "model", max_position_embeddings=2**31 - 1)
    (path / "model.safetensors").unlink()
    with pytest.raises(CapacityError, match="needs 134217728 KV blocks of 16 tokens"):
        LLM(str(path))


@pytest.mark.parametrize("num_layers", [4097, 2**31 - 1])
def test_absurd_number_of_layers_is_refused(tmp_path: Path, num_layers: int) -> None:
    path = demo_copy(tmp_path / "model", num_hidden_layers=num_layers)
    with pytest.raises(ModelError, match=f"num_hidden_layers {num_layers}"):
        plan(EngineConfig(str(path)))


@pytest.mark.parametrize(
    ("fetch", "has_weights"),
    [
        (lambda: plan(EngineConfig("some/model")), False),
        (lambda: LLM("some/model", load_format="dummy"), False),
        (lambda: LLM("some/model"), True),
    ],
)
def test_weights_are_downloaded_only_to_be_loaded(
    monkeypatch: pytest.MonkeyPatch, fetch: Any, has_weights: bool
) -> None:
    asked: list[str] = []

    def snapshot_download(_: str, *, allow_patterns: list[str], **__: object) -> str:
        asked.extend(allow_patterns)
        return str(DEMO)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fetch()
    assert ("*.safetensors" in asked) is has_weights


def test_eos_outside_the_vocabulary_is_the_models_fault(tmp_path: Path) -> None:
    path = demo_copy(tmp_path / "model", eos_token_id=99)
    with pytest.raises(ModelError, match=r"eos_token_id 99; the vocabulary is 0\.\.15"):
        LLM(str(path))


def test_planned_flash_attention_must_be_possible() -> None:
    for options in ({"block_size": 16}, {"dtype": "float32"}):
        with pytest.raises(ConfigError, match="flash"):
            plan(EngineConfig("demo", **options), gpu_memory_bytes=80 << 30)
    assert plan(EngineConfig("demo"), gpu_memory_bytes=80 << 30).block_size == 256


def test_requests_and_lists_of_parameters_go_together() -> None:
    with LLM("demo", max_num_seqs=2) as llm:
        (alone,) = llm.generate(Request(prompt(1, 2), GREEDY, "mine"))
        assert (alone.request_id, alone.outputs[0].text) == ("mine", "3")
        pair = llm.generate([Request(prompt(3, 4)), prompt(5, 6)], [GREEDY, GREEDY])
        assert [output.outputs[0].text for output in pair] == ["7", "11"]
        for wrong in ({"temperature": 0}, "greedy"):
            with pytest.raises(RequestError, match="sampling_params"):
                llm.generate(["1+1="], wrong)  # type: ignore[arg-type]
        refused, served = llm.stream([Request("1+1=", {"top_k": 1}), Request("2+2=", GREEDY)])  # type: ignore[arg-type]
        assert "sampling_params" in refused.error
        assert served.outputs[0].text == "4"
