"""Which loads are measured? Fixed, seeded, with real request lengths; `scale` shortens them."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

# (prompt tokens, output tokens) of each request.
Lengths = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Workload:
    """kind "run": the requests through the whole engine. kind "grid": decode steps alone, at
    `points` of (rows, context), with a KV cache of noise. kind "startup": processes.
    shape: the random-weight model of perf/shapes.py it runs on unless another is given.
    draw: the requests at scale 1, which may take a while. lengths: at another.
    max_len: the longest sequence, prompt and output."""

    name: str
    shape: str
    kind: str
    draw: Callable[[], Lengths] = list
    points: tuple[tuple[int, int], ...] = ()

    def lengths(self, scale: float) -> Lengths:
        return shortened(self.draw(), scale)

    def max_len(self, scale: float) -> int:
        if self.kind == "grid":
            return max(scaled(context, scale) for _, context in self.points) + GRID_STEPS
        return max((sum(pair) for pair in self.lengths(scale)), default=256)

    def longest(self) -> int:
        """Tokens of the longest prompt or output, at scale 1. 0 if there are none."""
        return max((length for pair in self.draw() for length in pair), default=0)

    def least_scale(self) -> float:
        """Of the scales with two digits the least that leaves more than one token of some length,
        below which there is no decode step; 0 for a grid, whose steps are always as many."""
        longest = self.longest()
        if longest == 0:
            return 0.0
        return next(scale for scale in _two_digit_scales() if scaled(longest, scale) > 1)


# Steps timed at each point of a grid, after the same number that warms up.
GRID_STEPS = 24
# Past every model: longer ones are no load but a mistake.
MAX_SCALE = 1000


def _two_digit_scales() -> list[float]:
    return [float(f"{digits}e{power}") for power in range(-6, 3) for digits in range(10, 100)]


def scaled(length: int, scale: float) -> int:
    return max(1, round(length * scale))


def shortened(lengths: Lengths, scale: float) -> Lengths:
    return [(scaled(prompt, scale), scaled(new, scale)) for prompt, new in lengths]


def largest_scale(workloads: Sequence[Workload], limit: int) -> float | None:
    """Of the scales with two digits the largest whose sequences have at most `limit` tokens; None
    if the shortest are too long."""
    drawn = [replace(workload, draw=partial(list, workload.draw())) for workload in workloads]
    scales = _two_digit_scales()
    num_fit = bisect.bisect_right(
        scales, limit, key=lambda scale: max(workload.max_len(scale) for workload in drawn)
    )
    return scales[num_fit - 1] if num_fit else None


def _same(num: int, prompt: int, new: int) -> Callable[[], Lengths]:
    return lambda: [(prompt, new)] * num


def mixed(num: int) -> Callable[[], Lengths]:
    """Uniform in 100..1024, drawn as nano-vllm's benchmark draws them: the token ids between the
    lengths too, so that 256 requests come to its published 133,966 output tokens."""

    def draw() -> Lengths:
        rng = random.Random(0)
        prompts = []
        for _ in range(num):
            prompts.append(rng.randint(100, 1024))
            for _ in range(prompts[-1]):
                rng.randint(0, 10000)
        return [(prompt, rng.randint(100, 1024)) for prompt in prompts]

    return draw


_GRID = tuple((rows, context) for context in (256, 1024, 4096) for rows in (1, 8, 32, 64, 128, 256))

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("seed-8b", "llama-8b", "run", _same(32, 256, 8192)),
        Workload("decode-8b", "llama-8b", "grid", points=_GRID),
        Workload("decode-0.6b", "qwen3-0.6b", "grid", points=_GRID),
        # Issue 4 states its limits, and perf/LOG.md its rivals' times, at these points.
        Workload(
            "limits-8b",
            "llama-8b",
            "grid",
            points=((1, 1024), (32, 256), (32, 4096), (256, 1024)),
        ),
        Workload("limits-0.6b", "qwen3-0.6b", "grid", points=((1, 256), (32, 640), (256, 512))),
        Workload("mixed-0.6b", "qwen3-0.6b", "run", mixed(256)),
        # All rows from the first decode step to the last: host time of a step at 256 rows.
        Workload("steady-0.6b", "qwen3-0.6b", "run", _same(256, 256, 512)),
        Workload("mixed-8b", "llama-8b", "run", mixed(512)),
        Workload("prefill-8b", "llama-8b", "run", _same(64, 4096, 16)),
        Workload("latency", "qwen3-0.6b", "run", _same(1, 32, 128)),
        Workload("startup", "llama-8b", "startup"),
    )
}


def token_ids(lengths: Lengths, vocab_size: int) -> list[list[int]]:
    """Seeded prompts of those lengths; the same for every engine and repeat."""
    draw = random.Random(1)
    return [[draw.randrange(vocab_size) for _ in range(prompt)] for prompt, _ in lengths]
