"""Where do finished rows go? One JSONL file, or Parquet parts made from a journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson

from graphengine.errors import OutputError
from graphengine.jobs.extras import require
from graphengine.jobs.journal import Journal, output_errors, read_lines, replacing
from graphengine.jobs.row_format import STRING

Record = dict[str, Any]
Check = Callable[[Record], object]

# A journal is made a part at that size too, so that making one takes little memory.
_PART_BYTES = 64 << 20


class Store(Protocol):
    """Finished rows, each once. Everything raises OutputError."""

    def scan(self) -> Iterator[Record]:
        """Every record stored, after repair; must be read to its end before anything is written.
        Of a record at least what `Format.read_back` needs."""

    def append(self, record: Record) -> None:
        """Keeps it in memory, until `flush` at the latest."""

    def flush(self) -> None:
        """Hands what was appended to the system."""

    def close(self) -> None:
        """Blocks until all is on the disk and readable."""

    def replace(self, records: Mapping[int, Record], index_of: Callable[[Record], int]) -> None:
        """Puts these records, by row index, in the place of those stored."""


class JsonlStore:
    def __init__(self, path: Path, check: Check) -> None:
        self._path = path
        self._check = check
        self._journal: Journal | None = None

    def scan(self) -> Iterator[Record]:
        if self._path.exists():
            yield from read_lines(self._path, self._check)

    def append(self, record: Record) -> None:
        if self._journal is None:
            self._journal = Journal(self._path)
        self._journal.append(record)

    def flush(self) -> None:
        if self._journal is not None:
            self._journal.flush()

    def close(self) -> None:
        if self._journal is None:
            # An output without rows is a file too.
            self._journal = Journal(self._path)
        self._journal.flush()
        self._journal.sync()
        self._journal.close()
        self._journal = None

    def replace(self, records: Mapping[int, Record], index_of: Callable[[Record], int]) -> None:
        assert self._journal is None
        _replace_lines(self._path, self._check, records, index_of)


class ParquetStore:
    """part-00000.parquet and so on (zstd). Rows that are not in a part yet are in a journal, named
    after the part it becomes, so that a crash between the two leaves no row twice."""

    def __init__(
        self, path: Path, journal_path: Path, check: Check, *, schema: Any, part_rows: int
    ) -> None:
        """journal_path: a directory. schema: pyarrow's, of all parts."""
        self._path = path
        self._journal_path = journal_path
        self._check = check
        self._schema = schema
        self._part_rows = part_rows
        self._journal: Journal | None = None
        self._number = 0
        self._num_rows = 0  # in the journal

    def scan(self) -> Iterator[Record]:
        pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
        columns = ["id", "row_index", "error"]
        parts = self._parts()
        for part in parts:
            try:
                with parquet.ParquetFile(part) as file:
                    for batch in file.iter_batches(columns=columns):
                        for record in batch.to_pylist():
                            self._check(record)
                            yield record
            except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
                raise OutputError(
                    f"{part}: no whole part of this job ({' '.join(str(error).split())}); restore "
                    "it, or remove the output to start again"
                ) from error
        journals = {_part_number(old): old for old in self._journal_path.glob("part-*.jsonl")}
        # A journal may be further than the parts, where some of them were taken away.
        made = 1 + max((_part_number(part) for part in parts), default=-1)
        self._number = max(made, *journals, 0)
        for number, old in journals.items():
            if number < self._number:
                old.unlink()  # its part was made
        self._num_rows = 0
        if self._journal_file.exists():
            for record in read_lines(self._journal_file, self._check):
                self._num_rows += 1
                yield record

    def append(self, record: Record) -> None:
        if self._journal is None:
            self._journal = Journal(self._journal_file)
        self._journal.append(record)
        self._num_rows += 1
        if self._num_rows >= self._part_rows:
            self.flush()

    def flush(self) -> None:
        if self._journal is None:
            return
        self._journal.flush()
        if self._num_rows >= self._part_rows or self._journal.num_bytes >= _PART_BYTES:
            self._make_parts()

    def close(self) -> None:
        if self._journal is not None:
            self._journal.flush()
        if self._num_rows:
            self._make_parts()
        elif not self._parts():
            self._write(self._path / "part-00000.parquet", [])  # readable, with the schema

    def replace(self, records: Mapping[int, Record], index_of: Callable[[Record], int]) -> None:
        assert self._journal is None
        for journal in self._journal_path.glob("part-*.jsonl"):
            _replace_lines(journal, self._check, records, index_of)
        parquet = require("pyarrow.parquet")
        for part in self._parts():
            rows = parquet.read_table(part, schema=self._schema).to_pylist()
            if any(index_of(row) in records for row in rows):
                self._write(part, [records.get(index_of(row), row) for row in rows])

    @property
    def _journal_file(self) -> Path:
        return self._journal_path / f"part-{self._number:05d}.jsonl"

    def _parts(self) -> list[Path]:
        return sorted(self._path.glob("part-*.parquet"))

    def _make_parts(self) -> None:
        """Makes the journal a part. It was flushed."""
        if self._journal is not None:
            self._journal.sync()
            self._journal.close()
            self._journal = None
        journal = self._journal_file
        rows = list(read_lines(journal, self._check))
        self._write(self._path / f"part-{self._number:05d}.parquet", rows)
        with output_errors(journal):
            journal.unlink()
        self._number += 1
        self._num_rows = 0

    def _write(self, path: Path, rows: list[Record]) -> None:
        pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
        table = pyarrow.Table.from_pylist(rows, schema=self._schema)
        with replacing(path) as part:
            parquet.write_table(table, part, compression="zstd")


def _replace_lines(
    path: Path, check: Check, records: Mapping[int, Record], index_of: Callable[[Record], int]
) -> None:
    if path.exists():
        with replacing(path) as part, part.open("wb") as file:
            for record in read_lines(path, check):
                file.write(orjson.dumps(records.get(index_of(record), record)) + b"\n")


def _part_number(path: Path) -> int:
    return int(path.stem.removeprefix("part-"))


def kept_type(kind: Any) -> str:
    """The type in the output of a column that has the pyarrow type `kind` in the input: the same if
    it is a plain one, else text."""
    types = require("pyarrow.types")
    is_plain = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return str(kind) if is_plain else STRING


def parquet_schema(types: Mapping[str, str], *, token_ids: bool) -> Any:
    """types: of the columns kept, by their name in the output."""
    pa = require("pyarrow")

    def column(name: str, kind: Any) -> Any:
        return pa.field(name, kind, nullable=False)

    kept = [pa.field(name, pa.type_for_alias(kind)) for name, kind in types.items()]
    tokens = [column("token_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)))]
    return pa.schema(
        [
            column("id", pa.string()),
            column("row_index", pa.int64()),
            *kept,
            column("text", pa.string()),
            *(tokens if token_ids else []),
            column("finish_reason", pa.string()),
            column("num_prompt_tokens", pa.int64()),
            column("num_output_tokens", pa.int64()),
            column("error", pa.string()),
        ]
    )
