"""How far does a dataset job use all GPUs of a host, and what does it lose with a worker?

`python -m perf.jobs_gpus --output FILE.json --kill`: rows of 100 to 1,024 tokens in and out on
random weights of a real shape, by `graphengine run` on one GPU and on all, in turns. Then on all
again, killing a worker half-way: once, and with every process that takes its place. One JSON line
for each run as it ends. `--shape demo` is the shipped model with shorter rows; with `--device cpu`
its workers share the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphengine.errors import ConfigError, GraphEngineError
from graphengine.jobs.config import MAX_WORKERS
from graphengine.jobs.workers import VISIBLE, visible_gpus
from perf.jobs_kill import children, is_worker
from perf.result_file import result_path, write_result
from perf.script import check_gpu, check_least, check_shape, errors_as_exit
from perf.shapes import SHAPES, write_shape

_DEMO = "demo"
_WITHOUT_GPU = "--device cpu --shape demo --workers-list 1,2"
_LOOK_INTERVAL_S = 0.02
# What issue 6 asks of two GPUs.
_WANTED = {"speedup": 1.95, "fed_gpu_busy": 0.98, "tail_share": 0.03}
ONCE, FOR_GOOD = "once", "for good"


@dataclass(frozen=True, slots=True)
class Load:
    """max_tokens: what each row of `source` must come to, in tokens of output. options: of
    `graphengine run`."""

    model: str
    source: Path
    max_tokens: list[int]
    options: tuple[str, ...]


def write_load(
    shape: str, folder: Path, *, num_rows: int, max_num_seqs: int, options: tuple[str, ...] = ()
) -> Load:
    """Rows with uniform lengths of their own, seeded. Outputs end at their length only."""
    is_demo = shape == _DEMO
    model = _DEMO if is_demo else str(write_shape(shape, folder))
    vocab_size = 16 if is_demo else SHAPES[shape]["vocab_size"]
    prompts, outputs = ((4, 16), (8, 48)) if is_demo else ((100, 1024), (100, 1024))
    rng = random.Random(0)
    source = folder / f"in-{num_rows}.jsonl"
    max_tokens = []
    with source.open("w") as file:
        for _ in range(num_rows):
            ids = [rng.randrange(3, vocab_size) for _ in range(rng.randint(*prompts))]
            max_tokens.append(rng.randint(*outputs))
            row = {"prompt_token_ids": ids, "sampling": {"max_tokens": max_tokens[-1]}}
            file.write(json.dumps(row) + "\n")
    given = ["--sampling-column=sampling", "--ignore-eos", "--token-ids"]
    given.append(f"--max-num-seqs={max_num_seqs}")
    if not is_demo:
        given += ["--load-format=dummy", "--skip-tokenizer-init", "--max-model-len=2048"]
    return Load(model, source, max_tokens, (*given, *options))


class Run:
    """One job by the command line, watched from outside."""

    def __init__(
        self, load: Load, output: Path, *, workers: str, visible: str | None = None
    ) -> None:
        """visible: the job's CUDA_VISIBLE_DEVICES, None leaves it as it is."""
        self._load = load
        self._output = output
        self._position = 0
        self._num_rows = 0
        command = [sys.executable, "-m", "cli", "run", load.model, str(load.source)]
        command += ["--output", str(output), f"--workers={workers}", *load.options]
        self._began_s = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ({} if visible is None else {VISIBLE: visible}),
        )

    def wait(self, kill: str | None = None) -> dict[str, Any]:
        """Until the job is over; kills the last worker on the way: ONCE, or FOR_GOOD with all that
        take its place. The job's summary and what became of its rows. Raises GraphEngineError
        for a job that fails, or ends before a worker was killed."""
        found: dict[str, Any] = {}
        try:
            if kill is not None:
                found["kill"] = self._kill_on_the_way(is_for_good=kill == FOR_GOOD)
            stdout, _ = self._process.communicate()
        finally:
            self._process.kill()
        if self._process.returncode != 0:
            code = self._process.returncode
            raise GraphEngineError(f"the job ends with exit code {code}: {stdout}")
        found["wall_s"] = round(time.perf_counter() - self._began_s, 2)
        found["rows"] = self._account()
        found["summary"] = json.loads(stdout.splitlines()[-1])
        del found["summary"]["output"]  # a temporary name
        return found

    def token_ids(self) -> dict[int, list[int]]:
        """By row index."""
        return {row["row_index"]: row["token_ids"] for row in self._read()}

    def _kill_on_the_way(self, *, is_for_good: bool) -> dict[str, Any]:
        half = len(self._load.max_tokens) // 2
        while self._count() < half or len(self._workers()) < 2:
            if self._process.poll() is not None:
                raise GraphEngineError(
                    "the job ended before a worker was killed; give more --rows, or see its error"
                )
            time.sleep(_LOOK_INTERVAL_S)
        first = self._workers()
        _kill(first[-1])
        num_kills = 1
        before = since = self._count()
        longest_s, since_s = 0.0, time.perf_counter()
        while self._process.poll() is None:
            time.sleep(_LOOK_INTERVAL_S)
            for pid in self._workers() if is_for_good else []:
                if pid not in first:
                    _kill(pid)
                    first.append(pid)
                    num_kills += 1
            if self._count() != since:
                now_s = time.perf_counter()
                longest_s = max(longest_s, now_s - since_s)
                since, since_s = self._count(), now_s
        return {
            "num_kills": num_kills,
            "rows_before": before,
            "longest_time_without_a_row_s": round(longest_s, 3),
        }

    def _workers(self) -> list[int]:
        return sorted(pid for pid in children(self._process.pid) if is_worker(pid))

    def _count(self) -> int:
        """Rows written so far."""
        with contextlib.suppress(FileNotFoundError), self._output.open("rb") as file:
            file.seek(self._position)
            data = file.read()
            self._position += len(data)
            self._num_rows += data.count(b"\n")
        return self._num_rows

    def _read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._output.read_bytes().splitlines()]

    def _account(self) -> dict[str, int]:
        rows = self._read()
        times = Counter(row["row_index"] for row in rows)
        expected = self._load.max_tokens
        num_wrong = 0
        for row in rows:
            length = expected[row["row_index"]]
            is_whole = row["num_output_tokens"] == len(row["token_ids"]) == length
            num_wrong += not (is_whole and row["finish_reason"] == "length" and not row["error"])
        return {
            "num_written": len(rows),
            "num_lost": sum(index not in times for index in range(len(expected))),
            "num_doubled": sum(count > 1 for count in times.values()),
            "num_wrong": num_wrong,
        }


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def equal_share(found: dict[int, list[int]], reference: dict[int, list[int]]) -> float:
    """Of rows with the same token ids. Not 1 where a logit's last bits depend on the batch."""
    same = sum(found.get(index) == ids for index, ids in reference.items())
    return round(same / len(reference), 4)


def _compared(one: dict[str, Any], many: dict[str, Any]) -> dict[str, Any]:
    """Figures of a run on all GPUs beside those of a run on one."""
    summary = many["summary"]
    fed = [worker["fed_gpu_busy"] for worker in summary["workers"]]
    speedup = summary["output_tokens_per_s"] / one["summary"]["output_tokens_per_s"]
    return {
        "speedup": round(speedup, 4),
        "fed_gpu_busy": None if None in fed else min(fed),
        "tail_share": summary["tail_share"],
    }


def _check_workers(counts: list[str], *, has_kill: bool) -> None:
    for workers in counts:
        is_number = workers.isascii() and workers.isdecimal() and 1 <= int(workers) <= MAX_WORKERS
        if not (is_number or workers == "auto"):
            raise ConfigError(
                f"--workers-list holds {workers!r}; give numbers from 1 to {MAX_WORKERS}, or auto, "
                "with commas between"
            )
    if has_kill and counts[-1] == "1":
        raise ConfigError("--kill needs a second worker; end --workers-list with more than 1")


@errors_as_exit()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=(_DEMO, *SHAPES), default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--warm-up-rows", type=int, default=300)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--workers-list", default="1,auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--output", type=result_path, required=True)
    options = parser.parse_args()
    counts = options.workers_list.split(",")
    check_least(options, 1, "rows", "max_num_seqs")
    check_least(options, 0, "warm_up_rows")
    _check_workers(counts, has_kill=options.kill)
    is_cuda = options.device == "cuda"
    if is_cuda:
        check_gpu(f"give {_WITHOUT_GPU}")
    check_shape(options.shape, instead=f"without one give {_WITHOUT_GPU}")
    gpus = visible_gpus(os.environ) if is_cuda else []
    cases: list[tuple[str, str | None]] = [(workers, None) for workers in counts]
    if options.kill:
        cases += [(counts[-1], ONCE), (counts[-1], FOR_GOOD)]
    runs: list[dict[str, Any]] = []
    reference: dict[int, list[int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def load(num_rows: int) -> Load:
            return write_load(
                options.shape,
                folder,
                num_rows=num_rows,
                max_num_seqs=options.max_num_seqs,
                options=(f"--device={options.device}",),
            )

        # Compiles what is not compiled yet, where nobody counts it.
        if options.warm_up_rows:
            Run(load(options.warm_up_rows), folder / "warm.jsonl", workers=counts[-1]).wait()
        full = load(options.rows)
        for workers, kill in cases:
            visible = gpus[0] if workers == "1" and gpus else None
            run = Run(full, folder / f"out-{len(runs)}.jsonl", workers=workers, visible=visible)
            found = {"workers": workers, "killed": kill, **run.wait(kill)}
            token_ids = run.token_ids()
            reference = reference or token_ids
            found["share_equal_to_first"] = equal_share(token_ids, reference)
            runs.append(found)
            print(json.dumps(found), flush=True)
    from perf.environment import environment

    result: dict[str, Any] = {
        "shape": options.shape,
        "rows": options.rows,
        "output_tokens": sum(full.max_tokens),
        "max_num_seqs": options.max_num_seqs,
        "gpus": gpus,
        "wanted": _WANTED if len(gpus) == 2 else None,
        "figures": _compared(runs[0], runs[len(counts) - 1]),
    }
    everything = {**result, "runs": runs, "environment": environment()}
    print(json.dumps(result), flush=True)
    write_result(everything, options.output)


if __name__ == "__main__":
    main()
