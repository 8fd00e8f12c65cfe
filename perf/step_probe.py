"""How long is a decode step at a given batch and context? Steps without prefills before them."""

from __future__ import annotations

import time

import numpy as np

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
        """Figures of GRID_STEPS steps whose contexts end at `context` + GRID_STEPS / 2 on average
        `context`; the same number of steps ran before, to warm up."""
        llm, block_size = self._llm, self._llm.block_size
        table = SequenceTable(llm.config.max_num_seqs, llm.max_model_len, block_size)
        first = max(1, context - GRID_STEPS // 2)
        per_row = -(-(first + GRID_STEPS) // block_size)
        blocks = np.random.default_rng(0).permutation(llm.num_blocks)[: rows * per_row] + 1
        lines = np.arange(rows)
        table.block_tables[lines, :per_row] = blocks.reshape(rows, per_row)
        batch = DecodeBatch(lines, table.epochs[lines])
        elapsed_s = 0.0
        for _ in range(2):
            table.num_computed[lines] = first
            table.num_launched[lines] = first + 1
            llm._clock.reset()
            start_s = time.perf_counter()
            self._run(batch, table)
            elapsed_s = time.perf_counter() - start_s
            llm._clock.collect()
        reading = llm._clock.reading
        point = f"[{rows} x {context}]"
        return {
            f"device_ms{point}": (reading.launch_ms["decode"] / GRID_STEPS, "ms", "lower"),
            f"step_ms{point}": (1e3 * elapsed_s / GRID_STEPS, "ms", "lower"),
        }

    def _run(self, batch: DecodeBatch, table: SequenceTable) -> None:
        before: Launched | None = None
        for _ in range(GRID_STEPS):
            table.num_computed[batch.rows] += 1
            table.num_launched[batch.rows] += 1
            launched = self._runner.launch(batch, table)
            if before is not None:
                before.wait()
            before = launched
        assert before is not None
        before.wait()
