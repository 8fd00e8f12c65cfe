"""How is a finished row kept? As a line appended to a file, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from graphengine.errors import OutputError

# What a power cut can cost at most. A killed process loses nothing that was handed to the system.
SYNC_INTERVAL_S = 5.0
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Makes what the system says of a file an OutputError: a full disk, a directory gone."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in _FULL else "mend that"
        raise OutputError(
            f"{path}: {error.strerror or error}; what is written stays valid, {remedy} and run the "
            "same command again"
        ) from error


class Journal:
    """Lines of JSON. `append` keeps them in memory until `flush` hands them to the system."""

    def __init__(self, path: Path) -> None:
        """Appends to the file; `read_lines` must have repaired it. Raises OutputError."""
        self._path = path
        self._unwritten: list[bytes] = []
        self._is_dirty = False
        self._synced_s = time.monotonic()
        with output_errors(path):
            # Unbuffered: no byte may follow one that did not fit.
            self._file = path.open("ab", buffering=0)
            self._num_bytes = self._file.seek(0, os.SEEK_END)
        if not self._num_bytes:
            sync_directory(path.parent)  # the file may be new

    @property
    def num_bytes(self) -> int:
        """Of the file, what waits for `flush` not counted."""
        return self._num_bytes

    def append(self, record: dict[str, Any]) -> None:
        self._unwritten.append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def flush(self) -> None:
        """Raises OutputError if not all of it fits; then the lines that do are kept."""
        if self._unwritten:
            data = b"".join(self._unwritten)
            self._unwritten.clear()
            with output_errors(self._path):
                self._write(data)
            self._is_dirty = True
        if self._is_dirty and time.monotonic() - self._synced_s >= SYNC_INTERVAL_S:
            self.sync()

    def sync(self) -> None:
        """Blocks until what was flushed is on the disk."""
        with output_errors(self._path):
            os.fsync(self._file.fileno())
        self._is_dirty, self._synced_s = False, time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        num_written = 0
        try:
            while num_written < len(data):
                num_written += self._file.write(memoryview(data)[num_written:])
        except OSError:
            self._num_bytes += data.rfind(b"\n", 0, num_written) + 1
            self._file.truncate(self._num_bytes)
            raise
        self._num_bytes += num_written


def read_lines(path: Path, check: Callable[[dict[str, Any]], object]) -> Iterator[dict[str, Any]]:
    """The records of a journal. What a crash left torn at its end is cut off: a line without an
    end, or lines that a lost power supply left empty.

    Raises OutputError for a broken line that others follow: this is no crash's doing."""
    good_end, end, broken = 0, 0, 0
    with output_errors(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            end += len(line)
            record = _record(line, check)
            if record is None:
                broken = broken or number
                continue
            if broken:
                raise OutputError(
                    f"{path}:{broken}: not a line of this job, but lines of it follow; restore the "
                    "file, or remove it to start again"
                )
            good_end = end
            yield record
    if good_end < end:
        with output_errors(path):
            os.truncate(path, good_end)


def _record(line: bytes, check: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = orjson.loads(line)
        check(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    assert isinstance(record, dict)
    return record


def sync_directory(path: Path) -> None:
    """Blocks until the names in a directory are on the disk."""
    with output_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write instead of `path`, whose name it takes at the end, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        with output_errors(path):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_directory(path.parent)
