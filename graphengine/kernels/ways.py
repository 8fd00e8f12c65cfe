"""In which ways can a product of a decode step run? The rule's, and others that may be faster.

The rules of `tiles` were found with two models on one kind of card. On an H200 another way of one
product alone took up to a tenth off other models' layers of 48 to 64 rows (perf/LOG.md), so
`tuning` measures those that a model's products have.

Letters: N rows, F output features, C input features, I intermediate.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from graphengine.kernels.tiles import (
    MAX_ROWS,
    MULTIPROCESSORS,
    Tiles,
    WideTiles,
    gated_features,
    linear_tiles,
    silu_tiles,
    wide_tiles,
)

MAX_TUNED_ROWS = 256
# Programs that fill a wave of the 132 multiprocessors, or two to three with less of each.
_FULL_WAVE = range(88, MULTIPROCESSORS + 1)
_SMALL_PROGRAMS = range(200, 3 * MULTIPROCESSORS + 1)
_SPLITS = (1, 2, 4, 8)
_MIN_SPLIT_DEPTH = 512


@dataclass(frozen=True, slots=True)
class Product:
    """[N, C] x [F, C] of a decode step; silu: [N, C] x [2I, C] under SiLU, F = I."""

    num_rows: int
    num_features: int
    depth: int
    silu: bool

    def __str__(self) -> str:
        return f"{self.num_rows}x{self.num_features}x{self.depth}{' silu' if self.silu else ''}"


@dataclass(frozen=True, slots=True)
class GatedTiles:
    """`gated_linear`, with so many features to a tile."""

    features: int


Way = Tiles | WideTiles | GatedTiles | None
"""None is cuBLAS."""


@dataclass(frozen=True, slots=True)
class Means:
    """What a product can run in, by its card, dtype and bias."""

    triton: bool
    tma: bool
    gated: bool


def rule(product: Product, means: Means) -> Way:
    """The way that follows from the shape alone."""
    rows, features, depth = product.num_rows, product.num_features, product.depth
    if means.tma and (wide := wide_tiles(rows, features, depth, silu=product.silu)):
        return wide
    if not product.silu:
        return linear_tiles(rows, features, depth, whole=False) if means.triton else None
    if means.gated and (gated := gated_features(rows, features, depth)):
        return GatedTiles(gated)
    return silu_tiles(rows, features, depth) if means.triton else None


def name_of(way: Way) -> str:
    """Says all of it, so that it means the same whatever rules come to be."""
    if way is None:
        return "cublas"
    if isinstance(way, GatedTiles):
        return f"gated {way.features}"
    if isinstance(way, Tiles):
        return f"tiles {way.block_f}x{way.block_c}/{way.splits} {way.num_stages} ahead"
    cut = f"{way.block_n}x{way.block_f}x{way.block_c}/{way.splits}"
    return f"wide {cut} {way.num_stages} ahead, {way.num_warps} warps"


def ways(product: Product, means: Means) -> dict[str, Way]:
    """By their names, each once: the rule's first."""
    found: list[Way] = [rule(product, means), None]
    if means.triton and product.num_rows <= MAX_ROWS:
        cuts = [((64, 64, 4), _SMALL_PROGRAMS)]
        if not product.silu:
            cuts += [((64, 128, 4), _FULL_WAVE), ((32, 128, 4), _SMALL_PROGRAMS)]
        for (block_f, block_c, num_stages), programs in cuts:
            for splits in _splits(product, block_f, block_c, 1, programs):
                found.append(Tiles(block_f, block_c, splits, num_stages))
    if means.tma:
        for tiles in _wide_cuts(product):
            row_tiles = -(-product.num_rows // tiles.block_n)
            for splits in _splits(product, tiles.block_f, tiles.block_c, row_tiles, _FULL_WAVE):
                found.append(dataclasses.replace(tiles, splits=splits))
    if means.gated and product.silu and product.num_rows > MAX_ROWS:
        # As if its rows were a tile's: the rule leaves it out where a tile would be half empty.
        features = gated_features(MAX_TUNED_ROWS, product.num_features, product.depth)
        if features is not None:
            found.append(GatedTiles(features))
    return {name_of(way): way for way in found}


def _wide_cuts(product: Product) -> list[WideTiles]:
    """Without their splits."""
    if product.silu:
        if product.num_rows <= MAX_ROWS:
            return [WideTiles(64, 64, 64, 1, 5, 4)]
        return [WideTiles(128, 64, 64, 1, 5, 4)]
    if product.num_rows <= MAX_ROWS:
        return [WideTiles(64, 64, 128, 1, 4, 4)]
    if product.num_rows <= 2 * MAX_ROWS:
        return [WideTiles(128, 64, 128, 1, 4, 4), WideTiles(64, 64, 128, 1, 4, 4)]
    return [WideTiles(128, 64, 128, 1, 4, 4)]


def _splits(
    product: Product, block_f: int, block_c: int, row_tiles: int, programs: range
) -> list[int]:
    """Into how many parts of C the product can be cut, with so many programs. SiLU's cannot."""
    found = []
    for splits in _SPLITS[:1] if product.silu else _SPLITS:
        fits = product.num_features % block_f == 0 and product.depth % (splits * block_c) == 0
        num_programs = product.num_features // block_f * splits * row_tiles
        if fits and product.depth // splits >= _MIN_SPLIT_DEPTH and num_programs in programs:
            found.append(splits)
    return found
