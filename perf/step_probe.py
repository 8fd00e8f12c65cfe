"""How long is a decode step at a given batch and context? Steps without prefills before them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import numpy as np

from captures import COMPUTE, DeviceSpan
from graphengine import LLM
from graphengine.model_runner import Launched
from graphengine.scheduler import DecodeBatch
from graphengine.sequence_table import SequenceTable
from perf.workloads import GRID_STEPS

Values = dict[str, tuple[float, str, str]]


class StepProbe:
    """Runs decode steps of an LLM's own runner on sequences that were never prefilled: their KV
    cache holds noise, which takes the same time to read. Overlapped as the engine's loop is."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._runner = llm._runner
        for cache in (*self._runner._kv.k, *self._runner._kv.v):
            cache.normal_()

    def fits(self, rows: int, context: int) -> bool:
        per_row = -(-(context + GRID_STEPS) // self._llm.block_size)
        return (
            rows <= self._llm.config.max_num_seqs
            and rows * per_row <= self._llm.num_blocks
            and context + GRID_STEPS <= self._llm.max_model_len
        )

    def measure(self, rows: int, context: int) -> Values:
        """Medians over GRID_STEPS steps at `context` on average, after as many that warmed up.

        device_ms: of a step, on the device's clock. step_ms: from the end of a step to the end of
        the next. gpu_busy: of the time from the first step's start to the last one's end."""
        steps = self.steps(rows, context)
        steps()
        self._llm._clock.reset()
        spans = steps()
        ends_s = [span.end_s for span in spans]
        times_s = {
            # Of the same steps, so that noise cannot make one look longer than it took.
            "device_ms": [span.end_s - span.start_s for span in spans[1:]],
            "step_ms": [end - before for before, end in itertools.pairwise(ends_s)],
        }
        point = f"[{rows} x {context}]"
        values: Values = {
            f"{name}{point}": (1e3 * statistics.median(seconds), "ms", "lower")
            for name, seconds in times_s.items()
        }
        busy = self._llm._clock.reading.busy_share
        if busy is not None and self._llm._resolved.device.type == "cuda":
            values[f"gpu_busy{point}"] = (busy, "of 1", "higher")
        return values

    def steps(self, rows: int, context: int) -> Callable[[], list[DeviceSpan]]:
        """Runs GRID_STEPS decode steps of `rows` sequences, the first at a context GRID_STEPS / 2
        below `context`, and gives when each ran on the device. Blocks until they have. A point
        must fit."""
        llm, block_size = self._llm, self._llm.block_size
        table = SequenceTable(llm.config.max_num_seqs, llm.max_model_len, block_size)
        first = max(1, context - GRID_STEPS // 2)
        per_row = -(-(first + GRID_STEPS) // block_size)
        blocks = np.random.default_rng(0).permutation(llm.num_blocks)[: rows * per_row] + 1
        lines = np.arange(rows)
        table.block_tables[lines, :per_row] = blocks.reshape(rows, per_row)

        def run() -> list[DeviceSpan]:
            before: Launched | None = None
            for context_len in range(first + 1, first + 1 + GRID_STEPS):
                num_steps_left = block_size - 1 - (context_len - 1) % block_size
                context_lens = np.full(rows, context_len, np.int32)
                epochs = table.epochs[lines]
                batch = DecodeBatch(lines, epochs, 0, context_lens, num_steps_left)
                launched = self._runner.launch(batch, table)
                if before is not None:
                    before.wait()
                before = launched
            assert before is not None
            before.wait()
            spans = [span for span in llm._clock.collect() if span.stream == COMPUTE]
            assert len(spans) == GRID_STEPS
            return spans

        return run
