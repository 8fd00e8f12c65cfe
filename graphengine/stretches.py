"""What do decode steps of the same rows change? Counted here, and written to the table at the end
of a stretch of them.

A step gives each of its rows one token and no more, so that counts say all. To read and write the
lines of 256 rows in every step, far apart in memory as they are, takes the host longer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from graphengine.sequence_table import Rows, SequenceTable

Counts = npt.NDArray[np.int32]

# Tokens wait in memory of their own for at most so many steps.
_MOST_STEPS = 64


class StepStretch:
    """Decode steps scheduled for the same rows. Until `write`, num_computed and num_launched of
    those lines are what they were before the first. Blocks are given as ever."""

    def __init__(self, table: SequenceTable, rows: Rows, num_left: Counts) -> None:
        """rows: int64 [n], n > 0. num_left: int32 [n], tokens that each sequence has to launch, one
        at least."""
        self._table = table
        self.rows = rows
        self.epochs: Rows = table.epochs[rows]
        self.num_released = table.num_released
        self._num_steps = 0
        self._until_last = int(num_left.min())  # steps until some sequence has launched its last
        self._computed: Counts = table.num_computed[rows]
        # By the step before which they need a block, the first first: seq_idx, and the step.
        until_full = table.num_blocks[rows] * table.block_size - self._computed
        order = np.argsort(until_full, kind="stable")
        self._next_full: list[int] = rows[order].tolist()
        self._full_at: list[int] = until_full[order].tolist()
        self._num_given = 0

    @property
    def is_over(self) -> bool:
        """Whether some sequence has launched its last token."""
        return self._num_steps == self._until_last

    def full(self) -> list[int]:
        """The seq_idx of all that need a block for the next step."""
        start = end = self._num_given
        while end < len(self._full_at) and self._full_at[end] == self._num_steps:
            end += 1
        return self._next_full[start:end]

    def give_blocks(self, blocks: list[int]) -> None:
        """One more for each that is full, in their order."""
        full = self.full()
        self._table.give_block_each(full, blocks)
        # None of the others needs one later than these.
        self._next_full += full
        self._full_at += [self._num_steps + self._table.block_size] * len(full)
        self._num_given += len(full)

    def step(self) -> tuple[Counts, int]:
        """One more step. Gives the lengths with its token, int32 [n], and how many steps may follow
        before some sequence needs a block."""
        self._num_steps += 1
        num_steps_left = self._full_at[self._num_given] - self._num_steps
        return self._computed + np.int32(self._num_steps), num_steps_left

    def write(self) -> None:
        """Ends the stretch. None of its lines may have been released or preempted since."""
        self._table.num_computed[self.rows] += self._num_steps
        self._table.num_launched[self.rows] += self._num_steps


class TokenStretch:
    """Tokens of decode steps of the same rows. Until `write`, token_ids and num_tokens of those
    lines are what they were before the first."""

    def __init__(self, table: SequenceTable, rows: Rows) -> None:
        """rows: int64 [n], n > 0, of sequences that have not ended."""
        self._table = table
        self.rows = rows
        self._token_ids: list[npt.NDArray[np.int64]] = []
        until_last = int((table.max_total[rows] - table.num_tokens[rows]).min())
        self._most_steps = min(_MOST_STEPS, until_last - 1)
        self._stop_ids: npt.NDArray[np.int64] | None = None  # [places, n]
        if table.num_stop_places:
            stop_ids = table.stop_ids.T[: table.num_stop_places].take(rows, axis=1)
            self._stop_ids = np.where(table.has_stop_ids[rows], stop_ids, -1)

    def takes(self, token_ids: npt.NDArray[np.int64]) -> bool:
        """Whether the next step's tokens, int64 [n], are kept here: not if a sequence can end by
        one of them, or too many are here by now. The array must not change any more."""
        if len(self._token_ids) >= self._most_steps:
            return False
        if self._stop_ids is not None and (self._stop_ids == token_ids).any():
            return False
        self._token_ids.append(token_ids)
        return True

    def write(self) -> None:
        """Ends the stretch. None of its lines may have been released since."""
        if not self._token_ids:
            return
        table, rows = self._table, self.rows
        num_steps = len(self._token_ids)
        at = table.num_tokens[rows]
        columns = at[:, None] + np.arange(num_steps)
        table.token_ids[rows[:, None], columns] = np.stack(self._token_ids, axis=1)
        table.num_tokens[rows] = at + num_steps
