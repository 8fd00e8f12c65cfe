"""What if copies ran, and outputs came, as late as their events allow? A missing one shows."""

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
    copy reads is what its source holds then. What compute wrote to the host's memory shows when an
    event recorded after it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        # Buffers of the host, and what it sees of those that are not copied to the device.
        self.buffers: list[torch.Tensor] = []
        self.sources: set[int] = set()
        self.seen: dict[int, torch.Tensor] = {}
        self.queues: dict[str, list[Callable[[], None]]] = {}
        self.done: dict[str, int] = {}

    def event(self, name: str, *, timed: bool = False) -> _LateEvent:
        return _LateEvent(self, name)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        buffer = super().host_buffer(nbytes)
        self.buffers.append(buffer)
        self.seen[buffer.data_ptr()] = buffer.clone()
        return buffer

    def _hide_outputs(self) -> None:
        for buffer in self.buffers:
            seen = self.seen[buffer.data_ptr()]
            if buffer.data_ptr() in self.sources or torch.equal(buffer, seen):
                continue
            written = buffer.clone()
            buffer.copy_(seen)

            def show(buffer: torch.Tensor = buffer, written: torch.Tensor = written) -> None:
                buffer.copy_(written)
                self.seen[buffer.data_ptr()] = written

            self._enqueue(COMPUTE, show)

    def record(self, event: _LateEvent, stream: str) -> None:
        if stream == COMPUTE:
            self._hide_outputs()
        event.mark = (stream, len(self.queues.setdefault(stream, [])))
        self.done.setdefault(stream, 0)

    def wait(self, stream: str, event: _LateEvent) -> None:
        if stream == COMPUTE:
            self.catch_up(event)
        else:
            self._enqueue(stream, lambda: self.catch_up(event))

    def copy(self, stream: str, dst: torch.Tensor, src: torch.Tensor, what: str) -> None:
        check_copy(dst, src)
        self.sources.add(src.data_ptr())

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
