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

    def __init__(self, table: SequenceTable, rows: Rows) -> None:
        """rows: int64 [n], n > 0, of sequences that have a token to launch."""
        self._table = table
        self.rows = rows
        self.epochs: Rows = table.epochs[rows]
        self.num_released = table.num_released
        self._num_steps = 0
        self._computed: Counts = table.num_computed[rows]
        launched = table.num_launched[rows]
        # Steps until some sequence has launched its last token, and until some needs a block.
        self._until_last = int((table.max_total[rows] - launched).min())
        self._until_full: Counts = table.num_blocks[rows] * table.block_size - self._computed
        self._until_next_full = int(self._until_full.min())

    @property
    def is_over(self) -> bool:
        """Whether some sequence has launched its last token."""
        return self._num_steps == self._until_last

    def full_rows(self) -> Rows | None:
        """Those that need a block for the next step, if there are any."""
        if self._num_steps < self._until_next_full:
            return None
        full: Rows = self.rows[self._until_full == self._num_steps]
        return full

    def give_blocks(self, blocks: list[int]) -> None:
        """One more for each of full_rows."""
        is_full = self._until_full == self._num_steps
        self._table.give_block_each(self.rows[is_full], blocks)
        self._until_full[is_full] += self._table.block_size
        self._until_next_full = int(self._until_full.min())

    def step(self) -> Counts:
        """One more step. Gives the lengths with its token, int32 [n]."""
        self._num_steps += 1
        return self._computed + np.int32(self._num_steps)

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
