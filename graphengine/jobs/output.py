"""Where is a job's output, and what is beside it? Paths by name, checks, and the lock."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from graphengine.errors import ConfigError, OutputError
from graphengine.jobs.config import JobConfig
from graphengine.jobs.inputs import find_inputs
from graphengine.jobs.journal import output_errors
from graphengine.jobs.manifest import MANIFEST
from graphengine.jobs.store import JsonlStore, ParquetStore, Store, parquet_schema
from graphengine.output_file import STDOUT, STDOUT_FILENO, check_output_path, is_one_file

_JSONL, _PARQUET = "jsonl", "parquet"
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
# Readers of Parquet directories pass over names that begin so.
_STATE_IN_DIRECTORY = "_job"
_STATE_SUFFIX = ".job"


@dataclass(frozen=True, slots=True)
class Place:
    """output: a JSONL file or a directory of Parquet parts. state: the directory of the manifest,
    the lock, and what is on its way into the output."""

    config: JobConfig
    output: Path
    state: Path
    kind: str

    @classmethod
    def of(cls, config: JobConfig) -> Place:
        """Raises ConfigError for a name that tells no format."""
        given = config.output
        if given == STDOUT:
            raise ConfigError("--output is -, where the summary goes; give a file or a directory")
        path = Path(config.shard.output(given))
        try:
            if path.is_symlink():
                # What the lock and the state are beside is the file itself, whatever its name.
                path = Path(os.path.realpath(path))
            suffix = path.suffix.lower()
            if suffix in _JSONL_SUFFIXES:
                state = path.with_name(path.name + _STATE_SUFFIX)
                state.exists()  # its name is the longer one
                return cls(config, path, state, _JSONL)
            if suffix in ("", ".parquet") or given.endswith("/"):
                path.exists()
                return cls(config, path, path / _STATE_IN_DIRECTORY, _PARQUET)
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise ConfigError(f"--output {given}: {reason}; give another name") from error
        raise ConfigError(
            f"--output {given}: give a .jsonl file, or a directory for Parquet parts (a name "
            "without a suffix, or with .parquet)"
        )

    @property
    def is_parquet(self) -> bool:
        return self.kind == _PARQUET

    def check(self) -> None:
        """Raises ConfigError if the output cannot be written there, and OutputError if something is
        there that no job wrote. Makes nothing."""
        config = self.config
        if self.is_parquet:
            self._check_directory()
        else:
            check_output_path(str(self.output), config.input)
        if self._is_input(self.output / "part-00000.parquet" if self.is_parquet else self.output):
            raise ConfigError(
                f"--output {self.output} is within the input {config.input}, and would be read as "
                "more of it; give another place"
            )
        if self.has_rows() and not (self.state / MANIFEST).exists():
            raise OutputError(
                f"--output {self.output} exists and is no job's; give another name or remove it"
            )

    def check_beside(self, option: str, path: str) -> None:
        """Raises ConfigError if another file of the job would take the output's place, or become
        more of the input."""
        real = Path(os.path.realpath(path))
        places = {Path(os.path.realpath(place)) for place in (self.output, self.state)}
        is_output = not self.is_parquet and is_one_file(path, str(self.output), dash=STDOUT_FILENO)
        if is_output or real in places or places & set(real.parents) or self._is_input(real):
            raise ConfigError(
                f"{option} {path} is within the input or the output of the job; give another place"
            )

    def _is_input(self, path: Path) -> bool:
        """Whether a file there would be read as input, named, in a directory, or by a glob, or is a
        hard link to one that is."""
        given = self.config.input
        if Path(os.path.realpath(given)) in {path, *Path(os.path.realpath(path)).parents}:
            return True
        pattern, name = os.path.abspath(given), os.path.abspath(path)
        # "**/" may stand for nothing, which fnmatch does not know.
        if any(fnmatch.fnmatch(name, p) for p in (pattern, pattern.replace("**/", ""))):
            return True
        try:
            here = os.stat(path)
            # Without a second name it is none; inputs may be many.
            return here.st_nlink > 1 and any(
                os.path.samestat(here, os.stat(file.path)) for file in find_inputs(given)
            )
        except OSError:  # it is not there, or an input no longer
            return False

    def has_rows(self) -> bool:
        with output_errors(self.output):
            if self.is_parquet:
                paths = [*self.output.glob("*.parquet"), *self.state.glob("part-*.jsonl")]
                return any(path.stat().st_size for path in paths)
            return self.output.exists() and self.output.stat().st_size > 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directories and holds the lock, which ends with the process however that ends.
        Raises OutputError if another process has it."""
        with output_errors(self.state):
            self.state.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.state / "lock", blocking=False)
            try:
                lock.acquire()
            except filelock.Timeout as error:
                raise OutputError(
                    f"--output {self.output} is being written by another process; wait for it, or "
                    "give another output"
                ) from error
        try:
            yield
        finally:
            lock.release()

    def store(
        self, check: Callable[[dict[str, Any]], object], types: Mapping[str, str] | None
    ) -> Store:
        """types: of the columns kept, by their name in the input; None for JSONL."""
        if types is None:
            return JsonlStore(self.output, check)
        named = {new: types[old] for old, new in self.config.keep}
        schema = parquet_schema(named, token_ids=self.config.token_ids)
        return ParquetStore(
            self.output, self.state, check, schema=schema, part_rows=self.config.part_rows
        )

    def _check_directory(self) -> None:
        path = self.output
        nearest = next(p for p in (path, *path.parents) if p.exists())
        if not nearest.is_dir():
            raise ConfigError(f"--output {path}: {nearest} is a file; give a directory")
        if nearest not in (path, path.parent, Path(self.config.output).parent):
            raise ConfigError(f"--output {path}: no directory {path.parent}; make it first")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(f"--output {path}: not allowed to write there; give another name")
