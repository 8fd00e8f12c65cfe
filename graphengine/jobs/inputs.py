"""Which files does a job read? A file, a glob or a directory, in an order that does not change."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphengine.errors import InputError

JSONL = "jsonl"
PARQUET = "parquet"
_SUFFIXES = {
    **{
        name + packed: JSONL
        for name in (".jsonl", ".ndjson", ".json")
        for packed in ("", ".gz", ".zst")
    },
    ".parquet": PARQUET,
}
# Inputs up to this size are hashed whole; of larger ones the two ends of each file are, and the
# time of the last change stands for what lies between them.
_WHOLE_BYTES = 256 << 20
_END_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class InputFile:
    path: Path
    kind: str  # JSONL or PARQUET
    num_bytes: int


def find_inputs(given: str) -> list[InputFile]:
    """The files `given` stands for: sorted by name, and a directory's by path, without those whose
    name or directory begins with "." or "_", as other readers of datasets do.

    Raises InputError if there is none, or if some are JSONL and some Parquet."""
    path = Path(given)
    try:
        is_directory = path.is_dir()
        if is_directory:
            found = [p for p in sorted(_walk(path)) if _kind(p) is not None]
        elif path.exists() or not glob.has_magic(given):
            found = [path]
        else:
            found = [Path(p) for p in sorted(glob.glob(given, recursive=True)) if os.path.isfile(p)]
        if not found:
            what = "directory" if is_directory else "pattern"
            raise InputError(f"{given}: no input in this {what}; {_expected()}")
        files = [_input_file(p) for p in found]
    except OSError as error:
        raise InputError(
            f"{error.filename or given}: {error.strerror}; give a file, a glob or a directory"
        ) from error
    kinds = {file.kind for file in files}
    if len(kinds) > 1:
        raise InputError(f"{given}: holds JSONL and Parquet files; give a glob for one of the two")
    return files


def fingerprint(files: Sequence[InputFile]) -> list[dict[str, object]]:
    """What tells these files from others: name, size and a hash of each. The directory is left out,
    so that a job can move with its input."""
    is_small = sum(file.num_bytes for file in files) <= _WHOLE_BYTES
    return [_fingerprint(file, is_small=is_small) for file in files]


def _walk(directory: Path) -> Iterable[Path]:
    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(directory, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        yield from (Path(folder, name) for name in names if not name.startswith((".", "_")))


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)


def _input_file(path: Path) -> InputFile:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file; a job reads its input again when resumed")
    kind = _kind(path)
    if kind is None:
        raise InputError(f"{path}: not known by its name; {_expected()}")
    with path.open("rb"):  # not allowed to read it: known before a model is loaded
        pass
    return InputFile(path, kind, status.st_size)


def _expected() -> str:
    return "give .jsonl (.ndjson, .json; plain, .gz or .zst) or .parquet files"


def _fingerprint(file: InputFile, *, is_small: bool) -> dict[str, object]:
    try:
        with file.path.open("rb") as opened:
            if is_small:
                return {
                    "name": file.path.name,
                    "num_bytes": file.num_bytes,
                    "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),
                }
            digest = hashlib.sha256(opened.read(_END_BYTES))
            opened.seek(max(0, file.num_bytes - _END_BYTES))
            digest.update(opened.read(_END_BYTES))
            return {
                "name": file.path.name,
                "num_bytes": file.num_bytes,
                "changed_ns": os.fstat(opened.fileno()).st_mtime_ns,
                "sha256_of_ends": digest.hexdigest(),
            }
    except OSError as error:
        raise InputError(f"{file.path}: {error.strerror}; give a file that can be read") from error
