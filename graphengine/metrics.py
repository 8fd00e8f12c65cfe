"""What did a run do? Counters the loop advances, and the snapshot a caller sees."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# Host phases of one step. "wait" is blocked on the device, "output" runs in a step's shadow.
PHASES = ("schedule", "launch", "wait", "commit", "output")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the stream that runs, or of the last one.

    num_waiting: requests read and not admitted yet. kv_usage: share of KV blocks held.
    gpu_busy: share of the time from the first launch on in which a launch ran on the device, None
    on the CPU; without CUDA graphs it counts the gaps between a launch's kernels as busy.
    decode_ms, prefill_ms: device time of a step, mean. host_ms: host time of a step by phase, mean.
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
    num_steps: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    ended_s: float | None = None
    phase_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phase_s[name] += time.perf_counter() - start

    @property
    def elapsed_s(self) -> float:
        end = time.perf_counter() if self.ended_s is None else self.ended_s
        return end - self.started_s
