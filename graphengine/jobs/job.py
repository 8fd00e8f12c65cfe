"""How is a dataset job run, from its first row or from where it was left?"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console

from graphengine.errors import OutputError
from graphengine.hub import resolve_model
from graphengine.jobs.config import JobConfig
from graphengine.jobs.inputs import InputFile, find_inputs, fingerprint
from graphengine.jobs.journal import Journal, output_errors, read_lines
from graphengine.jobs.loop import JobLoop
from graphengine.jobs.manifest import model_fingerprint, open_manifest
from graphengine.jobs.output import Place
from graphengine.jobs.recognize import make_format, parquet_types, recognize
from graphengine.jobs.row_set import IdTable, RowSet
from graphengine.jobs.rows import RowSource
from graphengine.jobs.store import Store
from graphengine.jobs.tasks import Format
from graphengine.jobs.watch import Counts, JobStats, Outcome, job_line, job_stats
from graphengine.jobs.workers import ENGINE, WorkerPool, choose_devices
from graphengine.progress import Progress

_RETRIED = "retried.jsonl"
_INDEX_LIMIT = 2**63  # of the tables' numbers
# Retried rows whose records are in memory at once.
_REPLACED_AT_ONCE = 50_000


def run_job(
    config: JobConfig,
    *,
    environment: Mapping[str, str],
    console: Console,
    say: Callable[[str], None],
    factory: str = ENGINE,
    counts: Counts | None = None,
) -> Outcome:
    """Runs the job, or goes on with it. environment: of the worker processes. console: for the
    progress bar. say: takes lines for the user. factory: what makes an engine, "module:name".
    counts: advanced as the job runs, for whoever watches it from another thread.

    Raises GraphEngineError for whatever a user can fix before the first row is run, and
    OutputError when the output cannot be written any more."""
    files = find_inputs(config.input)
    place = Place.of(config)
    place.check()
    format_name = recognize(files, config, is_parquet_output=place.is_parquet)
    types = parquet_types(files, config) if place.is_parquet else None
    reads_weights = config.engine.load_format != "dummy"
    model_path = resolve_model(config.engine.model, with_weights=reads_weights)
    tokenizer = config.engine.tokenizer
    tokenizer_path = None if tokenizer is None else resolve_model(tokenizer, with_weights=False)
    devices = choose_devices(config.workers, device=config.engine.device, environment=environment)
    model = model_fingerprint(model_path, tokenizer=tokenizer_path, with_weights=reads_weights)
    with place.locked():
        manifest = open_manifest(
            place.state,
            config={**config.meaning(), "output": place.kind},
            model=model,
            input=fingerprint(files),
            format=format_name,
            has_rows=place.has_rows(),
        )
        format_ = make_format(format_name, config, types, created=manifest["created"])
        store = place.store(format_.read_back, types)
        job = _Job(config, files, format_, place, store)
        job.recover(say)
        pool = WorkerPool(
            devices,
            # Paths, so that no worker asks the hub again. What was measured stays with the job, so
            # that it goes on by it, on other GPUs of the same kind too.
            engine=dataclasses.replace(
                config.engine,
                tuning=_tuning(config.engine.tuning, place.state),
                model=str(model_path),
                tokenizer=None if tokenizer_path is None else str(tokenizer_path),
            ),
            sampling=config.sampling,
            token_ids=config.token_ids,
            environment=environment,
            factory=factory,
        )
        return job.run(pool, console, say, counts or Counts())


def _tuning(option: str, state: Path) -> str:
    return str(state / "products") if option == "auto" else option


class _Job:
    """A job whose output is locked and whose manifest fits."""

    def __init__(
        self,
        config: JobConfig,
        files: list[InputFile],
        format: Format,
        place: Place,
        store: Store,
    ) -> None:
        self._config = config
        self._format = format
        self._store = store
        self._output = place.output
        self._retried_path = place.state / _RETRIED
        self._finished = RowSet()
        self._failed = RowSet()
        self._ids = IdTable()
        self._source = RowSource(files, self._wants, columns=format.columns())

    def recover(self, say: Callable[[str], None]) -> None:
        """Takes up what earlier runs have left: repairs torn ends, puts retried rows in the place
        of those that had failed, and reads which rows are finished."""
        self._take_in_retried()
        for record in self._store.scan():
            stored = self._format.read_back(record)
            self._check_index(stored.index, self._output)
            if not self._finished.add(stored.index):
                raise OutputError(
                    f"{self._output}: row {stored.index} stands there twice, which no job writes; "
                    "restore the output, or remove it to start again"
                )
            if stored.is_failed:
                self._failed.add(stored.index)
            # An error row without an id of its own takes none from another.
            if stored.row_id and not (stored.is_failed and stored.row_id == str(stored.index)):
                self._ids.first_row(stored.row_id, stored.index)
        if len(self._finished):
            say(
                f"going on: {len(self._finished):,} rows are finished, {len(self._failed):,} failed"
            )

    def run(
        self, pool: WorkerPool, console: Console, say: Callable[[str], None], counts: Counts
    ) -> Outcome:
        retrying = self._failed if self._config.retry_errors else RowSet()
        counts.num_before = counts.num_finished = len(self._finished) - len(retrying)
        counts.num_failed = len(self._failed) - len(retrying)
        retried = Journal(self._retried_path)
        loop = JobLoop(
            iter(self._source),
            pool=pool,
            format=self._format,
            ids=self._ids,
            store=self._store,
            retried=retried,
            retrying=retrying,
            counts=counts,
            in_input_order=self._config.order == "input",
            max_num_seqs=self._config.engine.max_num_seqs,
            say=say,
        )

        def total() -> int | None:
            num_rows = self._source.estimate()
            return None if num_rows is None else self._config.shard.num_rows(num_rows)

        def stats() -> JobStats:
            return job_stats(counts, pool.workers, total(), is_exact=self._source.is_exact)

        with _Signals(loop.stop, pool.kill, console) as signals:
            try:
                with Progress(stats, total, console, line=job_line):
                    loop.run()
                final = stats()
                pool.stop()
            finally:
                pool.close()
                retried.close()
            self._store.close()
            self._take_in_retried()
        if not self._finished:  # else rows of an earlier run may have had what none had in this one
            for line in self._format.unmet():
                say(f"warning: {line}")
        return Outcome(self._output, final, signals.signum, loop.error or self._beyond_the_input())

    def _check_index(self, index: int, path: Path) -> None:
        if not 0 <= index < _INDEX_LIMIT or index not in self._config.shard:
            shard = f" of shard {self._config.shard}" if self._config.shard.count > 1 else ""
            raise OutputError(
                f"{path}: row {index} stands there, which is no row{shard}; "
                "restore the output, or remove it to start again"
            )

    def _beyond_the_input(self) -> OutputError | None:
        """That the output has a row which the input has not; known once all of that was read."""
        largest, num_rows = self._finished.largest, self._source.num_seen
        if not self._source.is_at_end or largest < num_rows:
            return None
        return OutputError(
            f"{self._output}: row {largest} stands there, but the input has {num_rows:,} rows, "
            "counted from 0; restore the output, or remove it to start again"
        )

    def _wants(self, index: int) -> bool:
        if index not in self._config.shard:
            return False
        if index in self._finished:
            return self._config.retry_errors and index in self._failed
        return True

    def _take_in_retried(self) -> None:
        """Gives retried rows their place in the output. A crash on the way costs nothing: it is
        done again then."""
        path = self._retried_path
        if not path.exists():
            return

        def index_of(record: Mapping[str, Any]) -> int:
            index = self._format.read_back(record).index
            self._check_index(index, path)
            return index

        lines = read_lines(path, self._format.read_back)
        while batch := {index_of(record): record for record in islice(lines, _REPLACED_AT_ONCE)}:
            self._store.replace(batch, index_of)
        with output_errors(path):
            path.unlink()


class _Signals:
    """The first SIGINT or SIGTERM ends the job in order, the second one at once."""

    def __init__(
        self, stop: Callable[[], None], kill: Callable[[], None], console: Console
    ) -> None:
        self._stop = stop
        self._kill = kill
        self._console = console
        self._earlier: dict[int, Any] = {}
        self.signum: int | None = None

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._earlier[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            self._stop()
            return
        self._kill()
        self._console.show_cursor(True)  # the bar had hidden it
        os._exit(128 + signum)
