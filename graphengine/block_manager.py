"""Which KV blocks are free, and who holds the others?"""

from __future__ import annotations

from collections.abc import Iterable

# Padded rows read and write it; it is never handed out.
NULL_BLOCK = 0


class BlockManager:
    """Blocks 1..num_blocks of the KV cache; block 0 is the null block.

    Freeing is host bookkeeping alone: whatever still runs on a freed block was launched earlier on
    the compute stream than anything its next holder launches.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks, NULL_BLOCK, -1))
        self._is_free = bytearray([0] + [1] * num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks. The caller checks `num_free` first."""
        assert 0 <= count <= len(self._free), (count, len(self._free))
        first = len(self._free) - count
        taken = self._free[first:][::-1]
        del self._free[first:]
        for block in taken:
            self._is_free[block] = 0
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert block != NULL_BLOCK
            assert not self._is_free[block], f"block {block} freed twice"
            self._is_free[block] = 1
            self._free.append(block)
