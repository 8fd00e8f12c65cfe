"""How is a large JSONL file read, plain or compressed? Line by line, in bounded memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

from graphengine.errors import InputError
from graphengine.jobs.extras import require

# Longer lines are rows in error: no model takes a prompt of millions of tokens.
MAX_LINE_BYTES = 8 << 20
_BOM = b"\xef\xbb\xbf"
# Of compressed data taken at once. Zstandard can blow up a few bytes to 128 KiB.
_ZSTD_CHUNK_BYTES = 4096


class Lines:
    """The lines of a file that are not blank, without their ends; None for one longer than
    MAX_LINE_BYTES. Raises InputError where the file cannot be read on: a read error, or compressed
    data that is broken or ends too soon."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._raw: BinaryIO = path.open("rb")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; give a file that can be read") from error
        self._file = self._open()

    @property
    def num_bytes_read(self) -> int:
        """Of the file as it lies on the disk. Any thread may ask."""
        try:
            return self._raw.tell()
        except ValueError:  # closed meanwhile
            return 0

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._raw.close()

    def __iter__(self) -> Iterator[bytes | None]:
        try:
            is_first = True
            while line := self._file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = self._file.readline(MAX_LINE_BYTES)
                    yield None
                elif text := (line.removeprefix(_BOM) if is_first else line).strip(b" \t\r\n"):
                    yield text
                is_first = False
        except (OSError, EOFError, zlib.error) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self._path}: cannot be read on ({reason}); make the file whole again"
            ) from error

    def _open(self) -> BinaryIO:
        match self._path.suffix.lower():
            case ".gz":
                return cast(BinaryIO, gzip.GzipFile(fileobj=self._raw))
            case ".zst":
                return io.BufferedReader(_ZstdReader(self._raw), 1 << 16)
            case _:
                return self._raw


class _ZstdReader(io.RawIOBase):
    """Decompresses frame after frame. Raises EOFError for a file that ends within one, which
    zstandard's own readers take for its end."""

    def __init__(self, file: BinaryIO) -> None:
        zstandard = require("zstandard")
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._error: type[Exception] = zstandard.ZstdError
        self._frame = self._decompressor.decompressobj()
        self._is_inside = False
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # what io passes
        while not self._plain:
            self._compressed = self._compressed or self._file.read(_ZSTD_CHUNK_BYTES)
            if not self._compressed:
                if self._is_inside:
                    raise EOFError("the compressed data ends within a frame")
                return 0
            try:
                self._plain = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise OSError(str(error)) from error
            self._is_inside, self._compressed = True, b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._is_inside = False
        num_bytes = min(len(buffer), len(self._plain))
        buffer[:num_bytes] = self._plain[:num_bytes]
        self._plain = self._plain[num_bytes:]
        return num_bytes
