"""What does a step gather? Per-sequence state as numpy arrays, one line per seq_idx.

Letters: N = max_num_seqs + 1 lines (the last is the null line), L = max_model_len,
W = blocks per sequence, M = stop ids per sequence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from graphengine.block_manager import NULL_BLOCK
from graphengine.config import MAX_STOP_IDS
from graphengine.request import Sequence

Rows = npt.NDArray[np.int64]  # seq_idx


class SequenceTable:
    """A line belongs to one sequence from `acquire` to `release`. `epochs` counts its owners, so a
    late result can be told from one of the present owner.

    Counts per line, in tokens:
    num_prompt; num_tokens: values known to the host; num_launched: known or in flight;
    num_computed: with K/V written or launched; max_total: where a length stop ends it;
    min_total: below it no stop id may be sampled.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        lines = max_num_seqs + 1
        self.max_num_seqs = max_num_seqs
        self.block_size = block_size
        self.width = -(-max_model_len // block_size)
        self.null_idx = max_num_seqs
        # Zeros come from the system untouched, so lines and columns never used take no memory.
        self.token_ids = np.zeros((lines, max_model_len), np.int32)
        self.num_prompt = np.zeros(lines, np.int32)
        self.num_tokens = np.zeros(lines, np.int32)
        self.num_launched = np.zeros(lines, np.int32)
        self.num_computed = np.zeros(lines, np.int32)
        self.max_total = np.zeros(lines, np.int32)
        self.min_total = np.zeros(lines, np.int32)
        self.epochs = np.zeros(lines, np.int64)
        self.arrivals = np.zeros(lines, np.int64)
        self.num_blocks = np.zeros(lines, np.int32)
        self.block_tables = np.full((lines, self.width), NULL_BLOCK, np.int32)
        self.temperature = np.zeros(lines, np.float32)
        self.top_k = np.zeros(lines, np.int32)
        self.top_p = np.ones(lines, np.float32)
        self.min_p = np.zeros(lines, np.float32)
        self.seeds = np.zeros(lines, np.int64)
        # Unused entries repeat a used one, so every entry is a valid id where has_stop_ids is true.
        self.stop_ids = np.zeros((lines, MAX_STOP_IDS), np.int64)
        self.num_stop_places = 0  # columns of stop_ids that any sequence has used so far
        self.suppresses_stops = False  # whether any sequence so far did, at its start
        self.has_stop_ids = np.zeros(lines, np.bool_)
        self.has_stop_strings = np.zeros(lines, np.bool_)
        self.any_stop_strings = False  # of any sequence so far
        self.sequences: list[Sequence | None] = [None] * lines
        self.num_released = 0  # how often a line lost its owner
        self._free = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self, sequence: Sequence, arrival: int) -> int:
        """Gives `sequence` a line and writes what does not change while it runs."""
        idx = self._free.pop()
        params, prompt = sequence.params, sequence.prompt_token_ids
        self.sequences[idx] = sequence
        self.arrivals[idx] = arrival
        self.token_ids[idx, : len(prompt)] = prompt
        self.num_prompt[idx] = self.num_tokens[idx] = self.num_launched[idx] = len(prompt)
        self.num_computed[idx] = 0
        self.max_total[idx] = sequence.max_total
        self.min_total[idx] = min(sequence.max_total, len(prompt) + params.min_tokens)
        self.temperature[idx] = params.temperature
        self.top_k[idx] = params.top_k
        self.top_p[idx] = params.top_p
        self.min_p[idx] = params.min_p
        self.seeds[idx] = sequence.seed
        self.num_stop_places = max(self.num_stop_places, len(sequence.stop_ids))
        self.has_stop_ids[idx] = bool(sequence.stop_ids)
        self.suppresses_stops |= bool(sequence.stop_ids) and params.min_tokens > 0
        self.has_stop_strings[idx] = bool(params.stop)
        self.any_stop_strings |= bool(params.stop)
        self.stop_ids[idx] = sequence.stop_ids[0] if sequence.stop_ids else 0
        self.stop_ids[idx, : len(sequence.stop_ids)] = sequence.stop_ids
        return idx

    def release(self, idx: int) -> None:
        """Ends the owner's time. Its blocks must have been taken by `take_blocks`."""
        assert self.num_blocks[idx] == 0
        self.sequences[idx] = None
        self.num_released += 1
        self.epochs[idx] += 1
        self._free.append(idx)

    def give_blocks(self, idx: int, blocks: list[int]) -> None:
        held = int(self.num_blocks[idx])
        self.block_tables[idx, held : held + len(blocks)] = blocks
        self.num_blocks[idx] = held + len(blocks)

    def give_block_each(self, lines: list[int], blocks: list[int]) -> None:
        """One more block for each of `lines`, in their order."""
        rows = np.array(lines)
        held = self.num_blocks[rows]
        self.block_tables[rows, held] = blocks
        self.num_blocks[rows] = held + 1

    def take_blocks(self, idx: int) -> list[int]:
        """All blocks of the line; its table is null again, so no stale column can be read."""
        held = int(self.num_blocks[idx])
        blocks: list[int] = self.block_tables[idx, :held].tolist()
        self.block_tables[idx, :held] = NULL_BLOCK
        self.num_blocks[idx] = 0
        return blocks

    def output_token_ids(self, idx: int) -> list[int]:
        ids: list[int] = self.token_ids[idx, self.num_prompt[idx] : self.num_tokens[idx]].tolist()
        return ids

    def last_token_id(self, idx: int) -> int:
        return int(self.token_ids[idx, self.num_tokens[idx] - 1])
