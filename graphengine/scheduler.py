"""Which sequences run in the next step, and what do a step's results change?

Works from counts, never from token values, so that a step can be scheduled while the one before it
still runs. Cost per step does not depend on the number of waiting requests.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graphengine.block_manager import BlockManager
from graphengine.request import FinishReason, Sequence
from graphengine.sequence_table import Rows, SequenceTable
from graphengine.stretches import StepStretch, TokenStretch, are_others

# Free blocks an admission must leave, as a share of the running sequences: each of them needs one
# more block every block_size steps, and the sequence admitted last is the first to be preempted.
_WATERMARK_SHARE = 4


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One token for each sequence in `rows`: seq_idx int64 [n]; epochs int64 [n]. num_released: of
    the table, then. context_lens: int32 [n], with this token. num_steps_left: so many steps of the
    same rows at least may follow this one before one of them comes to another block."""

    rows: Rows
    epochs: Rows
    num_released: int
    context_lens: npt.NDArray[np.int32]
    num_steps_left: int


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Tokens starts[i]..ends[i] of each sequence in `rows`. Where `samples` is false the prompt
    goes on in a later step and the row's token means nothing. int64 [S], samples bool [S]."""

    rows: Rows
    epochs: Rows
    starts: Rows
    ends: Rows
    samples: npt.NDArray[np.bool_]


class Scheduler:
    def __init__(
        self, table: SequenceTable, blocks: BlockManager, *, max_num_batched_tokens: int
    ) -> None:
        self._table = table
        self._blocks = blocks
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._waiting_tokens = 0
        # seq_idx. A line is in exactly one of these three.
        # Running: longest first, equals by arrival. Attention starts its programs in this order,
        # and a long one that starts last is waited for alone. All that are in steps grow alike, so
        # a step's rows stay in order.
        self._running: Rows = np.empty(0, np.int64)
        # Steps and tokens that are not in the table yet.
        self._steps: StepStretch | None = None
        self._tokens: TokenStretch | None = None
        self._last_rows: Rows | None = None  # of the last step whose results are known
        self._prefilling: deque[int] = deque()  # prompt begun, more chunks to come
        self._preempted: list[tuple[int, int]] = []  # (arrival, seq_idx)
        self._num_arrivals = 0
        self._idle_rows = 0
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold a line: decoding, prefilling or preempted."""
        return self._table.max_num_seqs - self._table.num_free

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or self.num_running > 0

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Its max_total fits max_model_len, and one such sequence fits the pool:
        both are checked before, so every sequence can run to its end once it is alone."""
        self._waiting.append(sequence)
        self._waiting_tokens += len(sequence.prompt_token_ids)

    def schedule(self) -> PrefillBatch | DecodeBatch | None:
        """The next step, its counts already advanced as if it had run. None when every running
        sequence waits for a result in flight (or nothing runs)."""
        if self._prefill_is_due():
            prefill = self._schedule_prefill()
            if prefill is not None:
                return prefill
        return self._schedule_decode()

    def commit(
        self, batch: PrefillBatch | DecodeBatch, token_ids: npt.NDArray[np.int64]
    ) -> tuple[Rows, list[Sequence]]:
        """Appends a step's tokens, int64 [n], and ends sequences at stop ids and lengths.

        Returns the rows that got a token and still run, and the sequences that ended. Overshoot
        rows, launched before their sequence was known to have ended, are dropped here and nowhere
        else. Steps must be committed in the order they were scheduled.
        """
        table = self._table
        if self._keep(batch, token_ids):
            return batch.rows, []
        self._write_tokens()
        rows, ids = batch.rows, token_ids
        if isinstance(batch, PrefillBatch) or batch.num_released != table.num_released:
            live = table.epochs[batch.rows] == batch.epochs
            if isinstance(batch, PrefillBatch):
                live &= batch.samples
            rows, ids = rows[live], ids[live]
        at = table.num_tokens[rows]
        table.token_ids[rows, at] = ids
        table.num_tokens[rows] = at + 1
        ended = at + 1 == table.max_total[rows]
        stopped: npt.NDArray[np.bool_] | None = None
        if table.num_stop_places:
            # Place by place, and no more than are in use: rows first would cost three times that.
            stop_ids = table.stop_ids.T[: table.num_stop_places].take(rows, axis=1)
            stopped = (stop_ids == ids).any(axis=0)
            stopped &= table.has_stop_ids[rows] & (at >= table.min_total[rows])
            ended |= stopped
        finished: list[Sequence] = []
        num_ended = np.count_nonzero(ended)
        if num_ended == 0:
            return rows, finished
        are_stops = [False] * num_ended if stopped is None else stopped[ended].tolist()
        lines = rows[ended].tolist()
        self._leave(lines)
        for idx, token_id, is_stop in zip(lines, ids[ended].tolist(), are_stops, strict=True):
            reason = FinishReason.STOP if is_stop else FinishReason.LENGTH
            sequence = table.sequences[idx]
            assert sequence is not None
            given = is_stop and token_id in sequence.params.stop_token_ids
            finished.append(self._end(idx, reason, token_id if given else None))
        return rows[~ended], finished

    def finish(
        self, idx: int, reason: FinishReason, *, stop_reason: int | str | None = None
    ) -> Sequence:
        """Ends a sequence that holds line `idx` and frees its blocks and line."""
        self._write_tokens()
        self._leave([idx])
        return self._end(idx, reason, stop_reason)

    def _leave(self, lines: list[int]) -> None:
        """They are no rows of any later step."""
        if self._steps is not None:
            self._steps.drop(lines)
        self._running = self._running[are_others(self._running, lines)]
        if self._preempted:
            self._preempted = [entry for entry in self._preempted if entry[1] not in lines]

    def _end(self, idx: int, reason: FinishReason, stop_reason: int | str | None) -> Sequence:
        """Of a sequence that has left; its tokens are written."""
        table = self._table
        sequence = table.sequences[idx]
        assert sequence is not None
        sequence.output_token_ids = table.output_token_ids(idx)
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        self._blocks.free(table.take_blocks(idx))
        table.release(idx)
        return sequence

    def _keep(self, batch: PrefillBatch | DecodeBatch, token_ids: npt.NDArray[np.int64]) -> bool:
        """Keeps a step's tokens for later, if nobody ends by them and nobody asks for them before.
        Gives whether it does."""
        table = self._table
        if isinstance(batch, PrefillBatch) or batch.num_released != table.num_released:
            return False
        if table.any_stop_strings:
            return False
        if self._tokens is None or self._tokens.rows is not batch.rows:
            # Not before the same rows come again: where somebody ends in each step, stretches of
            # one would cost more than steps that write their own.
            is_second = batch.rows is self._last_rows
            self._last_rows = batch.rows
            if not is_second:
                return False
            self._tokens = TokenStretch(table, batch.rows)
        return self._tokens.keep(token_ids)

    def _write_steps(self) -> None:
        if self._steps is not None:
            self._steps.write()
            self._steps = None

    def _write_tokens(self) -> None:
        if self._tokens is not None:
            self._tokens.write()
            self._tokens = None

    # --- prefill

    def _prefill_is_due(self) -> bool:
        """Whether prefilling now beats waiting for more prompts.

        A prefill stalls the running rows for about one weight read whatever its size; each step of
        waiting leaves the rows it could fill idle. Waiting until the idle rows add up to the rows
        stalled costs at most twice the best choice (the ski-rental rule). Prompts that fill a step
        by now gain nothing by more waiting.
        """
        if self._prefilling or len(self._running) == 0:
            return True
        fresh = min(self._table.num_free, len(self._waiting))
        if fresh + len(self._preempted) == 0:
            self._idle_rows = 0
            return False
        # By the mean length of those that wait: adding up theirs would cost a walk every step.
        tokens = fresh * self._waiting_tokens // len(self._waiting) if fresh else 0
        self._idle_rows += fresh + len(self._preempted)
        return tokens >= self._max_num_batched_tokens or self._idle_rows >= len(self._running)

    def _schedule_prefill(self) -> PrefillBatch | None:
        table = self._table
        budget = self._max_num_batched_tokens
        entries: list[tuple[int, int, int, bool]] = []
        while budget > 0 and (self._prefilling or self._admit()):
            idx = self._prefilling[0]
            start, total = int(table.num_computed[idx]), int(table.num_tokens[idx])
            end = min(total, start + budget)
            entries.append((idx, start, end, end == total))
            budget -= end - start
            table.num_computed[idx] = end
            if end == total:
                table.num_launched[idx] = total + 1
                self._prefilling.popleft()
        if not entries:
            return None
        self._idle_rows = 0
        self._write_steps()
        rows, starts, ends, samples = (np.array(column) for column in zip(*entries, strict=True))
        started = np.concatenate([self._running, rows[samples]])
        order = np.lexsort((table.arrivals[started], -table.num_computed[started]))
        self._running = started[order]
        return PrefillBatch(rows, table.epochs[rows], starts, ends, samples)

    def _admit(self) -> bool:
        """Moves the next preempted or waiting sequence to prefilling if its blocks are free."""
        table, blocks = self._table, self._blocks
        if self._preempted:
            _, idx = self._preempted[0]
            self._write_tokens()
            # Its tokens in flight are not known to the host yet, so they cannot be prefilled.
            if table.num_launched[idx] != table.num_tokens[idx]:
                return False
        elif self._waiting and table.num_free:
            idx = -1
        else:
            return False
        prompt = self._waiting[0].prompt_token_ids if idx < 0 else ()
        needed = blocks.blocks_for(len(prompt) or int(table.num_tokens[idx]))
        watermark = len(self._running) // _WATERMARK_SHARE
        if needed > blocks.num_free - watermark:
            return False
        if idx >= 0:
            self._preempted.pop(0)
        else:
            self._waiting_tokens -= len(prompt)
            idx = table.acquire(self._waiting.popleft(), self._num_arrivals)
            self._num_arrivals += 1
        table.give_blocks(idx, blocks.allocate(needed))
        self._prefilling.append(idx)
        return True

    # --- decode

    def _schedule_decode(self) -> DecodeBatch | None:
        table = self._table
        if self._steps is None:
            self._steps = StepStretch(table, self._running)
        steps = self._steps
        # A sequence whose last token is in flight needs no row: length stops never overshoot.
        steps.drop_ended()
        if full := steps.take_full():
            if len(full) <= self._blocks.num_free:
                steps.give_blocks(full, self._blocks.allocate(len(full)))
            else:
                self._write_steps()
                self._preempt_for(full, steps.rows)
                steps = self._steps = StepStretch(table, self._running)
                steps.drop_ended()
        if len(steps.rows) == 0:
            return None
        rows, epochs = steps.rows, steps.epochs
        return DecodeBatch(rows, epochs, table.num_released, *steps.step())

    def _preempt_for(self, full: list[int], rows: Rows) -> None:
        """One more block for each of `full`, some of `rows`, or for those of them that are left:
        the one that arrived last gives up its own."""
        table, blocks = self._table, self._blocks
        preempted: set[int] = set()
        candidates = rows[np.argsort(table.arrivals[rows])].tolist()
        for idx in full:
            while idx not in preempted and blocks.num_free == 0:
                victim = candidates.pop()
                self._preempt(victim)
                preempted.add(victim)
            if idx not in preempted:
                table.give_blocks(idx, blocks.allocate(1))

    def _preempt(self, idx: int) -> None:
        """Frees a sequence's blocks; it is prefilled again, output included, when there is room."""
        table = self._table
        self._blocks.free(table.take_blocks(idx))
        table.num_computed[idx] = 0
        self._running = self._running[self._running != idx]
        insort(self._preempted, (int(table.arrivals[idx]), idx))
        self.num_preemptions += 1
