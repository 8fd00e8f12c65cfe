"""What do decode steps change that follow one another? Counted here, and written to the table at
the end of a stretch of them.

A step gives each of its rows one token and no more, so that counts say all. To read and write the
lines of 256 rows in every step, far apart in memory as they are, takes the host longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set

import numpy as np
import numpy.typing as npt

from graphengine.sequence_table import Rows, SequenceTable

Counts = npt.NDArray[np.int32]

_NEVER = 2**62
# Tokens of at most so many steps are written at once: for 256 rows that takes 0.1 ms.
_MOST_STEPS = 32


def are_others(rows: Rows, lines: list[int]) -> npt.NDArray[np.bool_]:
    """bool [n]: which of `rows` are none of `lines`."""
    return rows != lines[0] if len(lines) == 1 else ~np.isin(rows, lines)


class StepStretch:
    """Decode steps scheduled for the same rows, of which some drop out. Until `write`, num_computed
    and num_launched of those that are left are what they were before the first step."""

    def __init__(self, table: SequenceTable, rows: Rows) -> None:
        """rows: int64 [n]. Those that have launched their last token drop out at the first step."""
        self._table = table
        self.rows = rows
        self.epochs: Rows = table.epochs[rows]
        self._num_steps = 0
        self._computed: Counts = table.num_computed[rows]
        self._dropped: set[int] = set()
        to_launch = table.max_total[rows] - table.num_launched[rows]
        room = table.num_blocks[rows] * table.block_size - self._computed
        self._ends = _Dates(rows, to_launch, self._dropped)
        self._blocks_end = _Dates(rows, room, self._dropped)

    def drop_ended(self) -> None:
        """Those that have launched their last token are no rows of the next step."""
        if self._ends.first > self._num_steps:
            return
        ended = self._ends.take(self._num_steps)
        for idx in ended:
            self._table.num_computed[idx] += self._num_steps
            self._table.num_launched[idx] += self._num_steps
        self.drop(ended)

    def drop(self, lines: list[int]) -> None:
        """They are no rows of the next step, if they were of the last. Does not write them. The
        arrays stay the same if nobody drops out for the first time."""
        lines = [idx for idx in lines if idx not in self._dropped]
        if not lines:
            return
        self._dropped.update(lines)
        is_left = are_others(self.rows, lines)
        self.rows = self.rows[is_left]
        self.epochs = self.epochs[is_left]
        self._computed = self._computed[is_left]

    def take_full(self) -> list[int]:
        """The seq_idx of all that need a block for the next step. To be asked once a step."""
        if self._blocks_end.first > self._num_steps:
            return []
        return self._blocks_end.take(self._num_steps)

    def give_blocks(self, full: list[int], blocks: list[int]) -> None:
        """One for each of take_full, in their order."""
        self._table.give_block_each(full, blocks)
        self._blocks_end.put(full, self._num_steps + self._table.block_size)

    def step(self) -> tuple[Counts, int]:
        """One more step, of one row at least. Gives the lengths with its token, int32 [n], and how
        many steps at least may follow before a sequence needs a block."""
        self._num_steps += 1
        return self._computed + np.int32(self._num_steps), self._blocks_end.first - self._num_steps

    def write(self) -> None:
        """Ends the stretch."""
        self._table.num_computed[self.rows] += self._num_steps
        self._table.num_launched[self.rows] += self._num_steps


class _Dates:
    """When is something due for each of some lines? In steps."""

    def __init__(self, rows: Rows, steps: Counts, dropped: Set[int]) -> None:
        """dropped: lines for which nothing is due any more. May grow."""
        order = np.argsort(steps, kind="stable")
        self._lines: deque[int] = deque(rows[order].tolist())
        self._steps: deque[int] = deque(steps[order].tolist())
        self._dropped = dropped

    @property
    def first(self) -> int:
        """No line's comes sooner."""
        return self._steps[0] if self._steps else _NEVER

    def take(self, step: int) -> list[int]:
        """The lines whose date has come by `step`, in their order."""
        lines = []
        while self._steps and self._steps[0] <= step:
            self._steps.popleft()
            idx = self._lines.popleft()
            if idx not in self._dropped:
                lines.append(idx)
        return lines

    def put(self, lines: list[int], step: int) -> None:
        """A new date for lines that were taken, not before any other's."""
        self._lines += lines
        self._steps += [step] * len(lines)


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

    def keep(self, token_ids: npt.NDArray[np.int64]) -> bool:
        """Keeps the next step's tokens, int64 [n], which must not change any more. Gives whether it
        does: not if a sequence can end by one of them, or too many are here by now."""
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
        # By flat places, which takes half as long as by two of them.
        starts = rows * table.token_ids.shape[1] + at
        places = (starts[:, None] + np.arange(num_steps)).ravel()
        token_ids = np.stack(self._token_ids, axis=1).astype(np.int32)
        table.token_ids.reshape(-1)[places] = token_ids.ravel()
        table.num_tokens[rows] = at + num_steps
