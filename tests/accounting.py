"""Is every KV block accounted for? A scan of tables and free list by their definition alone."""

from __future__ import annotations

from graphengine.block_manager import NULL_BLOCK, BlockManager
from graphengine.sequence_table import SequenceTable


def check_blocks(table: SequenceTable, blocks: BlockManager) -> None:
    """Every block is free or in exactly one table, and no column past a table's end is left."""
    held: list[int] = []
    for idx in range(table.max_num_seqs + 1):
        count = int(table.num_blocks[idx])
        held += table.block_tables[idx, :count].tolist()
        assert (table.block_tables[idx, count:] == NULL_BLOCK).all(), "stale column"
        if table.sequences[idx] is None:
            assert count == 0, "blocks of nobody"
        else:
            assert table.num_computed[idx] <= count * table.block_size, "tokens without a block"
    assert table.sequences[table.null_idx] is None
    assert sorted(held + blocks._free) == list(range(1, blocks.num_blocks + 1))
    assert blocks.num_free == len(blocks._free)
