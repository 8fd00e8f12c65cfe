"""A scheduler with its table, its blocks and a plain device in Python, for tests.

The device executes the batches: a slot holds what was written last, and the next token is a hash of
what the block table leads to. One wrong block, position or order shows.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from accounting import check_blocks

from graphengine.block_manager import NULL_BLOCK, BlockManager
from graphengine.request import FinishReason, SamplingParams, Sequence
from graphengine.scheduler import DecodeBatch, PrefillBatch, Scheduler
from graphengine.sequence_table import SequenceTable

VOCAB_SIZE = 50
EOS = 7


def next_token(prefix: list[int]) -> int:
    return zlib.crc32(bytes(prefix)) % VOCAB_SIZE


def make_sequence(
    index: int, prompt: list[int], *, max_tokens: int, stop_ids: tuple[int, ...] = (), **params: Any
) -> Sequence:
    return Sequence(
        index=index,
        request_id=str(index),
        prompt=None,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=index,
        stop_ids=stop_ids,
        max_total=len(prompt) + max_tokens,
    )


def expected_output(sequence: Sequence) -> tuple[list[int], FinishReason]:
    prefix = list(sequence.prompt_token_ids)
    while True:
        num_output = len(prefix) - len(sequence.prompt_token_ids)
        token_id = next_token(prefix)
        prefix.append(token_id)
        output = prefix[len(sequence.prompt_token_ids) :]
        if token_id in sequence.stop_ids and num_output >= sequence.params.min_tokens:
            return output, FinishReason.STOP
        if len(prefix) == sequence.max_total:
            return output, FinishReason.LENGTH


@dataclass
class Device:
    """Executes batches in the order of their launch; tokens stay on it as on the real one."""

    table: SequenceTable
    slots: dict[int, int] = field(default_factory=dict)
    last_token_ids: dict[int, int] = field(default_factory=dict)

    def launch(self, batch: PrefillBatch | DecodeBatch) -> np.ndarray:
        table = self.table
        tokens = []
        if isinstance(batch, DecodeBatch):
            positions = (batch.context_lens - 1).tolist()
            for idx, position in zip(batch.rows.tolist(), positions, strict=True):
                tokens.append(self._step(idx, [self.last_token_ids[idx]], position, samples=True))
        else:
            columns = (batch.rows, batch.starts, batch.ends, batch.samples)
            for idx, start, end, samples in zip(*(c.tolist() for c in columns), strict=True):
                chunk = table.token_ids[idx, start:end].tolist()
                tokens.append(self._step(idx, chunk, start, samples=samples))
        return np.array(tokens, np.int64)

    def _step(self, idx: int, chunk: list[int], start: int, *, samples: bool) -> int:
        blocks = self.table.block_tables[idx].tolist()
        size = self.table.block_size

        def slot(position: int) -> int:
            block = blocks[position // size]
            assert block != NULL_BLOCK
            return block * size + position % size

        for position, token_id in enumerate(chunk, start=start):
            self.slots[slot(position)] = token_id
        if not samples:
            return -1
        prefix = [self.slots[slot(position)] for position in range(start + len(chunk))]
        self.last_token_ids[idx] = next_token(prefix)
        return self.last_token_ids[idx]


class Rig:
    """A scheduler with its table, blocks and device, and a loop with any lag."""

    def __init__(
        self,
        *,
        max_num_seqs: int = 4,
        max_model_len: int = 32,
        block_size: int = 4,
        num_blocks: int = 32,
        budget: int = 64,
    ) -> None:
        self.table = SequenceTable(max_num_seqs, max_model_len, block_size)
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(self.table, self.blocks, max_num_batched_tokens=budget)
        self.device = Device(self.table)
        self.in_flight: deque[tuple[PrefillBatch | DecodeBatch, np.ndarray]] = deque()
        self.batches: list[PrefillBatch | DecodeBatch] = []
        self.finished: list[Sequence] = []
        self.num_tokens = 0

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    def schedule(self) -> PrefillBatch | DecodeBatch | None:
        batch = self.scheduler.schedule()
        self.check()
        if batch is not None:
            if isinstance(batch, DecodeBatch):
                room = self.table.num_blocks[batch.rows] * self.table.block_size
                assert (batch.context_lens <= room).all(), "tokens without a block"
            self.batches.append(batch)
            self.in_flight.append((batch, self.device.launch(batch)))
        return batch

    def commit(self) -> None:
        batch, token_ids = self.in_flight.popleft()
        rows, finished = self.scheduler.commit(batch, token_ids)
        self.num_tokens += len(rows) + len(finished)
        self.finished += finished
        self.check()

    def run(self, *, lag: int = 1, max_turns: int = 5000) -> None:
        """To the end, as the engine does with lag 0 (synchronous) or 1."""
        for _ in range(max_turns):
            batch = self.schedule()
            if self.in_flight and (batch is None or len(self.in_flight) > lag):
                self.commit()
            elif batch is None and not self.scheduler.has_work:
                assert self.blocks.num_free == self.blocks.num_blocks
                return
        pytest.fail("the scheduler does not come to an end")

    def check(self) -> None:
        check_blocks(self.table, self.blocks)

    @property
    def num_rows(self) -> int:
        """Rows that were launched to sample a token."""
        return sum(
            len(batch.rows) if isinstance(batch, DecodeBatch) else int(batch.samples.sum())
            for batch in self.batches
        )


def wrong(sequences: list[Sequence]) -> list[int]:
    return [
        sequence.index
        for sequence in sequences
        if (sequence.output_token_ids, sequence.finish_reason) != expected_output(sequence)
    ]


def prompt_of(index: int, length: int) -> list[int]:
    return [(31 * index + 7 * place) % VOCAB_SIZE for place in range(length)]


def is_noticed(rig: Rig, *, lag: int = 1) -> bool:
    """Whether a run ends wrong, or in an assertion."""
    try:
        rig.run(lag=lag)
    except AssertionError:
        return True
    return wrong(rig.finished) != []
