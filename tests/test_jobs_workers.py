"""How are rows shared out among workers, and workers among GPUs?

Of a job whose rows are all read, and whose workers take what they are sent.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import job_engines
import pytest
from jobs import config

from graphengine.errors import ConfigError
from graphengine.jobs import loop, workers
from graphengine.jobs.row_format import RowFormat
from graphengine.jobs.row_set import IdTable, RowSet
from graphengine.jobs.rows import Row
from graphengine.jobs.tasks import Task
from graphengine.jobs.watch import Counts
from graphengine.jobs.workers import choose_devices, visible_gpus


class Recorder:
    """Takes the place of a worker's channel."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def send(self, message: dict[str, Any]) -> None:
        self.rows += [index for index, _, _ in message["rows"]]


class Sink:
    def append(self, record: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...


def pool(devices: list[str | None], **engine: Any) -> workers.WorkerPool:
    made = config(Path("in"), Path("out"), engine=engine)
    return workers.WorkerPool(
        devices,
        engine=made.engine,
        sampling=made.sampling,
        token_ids=False,
        environment={},
        factory=job_engines.FACTORY,
    )


def job_of(made: workers.WorkerPool) -> loop.JobLoop:
    """A job whose rows are all read, on workers that take what they are sent."""

    job = loop.JobLoop(
        iter(()),
        pool=made,
        format=RowFormat(config(Path("in"), Path("out")), None),
        ids=IdTable(),
        store=Sink(),
        retried=Sink(),
        retrying=RowSet(),
        counts=Counts(),
        in_input_order=False,
        max_num_seqs=8,
        say=lambda line: None,
    )
    for worker in made.workers:
        worker.is_ready = True
        worker.channel = Recorder()  # type: ignore[assignment]
    return job


def hand_out_all(job: loop.JobLoop) -> list[int]:
    """Until nothing can be handed out; how many rows each worker has."""
    while job._hand_out():
        pass
    return [len(worker.in_flight) for worker in job._pool.workers]


def finish(worker: workers.Worker, count: int) -> None:
    for index in list(worker.in_flight)[:count]:
        worker.take_result(index, 1)


def test_suspects_run_alone_and_on_every_worker_that_has_nothing_else() -> None:
    made = pool([None, None])
    job = job_of(made)
    first, second = made.workers
    sent = [worker.channel.rows for worker in made.workers]  # type: ignore[union-attr]
    job._suspects.extend(Task(index, str(index), "p", num_deaths=2) for index in range(3))
    job._returned.append(Task(9, "9", "p"))
    first.in_flight = {5: Task(5, "5", "p")}
    job._hand_out()  # the second is chosen for the suspects, the first goes on
    assert sent == [[9], [0]]
    job._hand_out()
    assert sent == [[9], [0]], "a suspect has company"
    first.in_flight.clear()
    job._hand_out()
    assert sent == [[9, 1], [0]], "a worker idles"
    job._returned.append(Task(10, "10", "p"))
    job._hand_out()
    assert sent == [[9, 1], [0]], "a suspect has company"
    second.in_flight.clear()
    job._hand_out()
    assert sent == [[9, 1], [0, 2]]


def test_last_rows_wait_where_any_worker_can_have_them() -> None:
    job = job_of(pool([None, None]))
    job._tasks = iter([Task(index, str(index), "p") for index in range(70)])
    # While there is input the workers have rows that wait, and as many as can run are read.
    assert hand_out_all(job) == [17, 17]
    assert len(job._ahead) == 16
    first, second = job._pool.workers
    job._is_read = True
    job._ahead.extend(job._tasks)
    assert len(job._ahead) == 36
    # From now on only those have more that have next to none waiting.
    finish(first, 5)
    assert hand_out_all(job) == [12, 17]
    finish(first, 9)
    assert hand_out_all(job) == [9, 17]
    # No worker takes more than its share of what is unfinished.
    while len(job._ahead) > 4:
        finish(first, 1)
        hand_out_all(job)
    finish(first, len(first.in_flight))
    finish(second, len(second.in_flight))
    assert hand_out_all(job) == [2, 2]
    assert not job._ahead


def test_first_worker_that_is_ready_leaves_the_others_their_share_for_a_while() -> None:
    job = job_of(pool([None, None, None]))
    job._is_read = True
    job._ahead.extend(Task(index, str(index), "p") for index in range(9))
    _, second, third = job._pool.workers
    second.is_ready = third.is_ready = False
    second.process = third.process = cast(Any, "starting")
    job._counts.ready_s = time.perf_counter()
    assert hand_out_all(job) == [3, 0, 0]
    third.is_ready = True
    assert hand_out_all(job) == [3, 0, 3]
    job._counts.ready_s -= loop._START_SPREAD_S
    assert hand_out_all(job) == [5, 0, 4]


def test_busy_share_is_of_the_time_with_rows_and_tokens_are_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr(workers.time, "perf_counter", lambda: now_s)
    (worker,) = pool([None]).workers
    worker.take_ready()
    assert worker.activity() is None
    worker.usage = workers.Usage(output_tokens=30, gpu_busy=0.75)
    worker.in_flight = {index: Task(index, str(index)) for index in range(3)}
    now_s = 104.0
    assert worker.activity() == (4.0, 3.0)
    worker.take_result(0, 10)
    assert worker.running_tokens == 20
    worker.take_result(1, 10)
    worker.take_result(2, 15)  # told later than its row came
    now_s = 110.0
    assert worker.activity() == (4.0, 3.0), "it idles since"
    assert worker.running_tokens == 0
    worker.forget_process()
    now_s = 120.0
    worker.take_ready()
    worker.in_flight = {3: Task(3, "3")}
    worker.usage = workers.Usage(output_tokens=5, gpu_busy=0.5)
    now_s = 122.0
    assert worker.activity() == (6.0, 4.0)
    assert (worker.num_rows, worker.output_tokens, worker.running_tokens) == (3, 35, 5)


def test_bar_outlives_a_worker_that_dies_while_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    (worker,) = pool([None]).workers
    worker.take_ready()
    worker.usage = workers.Usage(output_tokens=30, gpu_busy=0.75)
    worker.in_flight = {0: Task(0, "0")}

    def die() -> float:
        worker.ready_s, worker.usage = None, workers.Usage()
        return 100.0

    worker.ready_s = 96.0
    monkeypatch.setattr(workers.time, "perf_counter", die)
    assert worker.activity() == (4.0, 3.0)


def test_job_is_not_over_while_any_row_waits_or_runs() -> None:
    job = job_of(pool([None, None]))
    assert not job._is_over(), "the input is not read"
    job._is_read = True
    assert job._is_over()
    for waiting in (job._returned, job._ahead, job._suspects):
        waiting.append(Task(0, "0"))
        assert not job._is_over()
        waiting.clear()
    job._pool.workers[1].in_flight[0] = Task(0, "0")
    assert not job._is_over()


def test_worker_set_apart_has_no_share_of_the_last_rows() -> None:
    job = job_of(pool([None, None]))
    job._is_read = True
    job._ahead.extend(Task(index, str(index), "p") for index in range(1, 9))
    job._pool.workers[0].in_flight[0] = Task(0, "0", num_deaths=loop._DEATHS_TO_SUSPECT)
    assert hand_out_all(job) == [1, 8]


def test_fed_busy_share_is_the_last_told_while_rows_were_left() -> None:
    job = job_of(pool([None]))
    (worker,) = job._pool.workers
    for waiting, busy in ((job._ahead, 0.75), (job._returned, 0.5)):
        waiting.append(Task(0, "0"))
        job._take(workers.Event(worker, {"stats": [1, busy]}))
        waiting.clear()
        job._take(workers.Event(worker, {"stats": [2, 0.25]}))
        assert worker.fed_busy == busy
        assert worker.usage == workers.Usage(2, 0.25)


def test_rows_of_two_deaths_are_suspects_and_of_one_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = pool([None])
    job = job_of(made)
    monkeypatch.setattr(made, "reap", lambda worker: -9)
    monkeypatch.setattr(made, "start", lambda: None)
    (worker,) = made.workers
    for num_deaths in (1, 2):
        tasks = job._returned or [Task(index, str(index), "p") for index in range(3)]
        worker.in_flight = {task.index: task for task in tasks}
        job._returned.clear()
        job._bury(worker)
        kept = [job._returned, job._suspects][num_deaths - 1]
        assert [(task.index, task.num_deaths) for task in kept] == [
            (index, num_deaths) for index in range(3)
        ]
    assert not job._returned


def test_stop_is_heeded_between_two_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all workers were started first, for minutes if they were many."""
    made = pool([None] * 5)
    job = job_of(made)
    started: list[workers.Worker] = []

    def start_one(worker: workers.Worker) -> None:
        started.append(worker)
        if len(started) == 2:
            job.stop()

    monkeypatch.setattr(made, "_start", start_one)
    made.start()
    assert started == made.workers[:2]


def test_worker_that_dies_as_the_job_stops_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pool([None])
    job = job_of(made)
    monkeypatch.setattr(made, "reap", lambda worker: -9)
    job._returned.append(Task(0, "0", "p"))
    job.stop()
    job._bury(made.workers[0])
    assert job.error is None


def test_stop_while_a_dead_worker_is_told_of_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """None was started again then, which was taken for a loss: exit code 3, not the signal's."""
    made = pool([None])
    job = job_of(made)
    monkeypatch.setattr(made, "reap", lambda worker: -9)
    job._returned.append(Task(0, "0", "p"))
    job._say = lambda line: job.stop()
    job._bury(made.workers[0])
    assert job.error is None
    assert not job._is_lost


def test_workers_are_spread_over_the_gpus_that_are_visible() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "2,GPU-abc"}
    assert choose_devices(None, device="auto", environment=environment) == ["2", "GPU-abc"]
    three = choose_devices(3, device="cuda", environment=environment)
    assert three == ["2", "GPU-abc", "2"]
    assert choose_devices(1, device="auto", environment=environment) == [None]
    assert choose_devices(3, device="cpu", environment=environment) == [None] * 3
    none = {"CUDA_VISIBLE_DEVICES": ""}
    assert choose_devices(None, device="auto", environment=none) == [None]


LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)
  MIG 3g.40gb     Device  0: (UUID: MIG-a)
  MIG 3g.40gb     Device  1: (UUID: MIG-b)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-3)
"""


def test_gpus_and_their_parts_are_read_from_nvidia_smi(
    tmp_path: Path,
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{LISTED}END\n")
    command.chmod(0o755)
    environment = {"PATH": str(tmp_path)}
    assert visible_gpus(environment) == ["0", "MIG-a", "MIG-b", "2"]
    command.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(ConfigError, match="nvidia-smi -L fails"):
        visible_gpus(environment)
    command.unlink()
    assert visible_gpus(environment) == []


def test_workers_of_one_gpu_take_their_share_of_it_in_turn() -> None:
    made = pool(["0", "1", "0"], gpu_memory_utilization=0.8)
    first, other, second = made.workers
    first.num_starts = other.num_starts = second.num_starts = 1
    shares = [made._engine_of(worker).gpu_memory_utilization for worker in made.workers]
    assert shares == pytest.approx([0.4, 0.8, 0.8])
    made.start()
    try:
        assert [worker.is_alive for worker in made.workers] == [True, True, False]
        first.is_ready = True
        made.start()
        assert second.is_alive
    finally:
        made.close()
    # One that starts again finds the others' memory taken.
    first.num_starts = 2
    assert made._engine_of(first).gpu_memory_utilization == pytest.approx(0.8)


def test_shares_of_a_gpu_are_counted_in_order() -> None:
    made = pool(["0", "1", "0", None, "0"])
    assert [worker.share for worker in made.workers] == [(0, 3), (0, 1), (1, 3), (0, 1), (2, 3)]


def test_each_worker_has_a_trace_of_its_own() -> None:
    made = pool(["0", "1"], trace="a/trace.json")
    assert made._engine_of(made.workers[1]).trace == "a/trace-1.json"
    assert pool([None], trace="a/trace.json")._engine_of(made.workers[0]).trace == "a/trace.json"


def test_rows_in_error_do_not_pile_up_behind_one_that_runs(tmp_path: Path) -> None:
    """With --order input they wait for the first row; reading stops at the window."""
    job = loop.JobLoop(
        (Row(index, {"q": "x"} if index == 0 else None, "bad") for index in range(10**6)),
        pool=pool([None]),
        format=RowFormat(config(tmp_path / "in", tmp_path / "out.jsonl", prompt_column="q"), None),
        ids=IdTable(),
        store=Sink(),
        retried=Sink(),
        retrying=RowSet(),
        counts=Counts(),
        in_input_order=True,
        max_num_seqs=8,
        say=lambda line: None,
    )
    assert job._read_ahead(), "the row that runs"
    while not job._is_window_full():
        assert len(job._ahead) == 1
        job._read_ahead()
    assert not job._read_ahead()
    assert job._order is not None
    assert len(job._order) == job._window


def test_last_suspect_may_go_to_another_worker_than_the_one_that_waits_for_it() -> None:
    job = job_of(pool([None, None]))
    first, second = job._pool.workers
    first.in_flight = {1: Task(1, "1"), 2: Task(2, "2")}
    second.in_flight = {3: Task(3, "3")}
    job._suspects.append(Task(4, "4", num_deaths=2))
    job._is_read = True
    job._hand_out()
    assert job._quarantine is second
    first.in_flight.clear()
    second.in_flight.clear()
    job._hand_out()
    assert [*first.in_flight, *second.in_flight] == [4]
