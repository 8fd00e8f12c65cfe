"""Which rows are finished, and which row has an id? Tables that stay small for millions of rows."""

from __future__ import annotations

import hashlib

import numpy as np

# Bits of a piece: 1 KiB, the least that a row far from all others takes.
_PIECE_BITS = 13


class RowSet:
    """A set of row indices, one bit for each in the pieces that have any."""

    def __init__(self) -> None:
        self._pieces: dict[int, bytearray] = {}
        self._num_rows = 0
        self.largest = -1  # that was ever added

    def __len__(self) -> int:
        return self._num_rows

    def __contains__(self, index: int) -> bool:
        piece = self._pieces.get(index >> _PIECE_BITS)
        if piece is None:
            return False
        byte, bit = _place(index)
        return bool(piece[byte] & bit)

    def add(self, index: int) -> bool:
        """Whether it was new."""
        assert index >= 0
        piece = self._pieces.get(index >> _PIECE_BITS)
        if piece is None:
            piece = self._pieces[index >> _PIECE_BITS] = bytearray(1 << _PIECE_BITS >> 3)
        byte, bit = _place(index)
        is_new = not piece[byte] & bit
        piece[byte] |= bit
        self._num_rows += is_new
        self.largest = max(self.largest, index)
        return is_new

    def remove(self, index: int) -> None:
        """It must be there."""
        assert index in self
        byte, bit = _place(index)
        self._pieces[index >> _PIECE_BITS][byte] &= ~bit
        self._num_rows -= 1


def _place(index: int) -> tuple[int, int]:
    """Byte of a piece, and the bit in it."""
    within = index & ((1 << _PIECE_BITS) - 1)
    return within >> 3, 1 << (within & 7)


class IdTable:
    """The first row of each id, 16 to 48 bytes for each. Ids are told apart by 64 bits of a hash:
    among a million rows two different ones look alike once in 37 million jobs."""

    def __init__(self) -> None:
        self._keys = np.zeros(1024, np.uint64)  # 0: free
        self._rows = np.zeros(1024, np.int64)
        self._num_ids = 0

    def first_row(self, row_id: str, index: int) -> int:
        """The lowest row that this was called with for the id, this one included."""
        if 2 * self._num_ids >= len(self._keys):
            self._grow()
        key = int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest()) or 1
        place = self._place(key)
        if self._keys[place] == 0:
            self._keys[place], self._rows[place] = key, index
            self._num_ids += 1
        elif index < self._rows[place]:
            self._rows[place] = index
        return int(self._rows[place])

    def _place(self, key: int) -> int:
        """Where `key` is, or the free place it would take."""
        mask = len(self._keys) - 1
        place = key & mask
        while self._keys[place] not in (0, key):
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        keys, rows = self._keys, self._rows
        self._keys = np.zeros(2 * len(keys), np.uint64)
        self._rows = np.zeros(2 * len(keys), np.int64)
        for old in np.flatnonzero(keys).tolist():
            place = self._place(int(keys[old]))
            self._keys[place], self._rows[place] = keys[old], rows[old]
