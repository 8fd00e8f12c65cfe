"""How does an engine get requests that come later? A queue that an engine reads as an iterator."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from graphengine.request import Request


class Feed:
    """Requests put in by other threads. The engine takes what is there and waits for more until
    `end`."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Request | None] = queue.SimpleQueue()

    def put(self, request: Request) -> None:
        self._queue.put(request)

    def end(self) -> None:
        """What was put in is still read."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[Request]:
        while (request := self._queue.get()) is not None:
            yield request
