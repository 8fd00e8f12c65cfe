"""What did a run do? Counters the loop advances, and the snapshot a caller sees."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Reversible
from dataclasses import dataclass, field
from typing import NamedTuple

# A gap is looked at once the launch after it has ended, and so many of them at once: see
# `engine._SPANS_AT_ONCE`. A turn has six laps.
_RECENT_LAPS = 192
_RECENT_LAUNCHES = 16
# Shorter ones are the device's own time between two launches.
_LEAST_GAP_MS = 0.02
_NUM_LONGEST = 5


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the stream that runs, or of the last one. What the device did is up to 16
    launches behind while it runs.

    num_waiting: requests read and not admitted yet. kv_usage: share of KV blocks held.
    gpu_busy: share of the time from the first launch on in which a launch ran on the device, None
    on the CPU; without CUDA graphs it counts the gaps between a launch's kernels as busy.
    decode_ms, prefill_ms: device time of a step, mean.
    host_ms: host time by phase of the loop, mean of the times it ran: intake, schedule, launch (of
    decode steps), prefill (launch of one), output (text of what ended), wait (for the device),
    commit. All but wait run in the shadow of a step.
    idle_host_ms: what the host did, by phase, while the device idled, in all. longest_gaps: when
    it idled longest, longest first.
    """

    num_running: int
    num_waiting: int
    num_finished: int
    num_failed: int
    num_preemptions: int
    prompt_tokens: int
    output_tokens: int
    kv_usage: float
    elapsed_s: float
    num_decode_steps: int
    num_prefill_steps: int
    decode_ms: float
    prefill_ms: float
    gpu_busy: float | None
    longest_gap_ms: float
    host_ms: dict[str, float]
    idle_host_ms: dict[str, float]
    longest_gaps: tuple[Gap, ...]


class Lap(NamedTuple):
    """One phase of the host, in seconds of perf_counter. A tuple: six are made every step."""

    phase: str
    start_s: float
    end_s: float


class Laps:
    """Seconds of phases that follow one another, how often each ran, and the last few of them."""

    def __init__(self, on_lap: Callable[[Lap], None] | None = None) -> None:
        """on_lap: is called with every lap, for a trace."""
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.recent: deque[Lap] = deque(maxlen=_RECENT_LAPS)
        self._on_lap = on_lap
        self.start()

    def start(self) -> None:
        """The next phase begins now; the time since the last one ended counts to none."""
        self._since_s = time.perf_counter()

    def end(self, phase: str) -> None:
        """`phase` ends now and the next one begins."""
        lap = Lap(phase, self._since_s, time.perf_counter())
        self.counts[phase] = self.counts.get(phase, 0) + 1
        self.seconds[phase] = self.seconds.get(phase, 0.0) + lap.end_s - lap.start_s
        self.recent.append(lap)
        if self._on_lap is not None:
            self._on_lap(lap)
        self._since_s = lap.end_s

    def mean_ms(self) -> dict[str, float]:
        """Milliseconds of each phase, mean of the times it ran. Any thread may ask."""
        seconds = dict(self.seconds)  # copied first: its phases are then all in the counts
        counts = dict(self.counts)
        return {phase: 1e3 * total_s / counts[phase] for phase, total_s in seconds.items()}


@dataclass(frozen=True, slots=True)
class Gap:
    """The device had nothing to do. `host_ms`: what the host did meanwhile, by phase; "outside" is
    the code that consumes the outputs."""

    at_s: float  # since the run began
    ms: float
    host_ms: dict[str, float]


class IdleAccount:
    """Which phases of the host the device waited for, and the longest gaps of a run."""

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._last_end_s: float | None = None
        self.host_ms: dict[str, float] = {}
        self._longest: list[tuple[float, float, Gap]] = []
        self.recent: deque[tuple[str, float, float]] = deque(maxlen=_RECENT_LAUNCHES)

    def add(self, label: str, start_s: float, end_s: float, recent: Reversible[Lap]) -> None:
        """A launch ran on the device from start_s to end_s; launches come in order. recent: laps of
        the host, oldest first, that cover the gap before it."""
        self.recent.append((label, start_s, end_s))
        if self._last_end_s is not None:
            gap_s = start_s - self._last_end_s
            if 1e3 * gap_s >= _LEAST_GAP_MS:
                self._add_gap(self._last_end_s, start_s, recent)
        self._last_end_s = end_s

    @property
    def longest(self) -> tuple[Gap, ...]:
        """Longest first."""
        return tuple(gap for _, _, gap in sorted(self._longest, reverse=True))

    def _add_gap(self, start_s: float, end_s: float, recent: Reversible[Lap]) -> None:
        host_ms: dict[str, float] = {}
        for lap in reversed(recent):
            if lap.end_s <= start_s:
                break
            overlap_s = min(end_s, lap.end_s) - max(start_s, lap.start_s)
            if overlap_s > 0.0:
                host_ms[lap.phase] = host_ms.get(lap.phase, 0.0) + 1e3 * overlap_s
        total_ms = 1e3 * (end_s - start_s)
        outside_ms = total_ms - sum(host_ms.values())
        if outside_ms >= _LEAST_GAP_MS:
            host_ms["outside"] = outside_ms
        for phase, ms in host_ms.items():
            self.host_ms[phase] = self.host_ms.get(phase, 0.0) + ms
        at_s = start_s - self._started_s
        heapq.heappush(self._longest, (total_ms, at_s, Gap(at_s, total_ms, host_ms)))
        if len(self._longest) > _NUM_LONGEST:
            heapq.heappop(self._longest)


@dataclass(slots=True)
class RunCounters:
    """Advanced by the loop; cheap enough to be always on."""

    num_finished: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    ended_s: float | None = None
    laps: Laps = field(default_factory=Laps)
    idle: IdleAccount = field(init=False)

    def __post_init__(self) -> None:
        self.idle = IdleAccount(self.started_s)

    @property
    def elapsed_s(self) -> float:
        end_s = time.perf_counter() if self.ended_s is None else self.ended_s
        return end_s - self.started_s
