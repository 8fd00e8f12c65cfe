"""What does a step read? The decode fields and how they are filled; ragged prefill inputs.

Letters: B rows of a decode bucket, T tokens and S sequences of a prefill, W blocks per sequence,
M stop ids per sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from captures import Arena, Field, HostArrays, Layout
from graphengine.attention.base import DecodeMetadata, PrefillMetadata
from graphengine.block_manager import NULL_BLOCK
from graphengine.config import MAX_STOP_IDS
from graphengine.sampler import SamplingTensors
from graphengine.scheduler import DecodeBatch, PrefillBatch
from graphengine.sequence_table import Rows, SequenceTable

TOKEN_IDS = "token_ids"
OUTPUT_FIELDS = (Field(TOKEN_IDS, torch.int64),)
# What a prefill pads its tokens with goes to the null block, as a padded row's of a decode step.
_PREFILL_TOKENS = (
    Field("input_ids", torch.int64),
    Field("positions", torch.int64),
    Field("slot_mapping", torch.int64, pad=NULL_BLOCK),
)


def _sampling_fields() -> tuple[Field, ...]:
    # A padded row is a greedy row: it costs the least. Stop ids are read, and written, only where
    # some row suppresses them.
    return (
        Field("temperature", torch.float32),
        Field("top_k", torch.int32),
        Field("top_p", torch.float32, pad=1.0),
        Field("min_p", torch.float32),
        Field("seeds", torch.int64),
        Field("stop_ids", torch.int64, (MAX_STOP_IDS,)),
        Field("suppress_stops", torch.int32),
    )


def decode_fields(table: SequenceTable) -> tuple[Field, ...]:
    """Inputs of a decode step. A padded row is the null sequence at position 0 of the null block:
    finite values, and all it writes goes where nothing is ever read."""
    return (
        Field("seq_indices", torch.int64, pad=table.null_idx),
        Field("positions", torch.int64),
        Field("slot_mapping", torch.int64, pad=NULL_BLOCK),
        Field("context_lens", torch.int32, pad=1),
        Field("block_tables", torch.int32, (table.width,), pad=NULL_BLOCK),
        *_sampling_fields(),
    )


@dataclass(frozen=True, slots=True)
class Filled:
    """What a bank's memory holds: which rows, the length of the first, and for how many steps more
    no row comes to another block. Until then none is given one, so their block tables stay."""

    rows: Rows
    first_len: int
    num_steps_left: int

    def has_rows_of(self, batch: DecodeBatch) -> bool:
        """Whether what belongs to a sequence all its life is there. The scheduler makes a new array
        wherever its rows, or whose they are, change."""
        return self.rows is batch.rows

    def num_steps_to(self, batch: DecodeBatch) -> int | None:
        """How many steps the rows have gone on since, if all else is there."""
        if not self.has_rows_of(batch):
            return None
        num_steps = int(batch.context_lens[0]) - self.first_len
        return num_steps if 0 <= num_steps <= self.num_steps_left else None


def fill_decode(
    views: HostArrays, batch: DecodeBatch, table: SequenceTable, filled: Filled | None = None
) -> Filled:
    """Writes rows 0..n of `views`, in all that is read, for the n sequences of `batch`. No Python
    per row. filled: what an earlier fill of these views gave, if it is all still there."""
    rows, context_lens = batch.rows, batch.context_lens
    n = len(rows)
    num_steps = None if filled is None else filled.num_steps_to(batch)
    if num_steps is None:
        _fill_places(views, batch, table)
        if filled is None or not filled.has_rows_of(batch):
            views["seq_indices"][:n] = rows
            _fill_sampling(views, rows, table)
    else:
        slots = views["slot_mapping"][:n]
        np.add(slots, num_steps, out=slots)
        np.subtract(context_lens, 1, out=views["positions"][:n])
        views["context_lens"][:n] = context_lens
    if table.suppresses_stops:
        _fill_suppressed(views, rows, context_lens, table)
    return Filled(rows, int(context_lens[0]), batch.num_steps_left)


def _fill_places(views: HostArrays, batch: DecodeBatch, table: SequenceTable) -> None:
    """Where a step reads and writes the cache."""
    rows, context_lens = batch.rows, batch.context_lens
    n = len(rows)
    positions = context_lens - 1
    columns = positions // table.block_size
    blocks = table.block_tables[rows, columns]
    views["positions"][:n] = positions
    # Position within the block: what the columns before this one leave of it.
    slots = np.multiply(blocks - columns, table.block_size, dtype=np.int64)
    np.add(slots, positions, out=views["slot_mapping"][:n])
    views["context_lens"][:n] = context_lens
    np.take(table.block_tables, rows, axis=0, out=views["block_tables"][:n], mode="clip")


def _fill_sampling(views: HostArrays, rows: Rows, table: SequenceTable) -> None:
    """What a sequence has all its life. Nobody suppresses stop ids yet."""
    n = len(rows)
    for name in ("temperature", "top_k", "top_p", "min_p", "seeds"):
        getattr(table, name).take(rows, out=views[name][:n], mode="clip")
    views["suppress_stops"][:n] = 0  # so nobody reads the stop ids


def _fill_suppressed(
    views: HostArrays, rows: Rows, num_before: npt.NDArray[np.int32], table: SequenceTable
) -> None:
    """num_before: int32 [n], tokens each sequence has before the one this step samples."""
    n = len(rows)
    np.take(table.stop_ids, rows, axis=0, out=views["stop_ids"][:n], mode="clip")
    views["suppress_stops"][:n] = table.has_stop_ids[rows] & (num_before < table.min_total[rows])


def decode_metadata(inputs: Mapping[str, torch.Tensor]) -> DecodeMetadata:
    return DecodeMetadata(inputs["slot_mapping"], inputs["block_tables"], inputs["context_lens"])


def sampling_tensors(inputs: Mapping[str, torch.Tensor]) -> SamplingTensors:
    return SamplingTensors(
        temperature=inputs["temperature"],
        top_k=inputs["top_k"],
        top_p=inputs["top_p"],
        min_p=inputs["min_p"],
        seeds=inputs["seeds"],
        stop_ids=inputs["stop_ids"],
        suppress_stops=inputs["suppress_stops"],
    )


class PrefillLayout:
    """Packs a prefill's per-token and per-sequence inputs into one buffer. The per-sequence part
    has S + 1 rows, since cu_seqlens need them; nobody reads the last row of the others."""

    def __init__(self, table: SequenceTable) -> None:
        self._tokens = Arena(_PREFILL_TOKENS)
        self._sequences = Arena(
            (
                Field("seq_indices", torch.int64, pad=table.null_idx),
                Field("last_rows", torch.int64),
                Field("last_positions", torch.int64),
                Field("cu_seqlens_q", torch.int32),
                Field("cu_seqlens_k", torch.int32),
                Field("block_tables", torch.int32, (table.width,), pad=NULL_BLOCK),
                *_sampling_fields(),
            )
        )

    def layouts(self, num_tokens: int, num_sequences: int) -> tuple[Layout, Layout]:
        return self._tokens.layout(num_tokens), self._sequences.layout(num_sequences + 1)


def fill_prefill(
    tokens: HostArrays, sequences: HostArrays, batch: PrefillBatch, table: SequenceTable
) -> None:
    """Writes T rows of `tokens`, and pads those that follow, and S of `sequences`, S + 1 of its
    cu_seqlens, for the S sequences of `batch`.

    A row that samples nothing yet carries the null seq_idx, so its token is fed back to nobody.
    """
    lengths = batch.ends - batch.starts
    ends = np.cumsum(lengths)
    # Row number within the packed tokens > position within its sequence.
    offsets = np.repeat(batch.starts - (ends - lengths), lengths)
    positions = np.arange(int(ends[-1])) + offsets
    rows = np.repeat(batch.rows, lengths)
    blocks = table.block_tables[rows, positions // table.block_size].astype(np.int64)
    num_tokens = len(rows)
    tokens["input_ids"][:num_tokens] = table.token_ids[rows, positions]
    tokens["positions"][:num_tokens] = positions
    slots = blocks * table.block_size + positions % table.block_size
    tokens["slot_mapping"][:num_tokens] = slots
    for field in _PREFILL_TOKENS:
        tokens[field.name][num_tokens:] = field.pad

    n = len(batch.rows)
    sequences["seq_indices"][:n] = np.where(batch.samples, batch.rows, table.null_idx)
    sequences["last_rows"][:n] = ends - 1
    sequences["last_positions"][:n] = batch.ends - 1
    for name, counts in (("cu_seqlens_q", lengths), ("cu_seqlens_k", batch.ends)):
        sequences[name][0] = 0
        sequences[name][1:] = np.cumsum(counts)
    np.take(table.block_tables, batch.rows, axis=0, out=sequences["block_tables"][:n])
    _fill_sampling(sequences, batch.rows, table)
    if table.suppresses_stops:
        _fill_suppressed(sequences, batch.rows, batch.ends.astype(np.int32), table)


def prefill_metadata(
    tokens: Mapping[str, torch.Tensor],
    sequences: Mapping[str, torch.Tensor],
    batch: PrefillBatch,
    *,
    block_size: int,
    with_key_slots: bool,
) -> PrefillMetadata:
    """with_key_slots: see AttentionBackend.reads_key_slots."""
    n = len(batch.rows)
    has_context = bool(batch.starts.any())
    block_tables = sequences["block_tables"][:n]
    key_slots = None
    if has_context and with_key_slots:
        key_slots = _key_slots(
            block_tables, sequences["cu_seqlens_k"], int(batch.ends.sum()), block_size=block_size
        )
    return PrefillMetadata(
        slot_mapping=tokens["slot_mapping"],
        cu_seqlens_q=sequences["cu_seqlens_q"],
        cu_seqlens_k=sequences["cu_seqlens_k"],
        last_rows=sequences["last_rows"][:n],
        block_tables=block_tables,
        max_seqlen_q=int((batch.ends - batch.starts).max()),
        max_seqlen_k=int(batch.ends.max()),
        has_context=has_context,
        key_slots=key_slots,
    )


def _key_slots(
    block_tables: torch.Tensor, cu_seqlens_k: torch.Tensor, num_keys: int, *, block_size: int
) -> torch.Tensor:
    """PrefillMetadata.key_slots, made on the device without a sync: num_keys is cu_seqlens_k's
    last."""
    keys = torch.arange(num_keys, dtype=torch.int32, device=cu_seqlens_k.device)
    rows = torch.bucketize(keys, cu_seqlens_k[1:], right=True)
    positions = keys - cu_seqlens_k[rows]
    return block_tables[rows, positions // block_size].long() * block_size + positions % block_size
