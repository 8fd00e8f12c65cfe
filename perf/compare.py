"""Did it get slower? Judges two results of `perf run`, figure by figure.

The statistic. Whatever disturbs a run (a neighbour, a page fault, a lower clock) makes it slower,
hardly ever faster: the samples of a figure lie above a floor, which is what the program itself
costs. With 3 to 7 repeats on a shared machine medians are the neighbours' as much as ours: 40
samples each of the unchanged demo model on two busy cores had medians 20 % apart and best samples
0.6 % apart. So a figure is compared by its best sample.

How well the floor is known shows in how close the next best samples are: the spread of a figure is
what lies between its best and its seventh best sample, which is the whole range of seven repeats
or fewer. A figure is SLOWER if its best sample is worse than the limit and no sample of the new
side lies in the base's spread or ahead of it. Where noise is larger than the limit, the second
condition alone bounds the false alarms: of n samples each, drawn alike, the base's k best are ahead
of all the new ones with probability C(n, k) / C(2n, k), whatever the distribution: 5.0 % for 3
repeats, 0.4 % for 5, 0.03 % for 7, and 0.8 % at most from there on. Where noise is smaller, the
limit is what counts.

Drawn alike is the catch: the repeats of one run share a minute of the machine's, and no statistic
on two files can see that the machine changed between them. Where it does, give two folders of runs
taken in turns (base, new, base, new), so that a change falls on both. Of each run in a folder only
the best sample counts: runs are drawn alike, samples within them are not. (With every sample
counted, 5 of 10 unchanged folders of 4 runs failed on a busy machine.)

What it cannot find: a fault that slows some repeats down and leaves the others alone. Then the
medians differ and the best samples do not, and the verdict is "noise".
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphengine.errors import InputError
from perf.recorded import SCHEMA, Unexpected, entry

LEAST_SAMPLES = 3
_SPREAD_SAMPLES = 7
# Times and rates of work gate. Other units say why (shares of a bound, of busy time, TFLOP/s of the
# prefills alone): they follow from a time that gates, with noise of their own.
_GATING_UNITS = ("s", "ms", "tok/s")
# So do host times: a step's shadow may grow as long as it covers nothing else.
_INFORMATIVE_PREFIX = "host_"

Json = dict[str, Any]
Key = tuple[str, str, str]  # workload, mode, figure


@dataclass(frozen=True, slots=True)
class Samples:
    """One figure of one side. better: "lower" or "higher"."""

    unit: str
    better: str
    values: tuple[float, ...]

    @property
    def best(self) -> float:
        return self._ranked()[0]

    @property
    def spread_end(self) -> float:
        """The worse end of the spread that begins with `best`."""
        ranked = self._ranked()
        return ranked[min(len(ranked), _SPREAD_SAMPLES) - 1]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def _ranked(self) -> list[float]:
        return sorted(self.values, reverse=self.better == "higher")


@dataclass(frozen=True, slots=True)
class Row:
    """verdict: "ok", "faster", "SLOWER", "noise" (beyond the limit, but not outside the spreads),
    or "info" for a figure that does not gate. ratio: new over base, of the best samples."""

    key: Key
    unit: str
    base: float
    new: float
    ratio: float
    median_ratio: float
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """changes: what else differs between the two, one line each. only_base, only_new: figures that
    the other side does not have."""

    rows: tuple[Row, ...]
    changes: tuple[str, ...]
    only_base: tuple[Key, ...]
    only_new: tuple[Key, ...]

    @property
    def slower(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict == "SLOWER")


@dataclass(frozen=True, slots=True)
class Side:
    """One result, or several of the same thing. `must_match` decides whether two sides can be
    compared, `may_change` is what a comparison is often for."""

    name: str
    must_match: dict[str, Any]
    may_change: dict[str, Any]
    figures: dict[Key, Samples]
    lengths: dict[tuple[str, str], tuple[Any, ...]]


def compare(base: Side, new: Side, max_regression: float) -> Comparison:
    """max_regression: 0.05 allows a time 5 % longer, a rate 1.05 times smaller. Raises InputError
    if the two did not measure the same on the same hardware, have no figure in common, or have too
    few samples to tell."""
    _check_comparable(base, new)
    common = [key for key in base.figures if key in new.figures]
    if not common:
        raise InputError(f"{base.name} and {new.name} have no figure in common")
    return Comparison(
        rows=tuple(_judge(key, base, new, max_regression) for key in common),
        changes=tuple(
            f"{name}: {base.may_change.get(name)} -> {new.may_change.get(name)}"
            for name in sorted({*base.may_change, *new.may_change})
            if base.may_change.get(name) != new.may_change.get(name)
        ),
        only_base=tuple(key for key in base.figures if key not in new.figures),
        only_new=tuple(key for key in new.figures if key not in base.figures),
    )


def verdict_of(base: Samples, new: Samples, max_regression: float) -> str:
    """See the module's docstring for the rule and why."""
    limit = 1.0 + max_regression
    if _cost_ratio(base.best, new.best, base.better) > limit and _is_apart(base, new):
        return "SLOWER"
    if _cost_ratio(new.best, base.best, base.better) > limit and _is_apart(new, base):
        return "faster"
    ratios = [
        _cost_ratio(base.best, new.best, base.better),
        _cost_ratio(base.median, new.median, base.better),
    ]
    return "noise" if any(not 1.0 / limit <= ratio <= limit for ratio in ratios) else "ok"


def gates(name: str, unit: str) -> bool:
    """Whether a figure of that name and unit can fail a comparison."""
    return unit in _GATING_UNITS and not name.startswith(_INFORMATIVE_PREFIX)


def _judge(key: Key, base: Side, new: Side, max_regression: float) -> Row:
    one, other = base.figures[key], new.figures[key]
    if (one.unit, one.better) != (other.unit, other.better):
        raise InputError(
            f"{' '.join(key)} is in {one.unit} in {base.name} and in {other.unit} in {new.name}"
        )
    does_gate = gates(key[2], one.unit)
    for side, samples in ((base, one), (new, other)):
        if does_gate and len(samples.values) < LEAST_SAMPLES:
            raise InputError(
                f"{side.name} has {len(samples.values)} samples of {' '.join(key)}, a verdict "
                f"needs {LEAST_SAMPLES}; give more --repeats, or more runs if it is a folder"
            )
    return Row(
        key,
        one.unit,
        one.best,
        other.best,
        _ratio(other.best, one.best),
        _ratio(other.median, one.median),
        verdict_of(one, other, max_regression) if does_gate else "info",
    )


def _is_apart(ahead: Samples, behind: Samples) -> bool:
    """Whether every sample of `behind` is worse than the spread of `ahead`."""
    if ahead.better == "lower":
        return behind.best > ahead.spread_end
    return behind.best < ahead.spread_end


def _cost_ratio(base: float, new: float, better: str) -> float:
    """Above 1 if `new` is worse."""
    return _ratio(new, base) if better == "lower" else _ratio(base, new)


def _ratio(value: float, other: float) -> float:
    """1 for two zeros: a run so short that it had no decode step has figures of zero."""
    if other == 0.0:
        return 1.0 if value == 0.0 else math.inf
    return value / other


def _check_comparable(base: Side, new: Side) -> None:
    for name, value in base.must_match.items():
        if value != new.must_match[name]:
            raise InputError(
                f"cannot compare: {name} is {value} in {base.name} and {new.must_match[name]} in "
                f"{new.name}"
            )
    for key, lengths in base.lengths.items():
        if lengths != new.lengths.get(key, lengths):
            raise InputError(
                f"cannot compare: {key[0]} has {_lengths_text(lengths)} in {base.name} and "
                f"{_lengths_text(new.lengths[key])} in {new.name}"
            )


def _lengths_text(lengths: tuple[Any, ...]) -> str:
    return "{} requests, {} prompt and {} output tokens".format(*lengths)


def load_side(path: Path) -> Side:
    """A result file, or a folder of them: runs of one commit, whose best samples are pooled. Raises
    InputError if one is missing, not a result, or not of the same thing as the others."""
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name too long
        raise InputError(f"{path}: {error.strerror}; give a result or a folder") from error
    if not is_folder:
        return _load(path)
    sides = [_load(file) for file in sorted(path.glob("*.json"))]
    if not sides:
        raise InputError(f"{path}: no .json file in this folder")
    first = sides[0]
    for side in sides[1:]:
        _check_comparable(first, side)
        if side.may_change["commit"] != first.may_change["commit"]:
            raise InputError(f"cannot pool: {first.name} and {side.name} are of two commits")
        if side.figures.keys() != first.figures.keys():
            raise InputError(f"cannot pool: {first.name} and {side.name} have different figures")
    pooled = {
        key: replace(samples, values=tuple(side.figures[key].best for side in sides))
        for key, samples in first.figures.items()
    }
    return replace(first, name=str(path), figures=pooled)


def _load(path: Path) -> Side:
    try:
        result = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{path}: not JSON ({error}); give a file of `perf run`") from error
    if not isinstance(result, dict) or "schema" not in result:
        raise InputError(f"{path}: not a result of `perf run`")
    if result["schema"] != SCHEMA:
        raise InputError(
            f"{path}: has schema {result['schema']}, this version reads {SCHEMA}; measure again"
        )
    try:
        return _side(str(path), result)
    except Unexpected as error:
        raise InputError(f"{path}: {error}; give a file that perf run wrote") from error
    except (TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: a broken result of `perf run` ({what})") from error


def _side(name: str, result: Json) -> Side:
    environment, config = entry(result, "environment"), entry(result, "config")

    def of_machine(name: str) -> Any:
        return entry(environment, name, "environment")

    is_cpu = of_machine("device") == "cpu"
    cpu = {"cpu": of_machine("cpu"), "number of CPUs": of_machine("num_cpus")}
    gpu = of_machine("gpu")
    figures: dict[Key, Samples] = {}
    lengths = {}
    for workload, mode, measured in _measured(result):
        where = f"workloads.{workload}.{mode}"
        for figure, contents in entry(measured, "figures", where).items():
            at = f"{where}.figures.{figure}"
            figures[workload, mode, figure] = _samples(contents, at)
        detail = entry(measured, "detail", where)
        if "num_requests" in detail:
            lengths[workload, mode] = tuple(
                entry(detail, name, f"{where}.detail")
                for name in ("num_requests", "prompt_tokens", "output_tokens")
            )
    return Side(
        name,
        must_match={
            "device": of_machine("device"),
            **(cpu if is_cpu else {}),
            "model": entry(config, "model", "config"),
            "scale": entry(config, "scale", "config"),
            "modes": sorted(entry(config, "modes", "config")),
        },
        may_change={
            "commit": of_machine("commit"),
            "uncommitted changes": of_machine("is_dirty"),
            "sources": environment.get("source_hash"),  # files before it have none
            "python": of_machine("python"),
            "platform": of_machine("platform"),
            "cuda": of_machine("cuda"),
            **of_machine("packages"),
            **({} if is_cpu else cpu),
            "driver": gpu.get("driver_version"),
            "highest clock": gpu.get("clocks.max.sm"),
            "power limit": gpu.get("power.limit"),
        },
        figures=figures,
        lengths=lengths,
    )


def _measured(result: Json) -> Iterator[tuple[str, str, Json]]:
    for workload, modes in entry(result, "workloads").items():
        for mode, measured in modes.items():
            yield workload, mode, measured


def _samples(contents: Json, where: str) -> Samples:
    samples, better, unit = (entry(contents, name, where) for name in ("samples", "better", "unit"))
    values = tuple(float(value) for value in samples)
    if not values or not all(0.0 <= value < math.inf for value in values):
        raise ValueError(f"samples are {samples}")
    if better not in ("lower", "higher"):
        raise ValueError(f"better is {better!r}")
    return Samples(str(unit), better, values)
