"""Which sums does the demo model answer, and which of them has its training never seen?

`python -m graphengine.demo.sums` prints the example prompts of `prompts.txt`.
"""

import numpy as np
from numpy.typing import NDArray

MAX_OPERAND = 999
HELDOUT_ONE_IN = 100
NUM_EXAMPLES = 64


def prompt(a: int, b: int) -> str:
    """The text a user types, without the BOS token the tokenizer adds: `7+85=`."""
    return f"{a}+{b}="


def answer(a: int, b: int) -> str:
    """The text the model owes before its EOS token: `92`."""
    return str(a + b)


def is_heldout(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each pair is in the test set; the same for (a, b) and (b, a), so that training
    cannot learn a held-out sum from its mirror image."""
    unordered = np.minimum(a, b) * np.uint64(1000) + np.maximum(a, b)
    heldout: NDArray[np.bool_] = _mix(unordered, salt=1) % np.uint64(HELDOUT_ONE_IN) == 0
    return heldout


def heldout_pairs() -> list[tuple[int, int]]:
    """All held-out pairs, about one in a hundred of the million, in a fixed shuffled order:
    any slice from the front is a fair sample."""
    a, b = np.divmod(np.arange((MAX_OPERAND + 1) ** 2, dtype=np.uint64), np.uint64(1000))
    chosen = is_heldout(a, b)
    a, b = a[chosen], b[chosen]
    order = np.argsort(_mix(a * np.uint64(1000) + b, salt=2), kind="stable")
    return list(zip(a[order].tolist(), b[order].tolist(), strict=True))


def _mix(values: NDArray[np.uint64], *, salt: int) -> NDArray[np.uint64]:
    """MurmurHash3's 32-bit finaliser (fmix32): plain arithmetic, so that the test set does not
    depend on the version of a random number generator."""
    mask = np.uint64(0xFFFFFFFF)
    h = (values ^ np.uint64(salt * 0x9E3779B9)) & mask
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(multiplier)) & mask
    return h ^ (h >> np.uint64(16))


if __name__ == "__main__":
    for pair in heldout_pairs()[:NUM_EXAMPLES]:
        print(prompt(*pair))
