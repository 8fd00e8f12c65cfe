"""How are rows read? One by one from files of any size; rows that are finished are not parsed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from graphengine.errors import InputError
from graphengine.jobs.extras import require
from graphengine.jobs.inputs import PARQUET, InputFile
from graphengine.jobs.lines import MAX_LINE_BYTES, Lines
from graphengine.request import brief

# Of lists and objects in one another. orjson reads 1,024 and writes 254, some of them ours.
_MAX_DEPTH = 200
# Parquet rows decoded at once.
_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Row:
    """index: its place among all rows of the input, files in order, blank lines not counted.
    data: None if it could not be read; `error` then says why."""

    index: int
    data: dict[str, Any] | None
    error: str = ""


class RowSource:
    """The rows that are wanted, in order. Raises InputError where a file cannot be read on."""

    def __init__(
        self,
        files: Sequence[InputFile],
        wants: Callable[[int], bool],
        *,
        columns: frozenset[str] | None = None,
    ) -> None:
        """columns: what is read of a Parquet file; None reads all. wants: may change with time."""
        self._files = files
        self._wants = wants
        self._columns = columns
        self._num_bytes = max(1, sum(file.num_bytes for file in files))
        self._num_bytes_done = 0
        self._lines: Lines | None = None
        self._num_parquet_rows: int | None = None
        self.num_seen = 0
        self.is_at_end = False

    @property
    def is_exact(self) -> bool:
        """Whether `estimate` is the number itself: of Parquet, and at the end."""
        return self.is_at_end or self._num_parquet_rows is not None

    def estimate(self) -> int | None:
        """The number of rows, by the share of bytes read so far where it is not known; None before
        anything is. Any thread may ask."""
        if self.is_at_end:
            return self.num_seen
        if self._num_parquet_rows is not None:
            return self._num_parquet_rows
        lines = self._lines
        num_bytes = self._num_bytes_done + (lines.num_bytes_read if lines else 0)
        if not num_bytes or not self.num_seen:
            return None
        return max(self.num_seen, round(self.num_seen * self._num_bytes / num_bytes))

    def __iter__(self) -> Iterator[Row]:
        if self._files[0].kind == PARQUET:
            self._num_parquet_rows = sum(
                open_parquet(file.path).metadata.num_rows for file in self._files
            )
        for file in self._files:
            read = self._read_parquet if file.kind == PARQUET else self._read_jsonl
            yield from read(file.path)
            self._num_bytes_done += file.num_bytes
        self.is_at_end = True

    def _read_jsonl(self, path: Path) -> Iterator[Row]:
        with Lines(path) as lines:
            self._lines = lines
            for line in lines:
                index = self.num_seen
                self.num_seen += 1
                if self._wants(index):
                    yield _parse(index, line)
            self._lines = None

    def _read_parquet(self, path: Path) -> Iterator[Row]:
        arrow_errors = require("pyarrow").ArrowException
        file = open_parquet(path)
        columns = None
        if self._columns is not None:
            columns = [name for name in file.schema_arrow.names if name in self._columns]
        try:
            for group in range(file.num_row_groups):
                start = self.num_seen
                end = start + file.metadata.row_group(group).num_rows
                # A group that is finished is not even decoded.
                if any(self._wants(index) for index in range(start, end)):
                    batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
                    for batch in batches:
                        first = self.num_seen
                        self.num_seen += batch.num_rows
                        yield from self._batch_rows(batch, first)
                self.num_seen = end
        except (OSError, ValueError, arrow_errors) as error:
            raise InputError(
                f"{path}: cannot be read on after row {self.num_seen} "
                f"({' '.join(str(error).split())}); make the file whole again"
            ) from error
        finally:
            file.close()

    def _batch_rows(self, batch: Any, first: int) -> Iterator[Row]:
        wanted = [place for place in range(batch.num_rows) if self._wants(first + place)]
        if not wanted:
            return
        try:
            entries = batch.to_pylist()
        except (ValueError, OverflowError):  # of one row; it must not cost the others
            for place in wanted:
                yield _decode(first + place, batch.slice(place, 1))
            return
        yield from (Row(first + place, entries[place]) for place in wanted)


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises InputError unless its footer can be read."""
    pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    try:
        # Not memory-mapped and not read ahead: row groups can be larger than the memory.
        file = parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=1 << 20)
        _ = file.schema_arrow  # made of the footer only now
        return file
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(
            f"{path}: no whole Parquet file ({' '.join(str(error).split())}); write it again"
        ) from error


def _parse(index: int, line: bytes | None) -> Row:
    if line is None:
        return Row(index, None, f"the line is longer than {MAX_LINE_BYTES:,} bytes; shorten it")
    try:
        entry = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Row(index, None, f"broken JSON: {error}; give one JSON object on one line")
    if not isinstance(entry, dict):
        return Row(index, None, f"{brief(entry)} is not a JSON object; give one on one line")
    if line.count(b"[") + line.count(b"{") > _MAX_DEPTH and _depth(entry) > _MAX_DEPTH:
        return Row(index, None, f"values are nested more than {_MAX_DEPTH} deep; flatten them")
    return Row(index, entry)


def _depth(entry: object) -> int:
    """Of lists and objects in one another; without recursion, which has a limit itself."""
    depth, level = 0, [entry]
    while level:
        containers = [value for value in level if isinstance(value, dict | list)]
        depth += bool(containers)
        level = [
            inner
            for value in containers
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return depth


def _decode(index: int, one: Any) -> Row:
    try:
        return Row(index, one.to_pylist()[0])
    except UnicodeDecodeError as error:
        return Row(index, None, f"a string is not UTF-8 ({error.reason}); write it again as UTF-8")
    except (ValueError, OverflowError) as error:
        # Python's own times have no nanoseconds.
        with contextlib.suppress(ValueError, OverflowError):
            return Row(index, _nanoseconds_as_text(one).to_pylist()[0])
        return Row(index, None, f"a value is out of range ({error}); write it as text")


def _nanoseconds_as_text(batch: Any) -> Any:
    """The batch with those columns of points in time as strings that Python cannot have."""
    pyarrow = require("pyarrow")

    def readable(column: Any) -> Any:
        try:
            column.to_pylist()
        except (ValueError, OverflowError):
            if pyarrow.types.is_timestamp(column.type):
                return column.cast(pyarrow.string())
        return column

    columns = [readable(column) for column in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
