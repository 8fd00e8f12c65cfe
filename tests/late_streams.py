"""What if every copy ran as late as its events allow? Streams that show a missing event."""

from __future__ import annotations

from collections.abc import Callable

import torch

from captures import COMPUTE, CpuStreams
from captures.streams import check_copy


class _LateEvent:
    def __init__(self, streams: LateStreams, name: str) -> None:
        self.name = name
        self.streams = streams
        self.mark: tuple[str, int] | None = None  # stream, number of its ops before

    def synchronize(self) -> None:
        self.streams.catch_up(self)

    def query(self) -> bool:
        return self.mark is None or self.streams.done[self.mark[0]] >= self.mark[1]

    def elapsed_ms(self, end: object) -> float:
        return 1.0


class LateStreams(CpuStreams):
    """Compute runs at once; a copy only when an event that somebody waits for needs it. What a
    copy reads is what its source holds then."""

    def __init__(self) -> None:
        super().__init__()
        self.queues: dict[str, list[Callable[[], None]]] = {}
        self.done: dict[str, int] = {}

    def event(self, name: str, *, timed: bool = False) -> _LateEvent:
        return _LateEvent(self, name)

    def record(self, event: _LateEvent, stream: str) -> None:
        event.mark = (stream, len(self.queues.setdefault(stream, [])))
        self.done.setdefault(stream, 0)

    def wait(self, stream: str, event: _LateEvent) -> None:
        if stream == COMPUTE:
            self.catch_up(event)
        else:
            self._enqueue(stream, lambda: self.catch_up(event))

    def copy(self, stream: str, dst: torch.Tensor, src: torch.Tensor, what: str) -> None:
        check_copy(dst, src)

        def run() -> None:
            dst.copy_(src)

        if stream == COMPUTE:
            run()
        else:
            self._enqueue(stream, run)

    @property
    def is_idle(self) -> bool:
        return all(self.done[stream] == len(queue) for stream, queue in self.queues.items())

    def synchronize(self) -> None:
        for stream, queue in self.queues.items():
            self._run(stream, len(queue))

    def catch_up(self, event: _LateEvent) -> None:
        if event.mark is not None:
            self._run(*event.mark)

    def _enqueue(self, stream: str, op: Callable[[], None]) -> None:
        self.queues.setdefault(stream, []).append(op)
        self.done.setdefault(stream, 0)

    def _run(self, stream: str, end: int) -> None:
        while self.done[stream] < end:
            self.done[stream] += 1
            self.queues[stream][self.done[stream] - 1]()
