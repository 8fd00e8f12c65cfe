"""Who runs the engines? Worker processes, one for each GPU; one that dies is started again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from graphengine.config import EngineConfig
from graphengine.errors import ConfigError
from graphengine.jobs.channel import Channel, Message
from graphengine.jobs.tasks import Task
from graphengine.request import SamplingParams

ENGINE = "graphengine.engine:LLM"
# Starts of one worker, the first not counted. With the deaths a row may cost (see loop.py), one
# worker alone gets past a row that kills it.
MAX_RESTARTS = 4
_STOP_S = 10.0
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """message: None once the worker's process is gone. worker: None wakes the job's loop."""

    worker: Worker | None
    message: Message | None


@dataclasses.dataclass(slots=True)
class Usage:
    """Of one process: tokens so far, and the share of the time from its first launch to its last
    in which the GPU was busy; None before the first, and on the CPU."""

    output_tokens: int = 0
    gpu_busy: float | None = None


class Worker:
    """One place for a process; `in_flight` are the tasks it has, by row index."""

    def __init__(self, number: int, device: str | None, share: tuple[int, int]) -> None:
        """device: a GPU's name or number for CUDA_VISIBLE_DEVICES; None leaves it as it is.
        share: its place among the workers of that device, and how many they are."""
        self.number = number
        self.device = device
        self.share = share
        self.in_flight: dict[int, Task] = {}
        self.is_ready = False
        self.num_starts = 0
        self.usage = Usage()
        self.fed_busy: float | None = None  # the last told while there were rows to hand out
        self.num_rows = 0
        self.output_tokens = 0
        # perf_counter: when its last process was ready, and when a row last came back.
        self.ready_s: float | None = None
        self.last_result_s: float | None = None
        # Of its processes that died: seconds they had rows, and the GPU's busy ones among them.
        self._earlier_active_s = 0.0
        self._earlier_busy_s = 0.0
        self._process_tokens = 0
        self.error = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None

    @property
    def is_alive(self) -> bool:
        return self.process is not None

    @property
    def can_start(self) -> bool:
        return self.process is None and self.num_starts <= MAX_RESTARTS and not self.error

    def send(self, message: Message) -> None:
        assert self.channel is not None
        self.channel.send(message)

    def take_ready(self) -> None:
        self.is_ready = True
        self.ready_s = time.perf_counter()

    def take_result(self, index: int, num_output_tokens: int) -> Task:
        """Its task, which it no longer has."""
        self.num_rows += 1
        self.output_tokens += num_output_tokens
        self._process_tokens += num_output_tokens
        self.last_result_s = time.perf_counter()
        return self.in_flight.pop(index)

    @property
    def running_tokens(self) -> int:
        """Of rows that run still, as far as it has told."""
        return max(0, self.usage.output_tokens - self._process_tokens)

    def activity(self) -> tuple[float, float] | None:
        """Seconds in which it had rows, from ready to its last result, and those of them in which
        the GPU was busy. None while no process of it has told of a GPU."""
        active_s, busy_s = self._earlier_active_s, self._earlier_busy_s
        # Read once: the progress bar's thread asks too, and the process may be gone meanwhile.
        gpu_busy, ready_s = self.usage.gpu_busy, self.ready_s
        if gpu_busy is not None and ready_s is not None:
            until_s = time.perf_counter() if self.in_flight else self.last_result_s
            since_ready_s = max(0.0, (until_s or ready_s) - ready_s)
            active_s += since_ready_s
            busy_s += gpu_busy * since_ready_s
        return (active_s, busy_s) if active_s > 0.0 else None

    def forget_process(self) -> None:
        """Its process is gone; what it had done is kept."""
        self._earlier_active_s, self._earlier_busy_s = self.activity() or (0.0, 0.0)
        self.process = self.channel = self.ready_s = None
        self.is_ready = False
        self.usage = Usage()
        self._process_tokens = 0


class WorkerPool:
    """All workers of a job. What they say arrives in `events`, from their threads."""

    def __init__(
        self,
        devices: Sequence[str | None],
        *,
        engine: EngineConfig,
        sampling: SamplingParams,
        token_ids: bool,
        environment: Mapping[str, str],
        factory: str = ENGINE,
    ) -> None:
        """devices: of each worker. environment: of their processes."""
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._engine = engine
        self._told = {
            "sampling": dataclasses.asdict(sampling),
            "token_ids": token_ids,
            "factory": factory,
        }
        self._environment = dict(environment)
        if all(device is None for device in devices) and len(devices) > 1:
            # Each engine would take all cores, and they would wait for each other.
            threads = max(1, (os.cpu_count() or 1) // len(devices))
            self._environment.setdefault("OMP_NUM_THREADS", str(threads))
        # False: a stop came, perhaps between two starts, each of which takes a moment.
        self.may_start = True
        self.workers: list[Worker] = []
        totals, places = Counter(devices), Counter[str | None]()
        for number, device in enumerate(devices):
            self.workers.append(Worker(number, device, (places[device], totals[device])))
            places[device] += 1

    def start(self) -> None:
        """Starts what can be started now. Of workers that share a GPU each waits until the one
        before it has taken its memory."""
        for worker in self.workers:
            if self.may_start and worker.can_start and not self._must_wait(worker):
                self._start(worker)

    def kill(self) -> None:
        """Ends all processes at once. Safe in a signal handler."""
        for worker in self.workers:
            if worker.process is not None:
                worker.process.kill()

    def close(self) -> None:
        """Ends all processes, and waits until they are gone."""
        self.kill()
        for worker in self.workers:
            if worker.process is not None:
                self.reap(worker)

    def stop(self) -> None:
        """Lets the engines close, then ends what has not ended. Blocks; takes no more results."""
        for worker in self.workers:
            if worker.process is not None:
                if worker.is_ready and worker.channel is not None:
                    worker.send({"stop": True})
                else:
                    worker.process.kill()  # it loads a model and would not listen
        for worker in self.workers:
            if worker.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(_STOP_S)
        self.close()

    def reap(self, worker: Worker) -> int:
        """Takes leave of a process that is gone or about to be: its exit status. The worker keeps
        its tasks. Blocks until it is gone."""
        assert worker.process is not None
        assert worker.channel is not None
        status = worker.process.wait()
        worker.channel.close()
        worker.forget_process()
        return status

    def _must_wait(self, worker: Worker) -> bool:
        return worker.device is not None and any(
            other.device == worker.device and other.is_alive and not other.is_ready
            for other in self.workers
        )

    def _start(self, worker: Worker) -> None:
        ours, theirs = socket.socketpair()
        environment = self._environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if worker.device is not None:
            environment[VISIBLE] = worker.device
        with theirs:
            # -P: a file in the directory the job is started in can be no module of the worker's.
            worker.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "graphengine.jobs.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the job's own is for its summary
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        worker.num_starts += 1
        worker.channel = Channel(ours, self._listener(worker, worker.process))
        worker.send(self._told | {"engine": dataclasses.asdict(self._engine_of(worker))})

    def _listener(
        self, worker: Worker, process: subprocess.Popen[bytes]
    ) -> Callable[[Message | None], None]:
        def hear(message: Message | None) -> None:
            if message is None:
                process.wait()  # its end of the socket closes a moment before
            self.events.put(Event(worker, message))

        return hear

    def _engine_of(self, worker: Worker) -> EngineConfig:
        """Its memory is a share of the GPU's with all that others hold, so that of several on one
        GPU each may go as far as its turn; one that starts again finds the others there."""
        place, count = worker.share
        config = self._engine
        if count > 1 and worker.device is not None and worker.num_starts == 1:
            share = config.gpu_memory_utilization * (place + 1) / count
            config = dataclasses.replace(config, gpu_memory_utilization=share)
        if config.trace is not None and len(self.workers) > 1:
            config = dataclasses.replace(config, trace=worker_trace(config.trace, worker.number))
        return config


def worker_trace(trace: str, number: int) -> str:
    """Where that one of several workers writes: t.json -> t-0.json."""
    path = Path(trace)
    return str(path.with_name(f"{path.stem}-{number}{path.suffix}"))


def choose_devices(
    num_workers: int | None, *, device: str, environment: Mapping[str, str]
) -> list[str | None]:
    """The GPU of each worker; None: as the process finds it, or the CPU. num_workers: None is one
    for each GPU, or one on the CPU. More workers than GPUs share them."""
    if num_workers == 1 or device == "cpu":
        return [None] * (num_workers or 1)
    gpus = visible_gpus(environment)
    if not gpus:
        return [None] * (num_workers or 1)
    return [gpus[number % len(gpus)] for number in range(num_workers or len(gpus))]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Those that CUDA_VISIBLE_DEVICES names, or all that nvidia-smi tells of (of a divided one its
    MIG parts). torch knows too, but this process does without it. Raises ConfigError if
    nvidia-smi fails."""
    if VISIBLE in environment:
        return [name.strip() for name in environment[VISIBLE].split(",") if name.strip()]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env=dict(environment),
        ).stdout
    except FileNotFoundError:
        return []
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"nvidia-smi -L fails ({error}); set {VISIBLE}, or choose --device cpu"
        ) from error
    gpus: list[str] = []
    for line in listed.splitlines():
        if found := re.match(r"GPU (\d+):", line):
            gpus.append(found[1])
        elif found := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line):
            if gpus and not gpus[-1].startswith("MIG-"):
                gpus.pop()
            gpus.append(found[1])
    return gpus
