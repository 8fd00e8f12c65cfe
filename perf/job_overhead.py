"""What does a job cost beside LLM.generate on the same rows? Processes of each take turns.

`python -m perf.job_overhead --shape qwen3-0.6b --output FILE.json`: random weights of a real shape
and token ids as prompts; `--shape demo` is the shipped model with text. Each run is a process that
loads the model and then runs all rows; only the latter counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from graphengine.config import EngineConfig
from graphengine.errors import ConfigError, GraphEngineError
from graphengine.intake import derived_seed
from graphengine.request import Request, SamplingParams
from perf.figures import figure
from perf.result_file import result_path, write_result
from perf.script import check_least, check_shape, errors_as_exit
from perf.shapes import SHAPES, write_shape

_DEMO = "demo"
_MOST_DEMO_TOKENS = 40
_MAX_LEN = 2048  # of a real shape's sequences
_SEED = 0


@errors_as_exit()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=(_DEMO, *SHAPES), default=_DEMO)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=result_path, required=True)
    options = parser.parse_args()
    counts = ("rows", "prompt_tokens", "output_tokens", "max_num_seqs", "repeats")
    check_least(options, 1, *counts)
    num_tokens = options.prompt_tokens + options.output_tokens
    if options.shape != _DEMO and num_tokens > _MAX_LEN:
        raise ConfigError(
            f"--prompt-tokens and --output-tokens are {num_tokens} together; give {_MAX_LEN} or "
            "fewer"
        )
    check_shape(options.shape, instead="without one give --shape demo")
    samples: dict[str, list[float]] = {"generate": [], "job": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_rows(folder / "in.jsonl", options)
        model = _DEMO if options.shape == _DEMO else str(write_shape(options.shape, folder))
        for repeat in range(options.repeats):
            turns = list(samples) if repeat % 2 == 0 else list(samples)[::-1]
            for kind in turns:
                told = json.dumps(
                    {"kind": kind, "model": model, "folder": name, "repeat": repeat}
                    | {"tokens": options.output_tokens, "max_num_seqs": options.max_num_seqs}
                )
                samples[kind].append(_run(told))
                print(f"{kind}: {samples[kind][-1]:,.0f} tok/s", file=sys.stderr, flush=True)
    from perf.environment import environment

    figures = {kind: figure(values, "tok/s", better="higher") for kind, values in samples.items()}
    ratio = figures["job"]["median"] / figures["generate"]["median"]
    best = figures["job"]["high"] / figures["generate"]["high"]
    result: dict[str, Any] = {
        "shape": options.shape,
        "rows": options.rows,
        # The demo's prompts are sums, and its context holds no more.
        "prompt_tokens": None if options.shape == _DEMO else options.prompt_tokens,
        "output_tokens": _num_output_tokens(options.shape == _DEMO, options.output_tokens),
        "max_num_seqs": options.max_num_seqs,
        "job_over_generate_medians": round(ratio, 4),
        "job_over_generate_best": round(best, 4),
        "figures": figures,
    }
    print(json.dumps(result), flush=True)
    write_result({**result, "environment": environment()}, options.output)


def _write_rows(path: Path, options: argparse.Namespace) -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(options.rows):
            row: dict[str, Any]
            if options.shape == _DEMO:
                row = {"prompt": f"{rng.randrange(1000)}+{rng.randrange(1000)}="}
            else:
                vocab_size = SHAPES[options.shape]["vocab_size"]
                ids = [rng.randrange(3, vocab_size) for _ in range(options.prompt_tokens)]
                row = {"prompt_token_ids": ids}
            file.write(json.dumps(row) + "\n")


def _run(told: str) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "perf.job_overhead", "--child", told],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:  # what it said is on standard error
        raise GraphEngineError(f"a process that was measured ends with {done.returncode}: {told}")
    return float(done.stdout.splitlines()[-1])


def _child(told: dict[str, Any]) -> float:
    """Output tokens a second over all rows, by the kind of run that was told."""
    is_demo = told["model"] == _DEMO
    engine = EngineConfig(
        told["model"],
        skip_tokenizer_init=not is_demo,
        load_format="auto" if is_demo else "dummy",
        max_num_seqs=told["max_num_seqs"],
        max_model_len=64 if is_demo else _MAX_LEN,
        seed=_SEED,
    )
    tokens = _num_output_tokens(is_demo, told["tokens"])
    params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)
    source = Path(told["folder"]) / "in.jsonl"
    if told["kind"] == "generate":
        return _generate(engine, params, source)
    return _job(engine, params, source, Path(told["folder"]) / f"out-{told['repeat']}.jsonl")


def _num_output_tokens(is_demo: bool, asked: int) -> int:
    return min(asked, _MOST_DEMO_TOKENS) if is_demo else asked


def _generate(engine: EngineConfig, params: SamplingParams, source: Path) -> float:
    from graphengine.engine import LLM

    requests = []
    for index, line in enumerate(source.read_text().splitlines()):
        row = json.loads(line)
        seeded = dataclasses.replace(params, seed=derived_seed(_SEED, index))
        requests.append(Request(row.get("prompt", row), seeded))
    with LLM(**dataclasses.asdict(engine)) as llm:
        began_s = time.perf_counter()
        outputs = llm.generate(requests)
        elapsed_s = time.perf_counter() - began_s
    return sum(len(output.outputs[0].token_ids) for output in outputs) / elapsed_s


def _job(engine: EngineConfig, params: SamplingParams, source: Path, output: Path) -> float:
    from rich.console import Console

    from graphengine.jobs.config import JobConfig
    from graphengine.jobs.job import run_job

    config = JobConfig(engine=engine, sampling=params, input=str(source), output=str(output))
    outcome = run_job(
        config,
        environment=os.environ,
        console=Console(stderr=True),
        say=lambda line: print(line, file=sys.stderr),
    )
    assert outcome.stats.num_failed == 0, "a row failed"
    return outcome.stats.output_tokens / outcome.stats.elapsed_s


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        with errors_as_exit():
            print(_child(json.loads(sys.argv[2])))
    else:
        main()
