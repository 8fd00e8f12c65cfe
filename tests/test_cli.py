"""Does the command line hand over what it was given, and report what came back?

A fake engine stands in, so that options, output and exit codes are tested apart from any model;
`test_cli_engine.py` has the real one.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TextIO

import pytest
from typer.testing import CliRunner, Result

import cli
import graphengine
from cli import app
from graphengine.config import EngineConfig
from graphengine.errors import ModelError
from graphengine.metrics import EngineStats
from graphengine.request import (
    CompletionOutput,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
)


class FakeLLM:
    """Answers "<prompt>" two requests at a time, the later one first. A prompt with "bad" fails,
    one with "stop" raises what a Ctrl-C raises, and one with "term" sends a SIGTERM."""

    made: ClassVar[list[FakeLLM]] = []
    error: ClassVar[Exception | None] = None

    def __init__(self, **options: Any) -> None:
        if FakeLLM.error is not None:
            raise FakeLLM.error
        self.config = EngineConfig(**options)
        self.finished: list[RequestOutput] = []
        self.is_closed = False
        FakeLLM.made.append(self)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.is_closed = True

    def stream(
        self, requests: Iterable[Request], sampling_params: SamplingParams
    ) -> Iterator[RequestOutput]:
        self.sampling_params = sampling_params
        held: list[RequestOutput] = []
        for index, request in enumerate(requests):
            prompt = request.prompt
            text = prompt if isinstance(prompt, str) else str(prompt.get("prompt", "chat"))
            if "stop" in text:
                yield from self._finish(held[::-1])
                raise KeyboardInterrupt
            if "term" in text:
                yield from self._finish(held[::-1])
                signal.raise_signal(signal.SIGTERM)
            held.append(answer(index, request.request_id, text))
            if len(held) == 2:
                yield from self._finish(held[::-1])
                held = []
        yield from self._finish(held)

    def _finish(self, outputs: list[RequestOutput]) -> Iterator[RequestOutput]:
        for output in outputs:
            self.finished.append(output)
            yield output

    def stats(self) -> EngineStats:
        values: dict[str, Any] = dict.fromkeys(EngineStats.__slots__, 0)
        return EngineStats(
            **values
            | {
                "num_finished": len(self.finished),
                "num_failed": sum(bool(output.error) for output in self.finished),
                "elapsed_s": 2.0,
            }
        )


def answer(index: int, request_id: str | None, prompt: str) -> RequestOutput:
    is_bad = "bad" in prompt
    completion = CompletionOutput(
        0,
        "" if is_bad else f"<{prompt}>",
        [] if is_bad else [9, 2],
        FinishReason.ERROR if is_bad else FinishReason.STOP,
    )
    error = "prompt is bad; give a good one" if is_bad else ""
    return RequestOutput(
        request_id or str(index), index, prompt, [1, 5, 6], [completion], error=error
    )


@pytest.fixture(autouse=True)
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    monkeypatch.setattr(graphengine, "LLM", FakeLLM, raising=False)
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "error", None)
    return FakeLLM


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["generate", "demo", *arguments])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_texts_of_arguments_are_printed_in_order() -> None:
    result = run("one", "two", "three")
    assert result.exit_code == 0
    assert result.stdout == "<one>\n<two>\n<three>\n"
    assert "3 requests: 0 prompt and 0 output tokens in 2.00 s" in result.stderr
    assert FakeLLM.made[0].is_closed


def test_file_and_standard_input_give_the_same(
    tmp_path: Path, give_stdin: Callable[[str], None]
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("one\ntwo\n")
    assert run("--input", str(path)).stdout == "<one>\n<two>\n"
    give_stdin("one\ntwo\n")
    assert run("--input", "-").stdout == "<one>\n<two>\n"


def test_output_file_has_a_record_per_request_in_order(tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(
        '{"prompt": "a\\nb", "id": "x"}\n{"prompt": "bad"}\n'
        '{"messages": [{"role": "user", "content": "hi"}], "id": 9}\n'
    )
    result = run("--input", str(path), "--output", str(out))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert [line["id"] for line in records(out)] == ["x", "1", "9"]
    assert records(out)[0] == {
        "id": "x",
        "prompt": "a\nb",
        "text": "<a\nb>",
        "token_ids": [9, 2],
        "finish_reason": "stop",
        "stop_reason": None,
        "num_prompt_tokens": 3,
        "num_output_tokens": 2,
        "error": None,
    }
    assert records(out)[1]["error"] == "prompt is bad; give a good one"
    assert "error: request 1: prompt is bad; give a good one" in result.stderr
    assert "3 requests (1 failed)" in result.stderr


def test_output_dash_is_jsonl_on_standard_output() -> None:
    result = run("one", "--output", "-")
    assert json.loads(result.stdout)["text"] == "<one>"


def test_exit_code_is_2_if_every_request_failed() -> None:
    assert run("bad one").exit_code == 2
    assert run("bad one", "good").exit_code == 1


def test_options_reach_the_engine_by_their_names() -> None:
    options = {
        "tokenizer": "elsewhere",
        "dtype": "bfloat16",
        "device": "cpu",
        "attention": "reference",
        "load_format": "dummy",
        "max_model_len": 99,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 33,
        "block_size": 16,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory_bytes": 12345,
        "seed": 3,
    }
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert run("x", *arguments, "--no-graphs", "--no-overlap").exit_code == 0
    expected = EngineConfig(
        model="demo",
        enforce_eager=True,
        async_scheduling=False,
        **options,  # type: ignore[arg-type]
    )
    assert FakeLLM.made[0].config == expected


def test_sampling_options_reach_the_request_by_their_names() -> None:
    arguments = (
        "--max-tokens=9 --min-tokens=2 --temperature=0.7 --top-p=0.9 --top-k=5 --min-p=0.1 "
        "--stop=a --stop=b,c --stop-token-ids=4,5 --stop-token-ids=6 --ignore-eos "
        "--no-skip-special-tokens"
    )
    assert run("x", *arguments.split()).exit_code == 0
    assert FakeLLM.made[0].sampling_params == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        stop=("a", "b,c"),
        stop_token_ids=(4, 5, 6),
        ignore_eos=True,
        skip_special_tokens=False,
    )


def test_defaults_are_the_engine_s_and_greedy() -> None:
    assert run("x").exit_code == 0
    assert FakeLLM.made[0].config == EngineConfig("demo")
    assert FakeLLM.made[0].sampling_params == SamplingParams(temperature=0.0, max_tokens=256)


BAD_USAGE = {
    "no prompt": ([], "give prompts as arguments or --input FILE"),
    "both": (["x", "--input", "f"], "give prompts as arguments or --input FILE"),
    "unknown option": (["x", "--nonsense"], "No such option: --nonsense"),
    "not a number": (["x", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
    "temperature": (["x", "--temperature=-1"], "temperature is -1.0; give a number in [0, 1e+06]"),
    "hot": (["x", "--temperature=1e39"], "temperature is 1e+39; give a number in [0, 1e+06]"),
    "nan": (["x", "--temperature=nan"], "temperature is nan"),
    "top_p": (["x", "--top-p=0"], "top_p is 0.0"),
    "top_k": (["x", "--top-k=-2"], "top_k is -2"),
    "min_p": (["x", "--min-p=1.5"], "min_p is 1.5"),
    "max_tokens": (["x", "--max-tokens=0"], "max_tokens is 0"),
    "min_tokens": (["x", "--max-tokens=4", "--min-tokens=5"], "above max_tokens 4"),
    "empty stop": (["x", "--stop="], "stop holds an empty string"),
    "negative stop id": (
        ["x", "--stop-token-ids=5,-1"],
        "--stop-token-ids is '5,-1'; give whole numbers from 0 on",
    ),
    "stop ids": (["x", "--stop-token-ids=1;2"], "--stop-token-ids is '1;2'; give whole numbers"),
    "dtype": (["x", "--dtype=int8"], "choose one of auto, float32"),
    "device": (["x", "--device=tpu"], "choose one of auto, cpu, cuda"),
    "max_model_len": (["x", "--max-model-len=1"], "max_model_len is 1"),
    "max_num_seqs": (["x", "--max-num-seqs=0"], "max_num_seqs is 0"),
    "too many sequences": (["x", "--max-num-seqs=200000"], "give a whole number <= 4096"),
    "empty tokenizer": (["x", "--tokenizer="], "tokenizer is ''; give a directory or a hub id"),
    "memory share": (["x", "--gpu-memory-utilization=1.5"], "give a share in (0, 1]"),
    "seed": (["x", "--seed=-1"], "seed is -1"),
    "empty prompt": (["x", ""], "prompt 2 is empty"),
    "bytes as prompt": (
        ["x", os.fsdecode(b"a\xff")],
        "prompt 2 holds half of a surrogate pair (\\udcff), on a command line the byte 0xff",
    ),
    "bytes as stop": (["x", "--stop", os.fsdecode(b"\xfe")], "the byte 0xfe that is not UTF-8"),
    "missing input": (["--input", "/none/in.txt"], "/none/in.txt: No such file or directory"),
    "directory as input": (["--input", "/"], "/: Is a directory"),
    "long output name": (["x", "--output", "n" * 300], "File name too long; give another name"),
    "output nowhere": (["x", "--output", "/none/out"], "no directory /none"),
}


@pytest.mark.parametrize(("arguments", "what"), BAD_USAGE.values(), ids=BAD_USAGE)
def test_bad_usage_is_one_line_and_starts_no_engine(arguments: list[str], what: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert what in result.stderr
    last = result.stderr.rstrip().splitlines()[-1]
    assert last.lower().startswith("error: ")
    assert not FakeLLM.made


def test_broken_line_of_a_file_starts_no_engine(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": \n')
    result = run("--input", str(path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}:2: broken JSON")
    assert not FakeLLM.made


def test_broken_line_of_standard_input_ends_after_what_came_before(
    give_stdin: Callable[[str], None],
) -> None:
    give_stdin("one\ntwo\nthree\n\nfive\n")
    result = run("--input", "-")
    assert result.exit_code == 2
    assert result.stdout == "<one>\n<two>\n<three>\n"
    assert result.stderr.splitlines()[-1].startswith("error: <stdin>:4: empty line")


def test_engine_error_is_one_line_and_leaves_an_old_output_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    FakeLLM.error = ModelError("demo has no config.json; give a checkpoint directory")
    result = run("x", "--output", str(out))
    assert result.exit_code == 2
    assert result.stderr == "error: demo has no config.json; give a checkpoint directory\n"
    assert out.read_text() == "old"


def test_bug_keeps_its_traceback() -> None:
    FakeLLM.error = RuntimeError("a bug")
    assert isinstance(run("x").exception, RuntimeError)


def test_interrupt_keeps_what_was_finished(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = run("one", "two", "three", "stop", "five", "--output", str(out))
    assert result.exit_code == 130
    assert [line["text"] for line in records(out)] == ["<one>", "<two>", "<three>"]
    assert result.stderr.startswith("3 requests: ")
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert FakeLLM.made[0].is_closed


def test_sigterm_keeps_what_was_finished(tmp_path: Path) -> None:
    """It had ended the process at once, and with it what was finished but not at its turn."""
    out = tmp_path / "out.jsonl"
    result = run("one", "two", "three", "term", "five", "--output", str(out))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert result.exit_code == 143
    assert [line["text"] for line in records(out)] == ["<one>", "<two>", "<three>"]
    assert result.stderr.splitlines()[-1] == "terminated"
    assert FakeLLM.made[0].is_closed


def test_sigterm_that_is_ignored_stays_so(tmp_path: Path) -> None:
    earlier = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        result = run("one", "term", "three", "--output", str(tmp_path / "out.jsonl"))
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert result.exit_code == 0
    assert "<three>" in [line["text"] for line in records(tmp_path / "out.jsonl")]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--trace", "in.txt"], "--trace in.txt is the input file"),
        (["--trace", "link.txt"], "--trace link.txt is the input file"),
        (["--output", "link.txt"], "--output link.txt is the input file"),
        (["--output", "o", "--trace", "o"], "--trace o is the file of --output o"),
        (["--output", "o", "--trace", "./o"], "--trace ./o is the file of --output o"),
        (["--trace", "-"], "--trace is -; give a file"),
        (["--trace", "none/t.json"], "--trace none/t.json: no directory none; make it first"),
    ],
)
def test_file_that_would_take_the_place_of_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], what: str
) -> None:
    """`--trace` was not looked at, and a hard link to the input was another file."""
    monkeypatch.chdir(tmp_path)
    path = Path("in.txt")
    path.write_text("one\n")
    Path("link.txt").hardlink_to(path)
    result = run("--input", str(path), *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {what}")
    assert path.read_text() == "one\n"
    assert not FakeLLM.made
    assert sorted(os.listdir()) == ["in.txt", "link.txt"]


def test_file_that_is_standard_input_or_output_is_refused(
    tmp_path: Path, give_stdin: Callable[[str | int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("one\n")
    with path.open() as file:
        give_stdin(file.fileno())
        result = run("--input", "-", "--output", str(path))
    assert result.exit_code == 2
    assert f"--output {path} is the input file" in result.stderr
    assert path.read_text() == "one\n"
    with path.open("a") as file:
        monkeypatch.setattr("graphengine.output_file.STDOUT_FILENO", file.fileno())
        result = run("x", "--trace", str(path))
    assert result.exit_code == 2
    assert f"--trace {path} is the file of standard output" in result.stderr
    assert not FakeLLM.made


def test_output_and_trace_may_both_go_nowhere() -> None:
    assert run("x", "--output", "/dev/null", "--trace", "/dev/null").exit_code == 0


def test_full_disk_is_one_line() -> None:
    result = run("one", "--output", "/dev/full")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: /dev/full: No space left on device")


def run_main(monkeypatch: pytest.MonkeyPatch, stdout: TextIO, *arguments: str) -> int | str | None:
    """The exit code of the whole program, with another standard output."""
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["graphengine", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.mark.parametrize("options", [[], ["--output", "-"]], ids=["text", "jsonl"])
def test_full_standard_output_is_one_line_and_nothing_is_left_for_the_exit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with open("/dev/full", "w") as full:  # closing it would raise if text were left, as exit does
        assert run_main(monkeypatch, full, "generate", "demo", "one", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: standard output: No space left on device")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]])
def test_help_that_a_full_standard_output_does_not_take_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with open("/dev/full", "w") as full:
        assert run_main(monkeypatch, full, *arguments) == 2
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


def test_character_that_standard_output_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    stdout = io.TextIOWrapper(file, "ascii")
    assert run_main(monkeypatch, stdout, "generate", "demo", "Grüße", "two") == 0
    assert file.getvalue() == b"<Gr??e>\n<two>\n"


def test_error_obeys_no_escape_sequence() -> None:
    FakeLLM.error = ModelError("config.json names \x1b]0;pwned\x07\nfake line")
    assert run("x").stderr == "error: config.json names \ufffd]0;pwned\ufffd fake line\n"


@pytest.mark.parametrize("gib", ["nan", "inf", "-1", "0", "1e-12", "1e300"])
def test_plan_for_no_possible_gpu_is_one_line(gib: str) -> None:
    result = CliRunner().invoke(app, ["plan", "demo", f"--gpu-memory-gib={gib}"])
    assert result.exit_code == 2
    assert result.stdout == ""
    message = f"error: --gpu-memory-gib is {float(gib):g}; give a number above 0, at most 1,048,576"
    assert result.stderr == message + "\n"


def test_help_names_every_option_in_full() -> None:
    result = CliRunner().invoke(app, ["generate", "--help"])
    assert result.exit_code == 0
    for name in (
        "--max-num-batched-tokens",
        "--gpu-memory-utilization",
        "--no-skip-special-tokens",
    ):
        assert name in result.stdout
