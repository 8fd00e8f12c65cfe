"""What did a run do? Counters the loop advances, and the snapshot a caller sees."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

# Host phases of the loop. "launch" is of decode steps, "prefill" of prefills; "wait" is blocked on
# the device; "output" turns what ended into text, in the shadow of a step.
PHASES = ("intake", "schedule", "launch", "prefill", "output", "wait", "commit")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the stream that runs, or of the last one.

    num_waiting: requests read and not admitted yet. kv_usage: share of KV blocks held.
    gpu_busy: share of the time from the first launch on in which a launch ran on the device, None
    on the CPU; without CUDA graphs it counts the gaps between a launch's kernels as busy.
    decode_ms, prefill_ms: device time of a step, mean. host_ms: host time of a phase, mean of the
    times it ran (PHASES).
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


@dataclass(slots=True)
class RunCounters:
    """Advanced by the loop; cheap enough to be always on."""

    num_finished: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    ended_s: float | None = None
    phase_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    phase_count: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    _lap_s: float = 0.0

    def start_lap(self) -> None:
        """The first phase of a turn begins now."""
        self._lap_s = time.perf_counter()

    def end_lap(self, phase: str) -> None:
        """`phase` ends now and the next one begins."""
        now_s = time.perf_counter()
        self.phase_s[phase] += now_s - self._lap_s
        self.phase_count[phase] += 1
        self._lap_s = now_s

    @property
    def elapsed_s(self) -> float:
        end_s = time.perf_counter() if self.ended_s is None else self.ended_s
        return end_s - self.started_s
