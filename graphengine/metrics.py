"""What did a run do? Counters the loop advances, and the snapshot a caller sees."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the stream that runs, or of the last one.

    num_waiting: requests read and not admitted yet. kv_usage: share of KV blocks held.
    gpu_busy: share of the time from the first launch on in which a launch ran on the device, None
    on the CPU; without CUDA graphs it counts the gaps between a launch's kernels as busy.
    decode_ms, prefill_ms: device time of a step, mean.
    host_ms: host time by phase of the loop, mean of the times it ran: intake, schedule, launch (of
    decode steps), prefill (launch of one), output (text of what ended), wait (for the device),
    commit. All but wait run in the shadow of a step.
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


class Laps:
    """Seconds of phases that follow one another, and how often each ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        """The next phase begins now; the time since the last one ended counts to none."""
        self._since_s = time.perf_counter()

    def end(self, phase: str) -> None:
        """`phase` ends now and the next one begins."""
        now_s = time.perf_counter()
        self.counts[phase] = self.counts.get(phase, 0) + 1
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now_s - self._since_s
        self._since_s = now_s

    def mean_ms(self) -> dict[str, float]:
        """Milliseconds of each phase, mean of the times it ran. Any thread may ask."""
        seconds = dict(self.seconds)  # copied first: its phases are then all in the counts
        counts = dict(self.counts)
        return {phase: 1e3 * total_s / counts[phase] for phase, total_s in seconds.items()}


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

    @property
    def elapsed_s(self) -> float:
        end_s = time.perf_counter() if self.ended_s is None else self.ended_s
        return end_s - self.started_s
