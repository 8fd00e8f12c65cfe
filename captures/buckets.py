"""Which batch sizes are captured, and which one does a batch run in?"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

# Rows between two neighbouring buckets, from each size on. Padding costs less than a quarter of a
# bucket above 24 rows; a finer ladder costs capture time, which is near 50 ms a bucket at 8B.
_STRIDES = ((8, 8), (64, 16), (128, 32), (256, 64))


class BatchTooLarge(ValueError):
    """More rows than the largest bucket."""


class BucketLadder:
    """Ascending bucket sizes. Raises ValueError for none, duplicates or sizes below 1."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = tuple(sorted(sizes))
        if not self.sizes or self.sizes[0] < 1 or len(set(self.sizes)) != len(self.sizes):
            raise ValueError(f"bucket sizes are {self.sizes}; give distinct sizes of at least 1")

    @classmethod
    def up_to(cls, max_rows: int) -> BucketLadder:
        """The default ladder 1, 2, 4, 8, 16, 24 ... ending exactly at `max_rows`."""
        sizes = [size for size in (1, 2, 4) if size < max_rows]
        size = 8
        while size < max_rows:
            sizes.append(size)
            size += next(stride for start, stride in reversed(_STRIDES) if size >= start)
        return cls([*sizes, max_rows])

    @property
    def max_rows(self) -> int:
        return self.sizes[-1]

    def pick(self, num_rows: int) -> int:
        """Smallest bucket holding `num_rows` rows. Raises BatchTooLarge above the largest;
        the scheduler caps batches at `max_num_seqs`, so a caller seeing it has a bug."""
        if num_rows > self.sizes[-1]:
            raise BatchTooLarge(f"{num_rows} rows, the largest bucket holds {self.sizes[-1]}")
        return self.sizes[bisect.bisect_left(self.sizes, num_rows)]
