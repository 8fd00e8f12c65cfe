"""How does a job run? Hands rows to workers, writes what comes back, and outlives workers."""

from __future__ import annotations

import math
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from graphengine.errors import GraphEngineError, InputError, WorkersLostError
from graphengine.exit_codes import describe_exit
from graphengine.jobs.row_set import IdTable, RowSet
from graphengine.jobs.rows import Row
from graphengine.jobs.tasks import Format, Result, Task
from graphengine.jobs.watch import Counts
from graphengine.jobs.workers import (
    MAX_RESTARTS,
    Event,
    Usage,
    Worker,
    WorkerPool,
)
from graphengine.output_file import MAX_ERRORS_SHOWN, one_line

# A row that two workers died with is handed out alone, so that no other is blamed with it; after
# four deaths, the last two of them alone, it is given up.
_DEATHS_TO_SUSPECT = 2
_DEATHS_TO_GIVE_UP = 4
# Once the input is read, rows are handed out in pieces of a chunk.
_PIECES = 4
# Engines that start together are ready within that of each other; so long the first leaves the
# others their share.
_START_SPREAD_S = 5.0
# With --order input, rows read past the oldest unfinished one, in units of what workers hold.
_WINDOW = 8
# Rows in error that are written before the workers are looked after again.
_MOST_ERRORS_AT_ONCE = 1000
_WAIT_S = 1.0


class Writer(Protocol):
    """A Store or a Journal of retried rows."""

    def append(self, record: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...


class RowOrder:
    """Puts rows that end as they like back into the order they were read in."""

    def __init__(self) -> None:
        self._open: deque[int] = deque()
        self._held: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def read(self, index: int) -> None:
        self._open.append(index)

    def push(self, index: int, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The records whose turn has come with this one."""
        self._held[index] = record
        while self._open and self._open[0] in self._held:
            yield self._held.pop(self._open.popleft())


class JobLoop:
    """error: why the job ended too soon, if it did: the input broke off, or no worker is left. What
    came before is written."""

    def __init__(
        self,
        rows: Iterator[Row],
        *,
        pool: WorkerPool,
        format: Format,
        ids: IdTable,
        store: Writer,
        retried: Writer,
        retrying: RowSet,
        counts: Counts,
        in_input_order: bool,
        max_num_seqs: int,
        say: Callable[[str], None],
    ) -> None:
        """rows: those unfinished. retrying: rows that are stored as failed; their new records go to
        `retried`. ids: of the rows stored."""
        self._pool = pool
        self._format = format
        self._ids = ids
        self._store = store
        self._retried = retried
        self._retrying = retrying
        self._counts = counts
        self._order = RowOrder() if in_input_order else None
        self._say = say
        # Running rows, and as many that wait: an engine admits as many at once as have ended.
        self._max_num_seqs = max_num_seqs
        self._chunk = max(1, max_num_seqs // 8)
        self._limit = 2 * max_num_seqs + self._chunk
        self._window = _WINDOW * self._limit * len(pool.workers)
        self._tasks = self._read(rows)
        self._ahead: deque[Task] = deque()  # read and not handed out
        self._most_ahead = max_num_seqs * len(pool.workers)
        self._returned: deque[Task] = deque()  # of workers that died
        self._suspects: deque[Task] = deque()
        self._quarantine: Worker | None = None  # the worker that suspects wait for
        self._is_read = False
        self._is_read_on = False  # whether reading paused among rows in error
        self._is_stopped = False
        self._is_lost = False
        self._num_shown = 0
        self.error: GraphEngineError | None = None

    def stop(self) -> None:
        """Makes `run` return soon. Safe in a signal handler."""
        self._is_stopped = True
        self._pool.may_start = False
        self._pool.events.put(Event(None, None))

    def run(self) -> None:
        """Until every row is written, the input breaks, no worker is left, or `stop`. Raises
        OutputError if the output cannot be written."""
        while not (self._ahead or self._is_read or self._is_stopped):
            first = next(self._tasks, None)
            if first is not None:
                self._ahead.append(first)
                self._pool.start()
        while not self._is_stopped:
            has_more = self._hand_out()
            self._flush()
            if self._is_over() or self._is_lost:
                break
            self._take_events(0.0 if has_more else _WAIT_S)
        if self._is_stopped:
            self._take_events(0.0)
        self._flush()

    def _is_over(self) -> bool:
        waiting = self._returned or self._ahead or self._suspects
        running = any(worker.in_flight for worker in self._pool.workers)
        return self._is_read and not waiting and not running

    def _flush(self) -> None:
        self._store.flush()
        self._retried.flush()

    # --- out

    def _read(self, rows: Iterator[Row]) -> Iterator[Task | None]:
        """Tasks for the engine; those in error are finished on the way. None now and then among
        many of them, so that the workers are not forgotten."""
        num_errors = 0
        try:
            for row in rows:
                if self._is_stopped:
                    return
                task = self._format.prepare(row)
                if task.row_id and not (task.error and task.row_id == str(task.index)):
                    first = self._ids.first_row(task.row_id, task.index)
                    if first < task.index and not task.error:
                        task.error = (
                            f"id {task.row_id!r} is that of row {first} too; give each its own"
                        )
                if self._order is not None and task.index not in self._retrying:
                    self._order.read(task.index)
                if not task.error:
                    yield task
                    continue
                self._finish(task, Result.failed(task.error))
                num_errors += 1
                if num_errors % _MOST_ERRORS_AT_ONCE == 0 or self._is_window_full():
                    self._flush()
                    self._is_read_on = True
                    yield None
        except InputError as error:
            # The rows before it are finished first.
            self.error = error
        self._is_read = True

    def _hand_out(self) -> bool:
        """Reads ahead and fills the workers up. Whether there is more of either to do at once."""
        ready = [worker for worker in self._pool.workers if worker.is_ready]
        self._choose_quarantine(ready)
        has_more = self._read_ahead()
        for worker in sorted(ready, key=lambda worker: len(worker.in_flight)):
            tasks = self._tasks_for(worker)
            if tasks:
                worker.in_flight |= {task.index: task for task in tasks}
                worker.send({"rows": [[task.index, task.prompt, task.params] for task in tasks]})
                has_more = True
        return has_more

    def _read_ahead(self) -> bool:
        """A chunk for each worker, so that the end of the input is known before the last rows are
        out. Whether more can be read."""
        self._is_read_on = False
        for _ in range(self._chunk * len(self._pool.workers)):
            if len(self._ahead) >= self._most_ahead or self._is_read or self._is_window_full():
                return False
            task = next(self._tasks, None)
            if task is None:  # the end, or rows in error one after another
                return self._is_read_on and not self._is_window_full()
            self._ahead.append(task)
        return True

    def _is_window_full(self) -> bool:
        return self._order is not None and len(self._order) >= self._window

    def _choose_quarantine(self, ready: list[Worker]) -> None:
        """Of the ready workers the one with least to do empties itself for the suspects."""
        if not self._suspects:
            self._quarantine = None
        elif self._quarantine not in ready:
            self._quarantine = min(ready, key=lambda w: len(w.in_flight), default=None)

    def _tasks_for(self, worker: Worker) -> list[Task]:
        if self._is_set_apart(worker):
            is_free = not worker.in_flight and bool(self._suspects)
            return [self._suspects.popleft()] if is_free else []
        waiting = self._returned or self._ahead
        if not waiting and self._suspects and not worker.in_flight:
            return [self._suspects.popleft()]  # rather than have nothing to do
        tasks: list[Task] = []
        for _ in range(self._room(worker)):
            if not waiting:
                break
            tasks.append(waiting.popleft())
        return tasks

    def _is_set_apart(self, worker: Worker) -> bool:
        """Whether it runs a suspect, which is alone with its worker, or empties itself for one."""
        if worker is self._quarantine:
            return True
        if len(worker.in_flight) != 1:
            return False
        (task,) = worker.in_flight.values()
        return task.num_deaths >= _DEATHS_TO_SUSPECT

    def _room(self, worker: Worker) -> int:
        """Rows that it may be given now. While there is input, it holds as many that wait as it
        runs. Then few, and no more than its share of all that is unfinished: no row waits at one
        worker while another idles, and all end together."""
        if not self._is_read:
            return self._chunk if len(worker.in_flight) + self._chunk <= self._limit else 0
        ready_s = self._counts.ready_s
        is_start = ready_s is not None and time.perf_counter() < ready_s + _START_SPREAD_S
        sharing = [
            other
            for other in self._pool.workers
            if (other.is_ready or (is_start and other.is_alive)) and not self._is_set_apart(other)
        ]
        unfinished = len(self._returned) + len(self._ahead)
        unfinished += sum(len(other.in_flight) for other in sharing)
        share = math.ceil(unfinished / len(sharing))
        most = min(self._max_num_seqs + self._chunk, share)
        return max(0, min(math.ceil(self._chunk / _PIECES), most - len(worker.in_flight)))

    # --- in

    def _take_events(self, timeout_s: float) -> None:
        """All that is there; waits for something for `timeout_s`."""
        try:
            self._take(self._pool.events.get(timeout_s > 0.0, timeout_s))
            while True:
                self._take(self._pool.events.get_nowait())
        except queue.Empty:
            return

    def _take(self, event: Event) -> None:
        worker, message = event.worker, event.message
        if worker is None:
            return
        if message is None:
            self._bury(worker)
        elif "result" in message:
            index, *fields = message["result"]
            result = Result(*fields)
            self._finish(worker.take_result(index, result.num_output_tokens), result)
        elif "stats" in message:
            worker.usage = Usage(*message["stats"])
            if self._returned or self._ahead:
                worker.fed_busy = worker.usage.gpu_busy
        elif "ready" in message:
            worker.take_ready()
            if self._counts.ready_s is None:
                self._counts.ready_s = worker.ready_s
            self._pool.start()  # another may have waited for its turn on the same GPU
        else:
            worker.error = message["failed"]

    def _finish(self, task: Task, result: Result) -> None:
        """Writes a row, or holds it until its turn comes."""
        if result.error:
            self._show(task, result.error)
        self._counts.prompt_tokens += result.num_prompt_tokens
        self._counts.output_tokens += result.num_output_tokens
        record = self._format.record(task, result)
        if task.index in self._retrying:
            self._write(self._retried, record)
        elif self._order is None:
            self._write(self._store, record)
        else:
            for ready in self._order.push(task.index, record):
                self._write(self._store, ready)

    def _write(self, writer: Writer, record: dict[str, Any]) -> None:
        writer.append(record)
        self._counts.num_finished += 1
        self._counts.num_failed += self._format.read_back(record).is_failed

    def _show(self, task: Task, error: str) -> None:
        self._num_shown += 1
        if self._num_shown <= MAX_ERRORS_SHOWN:
            self._say(one_line(f"error: row {task.index}: {error}"))
        elif self._num_shown == MAX_ERRORS_SHOWN + 1:
            self._say("more errors are in the output only")

    # --- workers that died

    def _bury(self, worker: Worker) -> None:
        """Its unfinished rows go back, or are given up if they cost too many workers."""
        how = describe_exit(self._pool.reap(worker))
        tasks = list(worker.in_flight.values())
        worker.in_flight.clear()
        if not worker.error:
            self._counts.num_deaths += 1
        for task in reversed(tasks):
            task.num_deaths += 1
            if task.num_deaths >= _DEATHS_TO_GIVE_UP:
                error = f"{task.num_deaths} workers died on it, two of them with no other row"
                self._finish(task, Result.failed(error))
            elif task.num_deaths >= _DEATHS_TO_SUSPECT:
                self._suspects.appendleft(task)
            else:
                self._returned.appendleft(task)
        if self._is_stopped:
            return  # none is started again, and that is not the job's failure
        rows = f"its {len(tasks)} row{'' if len(tasks) == 1 else 's'} will run again"
        if worker.error:
            self._say(one_line(f"worker {worker.number} gave up: {worker.error}"))
        elif worker.can_start:
            nth = f"start {worker.num_starts} of {MAX_RESTARTS}"
            self._say(f"worker {worker.number} died ({how}); {rows}; it is started again, {nth}")
        else:
            self._say(f"worker {worker.number} died ({how}) once too often; {rows}")
        self._pool.start()
        if not any(worker.is_alive for worker in self._pool.workers):
            self._give_up(how)

    def _give_up(self, how: str) -> None:
        """No worker is left. A reason that the engine gave is the user's to mend."""
        if self._is_stopped or self._is_over():
            return
        self._is_lost = True
        reasons = [worker.error for worker in self._pool.workers if worker.error]
        if reasons:
            self.error = GraphEngineError(reasons[-1])
        else:
            self.error = WorkersLostError(
                f"no worker is left, the last one: {how}; what is finished is written, run the "
                "same command again to go on"
            )
