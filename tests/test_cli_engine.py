"""Does the command line do the job with the real engine, and name what a user got wrong?"""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import graphengine
from cli import app
from graphengine.demo.sums import answer, heldout_pairs, prompt

ROOT = Path(__file__).parents[1]
DEMO = Path(graphengine.__file__).parent / "demo"
WEIGHTS = "model.safetensors"
ON_CPU = ("--device", "cpu", "--dtype", "float32")


def generate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["generate", *arguments, *ON_CPU])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be spoilt."""
    return shutil.copytree(DEMO / "model", tmp_path / "model")


def test_shipped_prompts_are_answered_right() -> None:
    result = generate("demo", "--input", str(DEMO / "prompts.txt"), "--output", "-")
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    pairs = heldout_pairs()[: len(lines)]
    assert [line["prompt"] for line in lines] == [prompt(a, b) for a, b in pairs]
    num_right = sum(line["text"] == answer(a, b) for line, (a, b) in zip(lines, pairs, strict=True))
    # 99.5 % of unseen sums are right; one wrong in 64 leaves room, two would be no accident.
    assert num_right >= len(lines) - 1 > 0
    assert f"{len(lines)} requests: " in result.stderr


def test_each_kind_of_prompt_gives_the_same_text(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    entries: list[dict[str, Any]] = [
        {"prompt": "12+34="},
        {"messages": [{"role": "user", "content": "12+34="}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "12+34="}]}]},
        {"prompt_token_ids": [1, 5, 6, 14, 7, 8, 15]},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    result = generate("demo", "--input", str(path))
    assert result.stdout == "46\n46\n46\n46\n"


@pytest.mark.parametrize("switch", ["--no-graphs", "--no-overlap"])
def test_switches_change_no_token(switch: str) -> None:
    result = generate("demo", "12+34=", "999+999=", switch)
    assert result.stdout == "46\n1998\n"


def test_sampling_depends_on_the_seed_alone() -> None:
    def sampled(seed: int, *more: str) -> str:
        options = ["--temperature=3", "--ignore-eos", "--max-tokens=12", f"--seed={seed}", *more]
        result = generate("demo", *["12+34="] * 4, *options)
        assert result.exit_code == 0
        return result.stdout

    assert sampled(1) == sampled(1, "--max-num-seqs=1")
    assert sampled(1) != sampled(2)
    assert len(set(sampled(1).splitlines())) > 1  # the same prompt four times


def test_refused_request_leaves_the_others_alone(tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    entries: list[dict[str, Any]] = [
        {"prompt": "12+34="},
        {"prompt": "1" * 70},
        {"prompt_token_ids": [1, 16]},
        {"prompt": "1+1="},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    result = generate("demo", "--input", str(path), "--output", str(out))
    assert result.exit_code == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["text"] for line in lines] == ["46", "", "", "2"]
    assert [line["finish_reason"] for line in lines] == ["stop", "error", "error", "stop"]
    assert "71 tokens, max_model_len is 64" in lines[1]["error"]
    assert "holds 16; the vocabulary is 0..15" in lines[2]["error"]


def change_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def cut_weights(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[: len(data) // 2])


def pickle_weights(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def drop_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    (model.parent / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "1+1="}]}')


NORM = "model.norm.weight"
# What is done to the model, the arguments after it, and what the error names.
BAD_MODELS: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "missing directory": (shutil.rmtree, ["x"], ["no directory"]),
    "no config": (lambda m: (m / "config.json").unlink(), ["x"], ["config.json"]),
    "broken config": (lambda m: (m / "config.json").write_text("{"), ["x"], ["config.json"]),
    "architecture": (
        lambda m: change_config(m, architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        ["x"],
        ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"],
    ),
    "missing tensor": (
        lambda m: change_weights(m, lambda tensors: tensors.pop(NORM)),
        ["x"],
        [NORM],
    ),
    "extra tensor": (
        lambda m: change_weights(m, lambda tensors: tensors.update(extra=torch.zeros(2))),
        ["x"],
        ["extra", WEIGHTS],
    ),
    "wrong shape": (
        lambda m: change_weights(m, lambda tensors: tensors.update({NORM: torch.zeros(5)})),
        ["x"],
        [NORM, WEIGHTS, "5", "128"],
    ),
    "truncated": (cut_weights, ["x"], [WEIGHTS]),
    "corrupt": (lambda m: (m / WEIGHTS).write_bytes(b"\xff" * 4096), ["x"], [WEIGHTS]),
    "bin only": (pickle_weights, ["x"], ["safetensors", "pytorch_model.bin"]),
    "no weights": (lambda m: (m / WEIGHTS).unlink(), ["x"], ["safetensors"]),
    "prompt too long": (lambda m: None, ["1" * 70], ["71 tokens", "max_model_len is 64"]),
    "model len": (lambda m: None, ["x", "--max-model-len=65"], ["65", "64 positions"]),
    "little memory": (lambda m: None, ["x", "--kv-cache-memory-bytes=65536"], ["blocks"]),
    "no template": (drop_template, ["--input", "IN"], ["template"]),
    "stop id": (lambda m: None, ["x", "--stop-token-ids=16"], ["16", "0..15"]),
}


@pytest.mark.parametrize(("spoil", "arguments", "named"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_model_or_request_is_one_line(
    model: Path, spoil: Callable[[Path], object], arguments: list[str], named: list[str]
) -> None:
    spoil(model)
    path = str(model.parent / "in.jsonl")
    result = generate(str(model), *[path if a == "IN" else a for a in arguments])
    assert result.exit_code == 2, (result.stderr, result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(name in errors[0] for name in named), errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error() -> None:
    result = CliRunner().invoke(app, ["generate", "demo", "x", "--device", "cuda"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: device is cuda, but")


def test_flash_attention_on_the_cpu_is_an_error() -> None:
    result = generate("demo", "x", "--attention", "flash")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_plan_names_what_fits_and_loads_no_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()
    result = CliRunner().invoke(app, ["plan", str(model), "--max-num-seqs", "32", *ON_CPU])
    assert result.exit_code == 0, result.stderr
    assert "LlamaForCausalLM, 595,072 parameters" in result.stdout
    assert "KV cache" in result.stdout
    assert "32 of 64 tokens" in result.stdout
    nothing = CliRunner().invoke(app, ["plan", str(model.parent / "none")])
    assert nothing.exit_code == 2
    assert nothing.stderr.startswith("error: no directory")


COMMAND = [sys.executable, "-m", "cli", "generate", "demo", *ON_CPU]


def test_interrupt_while_standard_input_is_open_stops_cleanly() -> None:
    with subprocess.Popen(
        [*COMMAND, "--input", "-"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job, and all under it, begin with it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"12+34=\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"46\n"  # not held until the input ends
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        lines = process.stderr.read().decode().splitlines()
    assert lines[0].startswith("1 request: 7 prompt and 3 output tokens")
    assert lines[-1] == "interrupted"


def test_interrupt_as_python_takes_leave_changes_no_exit_code() -> None:
    """All was printed, and the process died of the signal."""
    code = (
        "import signal, sys, cli\n"
        # As late as anything of Python's runs: what it makes of a signal is given up by then.
        "class Last:\n    pass\n"
        "sys.last = Last()\n"
        "Last.__del__ = lambda self, send=signal.raise_signal, number=2: send(number)\n"
        "sys.argv = ['graphengine', 'plan', 'demo', '--device=cpu']\ncli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("closed", "arguments", "code", "last"),
    [
        ([1], ["generate", "demo", "1+1="], 2, "error: standard output is closed"),
        ([1], ["generate", "demo", "1+1=", "--output=OUT"], 0, "prefill steps"),
        ([2], ["generate", "demo", "1+1=", "--output=OUT"], 0, ""),
        ([0, 1, 2], ["generate", "demo", "1+1="], 2, ""),
        ([0], ["generate", "demo", "--input=-"], 2, "error: <stdin>: Bad file descriptor"),
        ([1], ["plan", "demo"], 2, "error: standard output is closed"),
        ([1], ["run", "demo", "IN", "--output=OUT"], 2, "error: standard output is closed"),
        ([0, 2], ["run", "demo", "IN", "--output=OUT"], 0, ""),
        ([1], ["generate", "--help"], 2, "error: standard output: Bad file descriptor"),
    ],
)
def test_closed_stream_is_an_error_only_where_it_is_used(
    tmp_path: Path, closed: list[int], arguments: list[str], code: int, last: str
) -> None:
    """Python has None for it, and the next file to be opened its number: once a traceback."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "1+1="}\n')
    arguments = [a.replace("IN", str(source)).replace("OUT", str(out)) for a in arguments]

    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    done = subprocess.run(
        [sys.executable, "-m", "cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=close,
    )
    assert done.returncode == code, done.stderr
    assert (done.stderr.splitlines() or [""])[-1].startswith(last)
    assert "Traceback" not in done.stderr
    if f"--output={out}" in arguments:
        (line,) = out.read_text().splitlines()
        assert json.loads(line)["text"] == "2"


def test_reader_that_goes_away_ends_the_run_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("12+34=\n" * 3000)
    read_end, write_end = os.pipe()
    with subprocess.Popen(
        [*COMMAND, "--input", str(path)], cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE
    ) as process:
        os.close(write_end)
        assert os.read(read_end, 3) == b"46\n"
        os.close(read_end)
        assert process.wait(timeout=60) == 1
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def test_terminal_shows_prompts_texts_and_a_bar() -> None:
    terminal, child_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    del environment["TRANSFORMERS_VERBOSITY"]
    with subprocess.Popen(
        [*COMMAND, "12+34=", "999+1=", "1" * 70],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=child_end,
        stderr=child_end,
    ) as process:
        os.close(child_end)
        shown = b""
        try:
            while data := os.read(terminal, 65536):
                shown += data
        except OSError:  # Linux reports a closed terminal so
            pass
    os.close(terminal)
    text = shown.decode()
    assert process.returncode == 1
    assert "12+34= -> \x1b[0m46" in text
    assert "999+1= -> \x1b[0m1000" in text
    assert "error: request 2: " in text
    assert "3 requests (1 failed): " in text
    assert "Token indices" not in text  # a warning of transformers that says what the error says
    assert "\x1b[?25h" in text  # the cursor is back
