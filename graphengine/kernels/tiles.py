"""Into which pieces is a matrix product cut? Rules, from the product's shape alone.

A product of more than MAX_ROWS rows has one program for each multiprocessor, in one wave: with two
side by side, as a kernel that starts early finds room for, some would take twice as long. So the
shared memory of each cut (num_stages loads of both operands) is more than half of what there is.

The figures behind the rules are in perf/LOG.md. Where a measurement at the first start finds better
(see `tuning`), a decode step's product leaves its rule: `ways` has what it may run in instead.

Letters: N tokens, F output features, C input features, S splits of C, I intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Above this many rows arithmetic counts too: Triton is ahead with small weights alone.
MAX_ROWS = 64
# Rows of a decode step, and elements of a weight, up to which such a product is ours.
_MAX_WIDE_ROWS = 256
_SMALL_WEIGHT = 2**23
# Its programs: at most the 132 multiprocessors, and most of them.
_WIDE_PROGRAMS = range(96, 133)
# Of `gated_linear`: rows of a tile, multiprocessors it is cut for and how many of them are a wave,
# the least weight it is used for, its least depth, and the least share of the waves' tiles that is
# rows and features.
GATED_ROWS = 256
MULTIPROCESSORS = 132
_ONE_WAVE = range(112, MULTIPROCESSORS + 1)
_LEAST_GATED = 2**22
_LEAST_GATED_DEPTH = 512
_LEAST_BUSY = 0.8
# Waves from which on clusters of four take most of the tiles of `gated_linear`.
_LEAST_QUAD_WAVES = 4
# Fewer rows tl.dot does not take.
_MIN_ROWS = 16
# Programs that keep the 132 multiprocessors of an H100 or H200 at work, and the least depth of one.
_MIN_PROGRAMS = 192
_MIN_SPLIT_DEPTH = 512
# Up to 16 rows of a weight of so many elements cuBLAS is ahead: 32 MiB are read for long enough.
_LARGE_WEIGHT = 2**24
# From so many output features on there are programs enough with large tiles: an LM head.
_MANY_FEATURES = 2**15


@dataclass(frozen=True, slots=True)
class WideTiles:
    """block_n rows, and otherwise as `Tiles`."""

    block_n: int
    block_f: int
    block_c: int
    splits: int
    num_stages: int
    num_warps: int


# By rows, up to: the first that gives _WIDE_PROGRAMS is taken. SiLU's hold two block_f x block_c.
_WIDE = {
    128: (
        WideTiles(64, 64, 128, 1, 5, 4),
        WideTiles(64, 32, 128, 1, 5, 4),
        WideTiles(64, 32, 128, 2, 5, 4),
    ),
    _MAX_WIDE_ROWS: (
        WideTiles(128, 64, 64, 1, 5, 4),
        WideTiles(64, 64, 128, 1, 4, 4),
        WideTiles(64, 64, 128, 2, 4, 4),
    ),
}
_WIDE_SILU = {
    128: (WideTiles(128, 32, 64, 1, 5, 4),),
    _MAX_WIDE_ROWS: (WideTiles(128, 64, 64, 1, 6, 8),),
}


@dataclass(frozen=True, slots=True)
class Tiles:
    """block_f x block_c elements of the weight at a time, C in `splits`, so many loads ahead."""

    block_f: int
    block_c: int
    splits: int
    num_stages: int


def linear_tiles(num_rows: int, num_features: int, depth: int, *, whole: bool) -> Tiles | None:
    """How to cut [N, C] x [F, C]; None leaves it to cuBLAS. whole: without splits."""
    if num_rows > MAX_ROWS:
        return None
    padded = padded_rows(num_rows)
    if num_features >= _MANY_FEATURES:
        tiles = {16: Tiles(64, 128, 1, 4), 32: Tiles(128, 128, 1, 3), 64: Tiles(128, 64, 1, 4)}
        return _checked(tiles[padded], num_features, depth)
    if _is_left_to_cublas(padded, num_features * depth):
        return None
    splits = 1
    while (
        not whole
        and num_features // 32 * splits < _MIN_PROGRAMS
        and depth // (2 * splits) >= _MIN_SPLIT_DEPTH
        and depth % (2 * splits * 128) == 0
    ):
        splits *= 2
    return _checked(Tiles(32, 128, splits, 4 if padded == 64 else 6), num_features, depth)


def silu_tiles(num_rows: int, num_features: int, depth: int) -> Tiles | None:
    """How to cut [N, C] x [2I, C] under SiLU, F = I; None leaves the product to cuBLAS."""
    padded = padded_rows(num_rows)
    if num_rows > MAX_ROWS or _is_left_to_cublas(padded, 2 * num_features * depth):
        return None
    if num_features // 64 >= _MIN_PROGRAMS:
        tiles = Tiles(64, 64, 1, 4)
    else:
        tiles = Tiles(32, 128, 1, 4)
    return _checked(tiles, num_features, depth)


def wide_tiles(num_rows: int, num_features: int, depth: int, *, silu: bool) -> WideTiles | None:
    """How to cut the product of more than MAX_ROWS rows of a decode step, [N, C] x [F, C], or
    [N, C] x [2I, C] under SiLU with F = I; None leaves it to cuBLAS. The same for all rows from 65
    to 128 and from 129 to 256."""
    num_elements = num_features * depth * (2 if silu else 1)
    if not MAX_ROWS < num_rows <= _MAX_WIDE_ROWS or num_elements > _SMALL_WEIGHT:
        return None
    cuts = _WIDE_SILU if silu else _WIDE
    max_rows = min(rows for rows in cuts if rows >= num_rows)
    for tiles in cuts[max_rows]:
        num_programs = max_rows // tiles.block_n * (num_features // tiles.block_f) * tiles.splits
        fits = num_features % tiles.block_f == 0 and depth % (tiles.splits * tiles.block_c) == 0
        if fits and num_programs in _WIDE_PROGRAMS:
            return tiles
    return None


def gated_features(num_rows: int, intermediate: int, depth: int) -> int | None:
    """Features of a tile of `gated_linear`, gates and ups, for [N, C] x [2I, C] under SiLU. None
    leaves the product to cuBLAS: a tile takes its time whatever it holds, and so does a wave."""
    is_large = 2 * intermediate * depth >= _LEAST_GATED and depth >= _LEAST_GATED_DEPTH
    if not is_large or intermediate % 16 or depth % 64:
        return None
    features = _gated_features(intermediate)
    # Of blocks, which share their rows.
    num_pairs = math.ceil(num_rows / GATED_ROWS) * math.ceil(intermediate / features)
    waves = math.ceil(2 * num_pairs / MULTIPROCESSORS)
    room = waves * MULTIPROCESSORS * GATED_ROWS * features
    return features if 2 * num_rows * intermediate >= _LEAST_BUSY * room else None


def _gated_features(intermediate: int) -> int:
    """A model's, for any rows: it needs one kernel. GATED_ROWS rows make one wave if they can, of
    the fewest features; else the tiles, large ones, hold the least of what is not there."""
    for features in range(128, 225, 32):
        if 2 * math.ceil(intermediate / features) in _ONE_WAVE:
            return features
    return min((224, 192), key=lambda features: math.ceil(intermediate / features) * features)


def quad_share(row_tiles: int, pairs: int, *, num_blocks: int, num_quads: Callable[[], int]) -> int:
    """How many of `gated_linear`'s tiles, taken two by two, clusters of four take; clusters of two
    beside them take the rest. 0: those take all, since there is little or it would be a wave more.

    row_tiles: below each other. pairs: of tiles beside each other. num_blocks: that run at once, of
    which clusters of four make num_quads(): asked for wherever there are waves enough, so that the
    largest prefill tells whether any needs them."""
    num_pairs = row_tiles * pairs
    waves = math.ceil(2 * num_pairs / num_blocks)
    if waves < _LEAST_QUAD_WAVES:
        return 0
    quads = num_quads()
    share = min(waves * quads, row_tiles // 2 * pairs)
    num_beside = (num_blocks - 4 * quads) // 2
    return share if num_pairs - 2 * share <= waves * num_beside else 0


def padded_rows(num_rows: int) -> int:
    """Rows a program works on: a power of 2."""
    return max(_MIN_ROWS, 1 << (num_rows - 1).bit_length())


def _is_left_to_cublas(padded: int, num_elements: int) -> bool:
    return padded == _MIN_ROWS and num_elements >= _LARGE_WEIGHT


def _checked(tiles: Tiles, num_features: int, depth: int) -> Tiles | None:
    """None for a shape that the tiles do not divide."""
    fits = num_features % tiles.block_f == 0 and depth % (tiles.splits * tiles.block_c) == 0
    return tiles if fits else None
