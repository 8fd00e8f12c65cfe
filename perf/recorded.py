"""What does a result file of `perf run` hold? Checked once, so that readers need not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from graphengine.errors import InputError

SCHEMA = 1
_POINT = re.compile(r"(\w+)\[(\d{1,7}) x (\d{1,9})\]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A figure: median and range of `num_samples` repeats. better: "lower" or "higher"."""

    unit: str
    better: str
    median: float
    low: float
    high: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class Span:
    """What ran on the row "host" or "device"."""

    row: str
    name: str
    start_ms: float
    ms: float

    @property
    def end_ms(self) -> float:
        return self.start_ms + self.ms


@dataclass(frozen=True, slots=True)
class LongGap:
    at_s: float
    ms: float
    host_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """A workload in one mode. What the file does not tell is empty, num_steps then 0.

    memory: seconds and bytes in use. startup: seconds by milestone and phase of each process, by
    "cold" and "warm"."""

    figures: dict[str, Recorded]
    num_steps: int
    host_ms: dict[str, float]
    idle_host_ms: dict[str, float]
    longest_gaps: list[LongGap]
    memory: list[tuple[float, float]]
    timeline: list[Span]
    startup: dict[str, list[dict[str, float]]]

    def grid(self, name: str) -> dict[tuple[int, int], float]:
        """Medians of the figures `name[rows x context]` by (rows, context)."""
        found = {}
        for key, figure in self.figures.items():
            match = _POINT.fullmatch(key)
            if match and match[1] == name:
                found[int(match[2]), int(match[3])] = figure.median
        return found


@dataclass(frozen=True, slots=True)
class Result:
    """A file. workloads: by name and mode, at least one. peers: by peer, workload and figure."""

    name: str
    created: str
    device: str
    commit: str
    is_dirty: bool
    read_bandwidth_bytes_per_s: float | None
    environment: dict[str, Any]
    config: dict[str, Any]
    workloads: dict[str, dict[str, Measured]]
    peers: dict[str, dict[str, dict[str, Recorded]]]

    @property
    def has_gpu(self) -> bool:
        return self.device != "cpu"


def best_mode(modes: dict[str, Measured]) -> str:
    """The mode a user gets, or the first there is."""
    return "async" if "async" in modes else next(iter(modes))


def clean(text: object) -> str:
    """`text` on one line, without characters that steer a terminal or hide what is written."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))[:200]


def read_result(path: Path) -> Result:
    """Raises InputError for a file that is missing, is no JSON or holds something else."""
    try:
        raw = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"{clean(path)!r} cannot be read ({error.strerror}); give a file that perf run wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{clean(path)!r} is no JSON ({clean(error)}); give a file that perf run wrote"
        ) from error
    try:
        return _result(path.stem, raw)
    except Unexpected as error:
        raise InputError(f"{clean(path)!r}: {error}; give a file that perf run wrote") from error


class Unexpected(Exception):
    """An entry of a file is not what `perf run` writes. What it says lacks the file's name."""

    def __init__(self, where: str, value: object, expected: str) -> None:
        super().__init__(f"{clean(where)} is {clean(repr(value))[:60]}, expected {expected}")


class _Missing(Unexpected):
    def __init__(self, where: str) -> None:
        Exception.__init__(self, f"{clean(where)} is missing")


def entry(contents: object, name: str, where: str = "") -> Any:
    """The entry `name` of the object at `where`, the file itself if "". Raises Unexpected."""
    found = _dict(contents, where or "the file")
    if name not in found:
        raise _Missing(f"{where}.{name}" if where else name)
    return found[name]


def _result(name: str, raw: object) -> Result:
    top = _dict(raw, "the file")
    if top.get("schema") != SCHEMA:
        raise Unexpected("schema", top.get("schema"), str(SCHEMA))
    environment = _dict(entry(top, "environment"), "environment")
    config = _dict(entry(top, "config"), "config")
    workloads = _map(
        entry(top, "workloads"), "workloads", lambda modes, at: _map(modes, at, _measured)
    )
    bandwidth = top.get("read_bandwidth_bytes_per_s")
    return Result(
        name=clean(name),
        created=clean(top.get("created", "")),
        device=clean(environment.get("device", "unknown device")),
        commit=clean(environment.get("commit", ""))[:12],
        is_dirty=bool(environment.get("is_dirty")),
        read_bandwidth_bytes_per_s=None if bandwidth is None else _number(bandwidth, "bandwidth"),
        environment=environment,
        config=config,
        workloads={name: modes for name, modes in workloads.items() if modes},
        peers=_map(top.get("peers", {}), "peers", lambda loads, at: _map(loads, at, _peer_figures)),
    )


def _peer_figures(raw: object, where: str) -> dict[str, Recorded]:
    return _map(_dict(raw, where).get("figures", {}), f"{where}.figures", _recorded)


def _measured(raw: object, where: str) -> Measured:
    both = _dict(raw, where)
    detail = _dict(both.get("detail", {}), f"{where}.detail")
    at = f"{where}.detail"
    steps = [
        _number(detail.get(name, 0), f"{at}.{name}")
        for name in ("num_decode_steps", "num_prefill_steps")
    ]
    return Measured(
        figures=_map(entry(both, "figures", where), f"{where}.figures", _recorded),
        num_steps=int(sum(steps)),
        host_ms=_map(detail.get("host_ms", {}), f"{at}.host_ms", _number),
        idle_host_ms=_map(detail.get("idle_host_ms", {}), f"{at}.idle_host_ms", _number),
        longest_gaps=_list(detail.get("longest_gaps", []), f"{at}.longest_gaps", _gap),
        memory=_list(detail.get("memory", []), f"{at}.memory", _memory),
        timeline=_list(detail.get("timeline", []), f"{at}.timeline", _span),
        startup=_map(
            detail.get("phases", {}), f"{at}.phases", lambda raw, at: _list(raw, at, _startup)
        ),
    )


def _recorded(raw: object, where: str) -> Recorded:
    one = _dict(raw, where)
    samples = _list(one.get("samples", []), f"{where}.samples", _number)
    return Recorded(
        unit=clean(one.get("unit", "")),
        better=clean(one.get("better", "")),
        median=_number_of(one, "median", where),
        low=_number_of(one, "low", where),
        high=_number_of(one, "high", where),
        num_samples=len(samples),
    )


def _span(raw: object, where: str) -> Span:
    one = _dict(raw, where)
    return Span(
        clean(one.get("row", "")),
        clean(one.get("name", "")),
        _number_of(one, "start_ms", where),
        _number_of(one, "ms", where),
    )


def _gap(raw: object, where: str) -> LongGap:
    one = _dict(raw, where)
    return LongGap(
        _number_of(one, "at_s", where),
        _number_of(one, "ms", where),
        _map(one.get("host_ms", {}), f"{where}.host_ms", _number),
    )


def _memory(raw: object, where: str) -> tuple[float, float]:
    one = _dict(raw, where)
    return _number_of(one, "at_s", where), _number_of(one, "used_bytes", where)


def _startup(raw: object, where: str) -> dict[str, float]:
    one = dict(_dict(raw, where))
    phases = one.pop("phases_s", {})
    return _map(one, where, _number) | {
        f"phase {name}": seconds for name, seconds in _map(phases, where, _number).items()
    }


def _dict(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unexpected(where, value, "an object")
    return value


def _map(value: object, where: str, of: Callable[[object, str], _T]) -> dict[str, _T]:
    return {
        clean(name): of(one, f"{where}.{clean(name)}") for name, one in _dict(value, where).items()
    }


def _list(value: object, where: str, of: Callable[[object, str], _T]) -> list[_T]:
    if not isinstance(value, list):
        raise Unexpected(where, value, "a list")
    return [of(one, f"{where}[{i}]") for i, one in enumerate(value)]


def _number_of(contents: object, name: str, where: str) -> float:
    return _number(entry(contents, name, where), f"{where}.{name}")


def _number(value: object, where: str) -> float:
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise Unexpected(where, value, "a finite number")
