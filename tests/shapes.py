"""Which shapes are tried beside the chosen ones?"""

from __future__ import annotations

import random


def random_shapes(count: int, *sizes: range, seed: int = 0) -> list[tuple[int, ...]]:
    """The same in each run. sizes: what each number of a shape is drawn from."""
    rng = random.Random(seed)
    return [tuple(rng.choice(size) for size in sizes) for _ in range(count)]
