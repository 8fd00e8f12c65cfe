"""Does the gate hold on real runs? Unchanged code passes ten times, a 10 % slower step fails.

The machine may be busy: other tests run beside, and on two cores a run's median then doubles from
one minute to the next. What makes the outcome certain all the same is what a user is told to do:
short samples, many of them, of sides that take turns, until each side's best seven lie together.
"""

from __future__ import annotations

import functools
import gc
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import perf.run
import perf.step_probe
from cli import app
from graphengine import LLM
from graphengine.model_runner import ModelRunner
from perf.compare import gates, load_side
from perf.workloads import WORKLOADS

WORKLOAD = "decode-0.6b"
UNCHANGED = [f"unchanged-{number}" for number in range(10)]
SLOW_DOWN = 0.10
# A sample is two steps of one row, about 3 ms: shorter than what a scheduler gives a neighbour, so
# that some are undisturbed on any machine.
STEPS_PER_SAMPLE = 2
SAMPLES_PER_RUN = 10
# A slow-down is surely found once the best seven runs of both sides lie this close: the floor is
# then known to better than what the limit (5 %) leaves between a step and one 10 % slower.
RESOLVED = 0.025
LEAST_ROUNDS, MOST_SECONDS = 12, 60.0
# That nothing is found needs no quiet: of seven runs each, one comparison in 3,432 alarms at most,
# whatever the noise.
UNCHANGED_ROUNDS = 7

StepFn = Callable[[ModelRunner, Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], None]


class Spin:
    """A decode step that, while `is_on`, spins for a tenth of the time the step took."""

    def __init__(self, step: StepFn) -> None:
        self.is_on = False
        self._step = step

    def patched(self) -> StepFn:
        def decode_step(
            runner: ModelRunner,
            inputs: Mapping[str, torch.Tensor],
            outputs: Mapping[str, torch.Tensor],
        ) -> None:
            start_s = time.perf_counter()
            self._step(runner, inputs, outputs)
            if self.is_on:
                now_s = time.perf_counter()
                end_s = now_s + SLOW_DOWN * (now_s - start_s)
                while time.perf_counter() < end_s:
                    pass

        return decode_step


def perf_run(output: Path) -> None:
    result = CliRunner().invoke(
        app,
        f"perf run --workload {WORKLOAD} --model demo --scale 0.02 "
        f"--repeats {SAMPLES_PER_RUN} --output {output}",
    )
    assert result.exit_code == 0, result.stderr


def perf_compare(base: Path, new: Path) -> Result:
    return CliRunner().invoke(
        app, ["perf", "compare", str(base), str(new), "--max-regression", "5%"]
    )


def is_resolved(folder: Path) -> bool:
    return all(
        samples.spread_end <= (1.0 + RESOLVED) * samples.best
        for (_, _, name), samples in load_side(folder).figures.items()
        if gates(name, samples.unit)
    )


class Bench:
    """Runs of `graphengine perf run` that take turns, a folder of them for each side. All share an
    engine: without the half second that one takes to make, turns are short against the neighbours'.
    """

    def __init__(self, root: Path, spin: Spin) -> None:
        self._root = root
        self._spin = spin
        self._order = random.Random(0)

    def take_turns(self, names: list[str], *, is_enough: Callable[[int], bool]) -> None:
        for name in names:
            (self._root / name).mkdir()
        num_rounds = 0
        while not is_enough(num_rounds):
            for name in self._order.sample(names, len(names)):
                self._spin.is_on = name == "slow"
                perf_run(self._root / name / f"{num_rounds:04d}.json")
            num_rounds += 1

    def compare(self, base: str, new: str) -> Result:
        return perf_compare(self._root / base, self._root / new)

    def is_resolved(self, name: str) -> bool:
        return is_resolved(self._root / name)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("gate")
    spin = Spin(ModelRunner.decode_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "decode_step", spin.patched())
        workload = replace(WORKLOADS[WORKLOAD], points=((1, 256),))
        patch.setitem(WORKLOADS, WORKLOAD, workload)
        patch.setattr(perf.step_probe, "GRID_STEPS", STEPS_PER_SAMPLE)
        # These ask git, and measure for a second.
        patch.setattr(perf.run, "environment", functools.cache(perf.run.environment))
        patch.setattr(perf.run, "read_bandwidth", lambda: 1e10)
        shared_llm = functools.cache(lambda: make_llm(*arguments))
        make_llm = perf.run.make_llm
        arguments: list[Any] = []

        def keep(*given: Any) -> LLM:
            arguments[:] = given
            return shared_llm()

        patch.setattr(perf.run, "make_llm", keep)
        close = LLM.close
        patch.setattr(LLM, "close", lambda self: None)
        perf_run(root / "first.json")
        # Every run collects garbage: of all of torch it takes longer than the run.
        gc.freeze()
        yield Bench(root, spin)
        gc.unfreeze()
        close(shared_llm())


def test_ten_percent_slower_step_fails_the_gate(bench: Bench) -> None:
    began_s = time.monotonic()

    def is_enough(num_rounds: int) -> bool:
        if num_rounds < LEAST_ROUNDS:
            return False
        is_late = time.monotonic() - began_s > MOST_SECONDS
        return is_late or all(bench.is_resolved(name) for name in ("base", "slow"))

    bench.take_turns(["base", "slow"], is_enough=is_enough)
    result = bench.compare("base", "slow")
    assert result.exit_code == 1, result.stderr
    assert f"{WORKLOAD} async device_ms[1 x 5]" in json.loads(result.stdout)["slower"]


def test_unchanged_code_passes_the_gate_ten_times(bench: Bench) -> None:
    names = ["before", *UNCHANGED]
    bench.take_turns(names, is_enough=lambda num_rounds: num_rounds == UNCHANGED_ROUNDS)
    for name in UNCHANGED:
        result = bench.compare("before", name)
        assert result.exit_code == 0, result.stderr
