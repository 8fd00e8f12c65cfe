"""What does a worker process do? Runs one engine on the rows that the job hands it.

Started as `python -m graphengine.jobs.worker FD`, where FD is its end of a socket. The first
message tells the engine; then come rows, and results go back. When the job's end of the socket
closes, the process exits at once, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

from graphengine.errors import GraphEngineError
from graphengine.jobs.channel import Channel, Message
from graphengine.jobs.feed import Feed
from graphengine.request import Request, RequestOutput, SamplingParams

STATS_INTERVAL_S = 0.5
_ORPHANED = 1
_FAILED = 2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SEND_TIMEOUT_S = 60.0


def main(descriptor: int) -> int:
    # Ctrl-C reaches the whole group of processes; the job decides what its workers do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    worker = _Worker()
    worker.channel = Channel(socket.socket(fileno=descriptor), worker.take)
    try:
        worker.run(worker.first.get())
        code = 0
    except GraphEngineError as error:
        worker.channel.send({"failed": str(error)})
        code = _FAILED
    worker.channel.finish(_SEND_TIMEOUT_S)
    return code


class _Worker:
    """channel: is set right after it is made."""

    channel: Channel

    def __init__(self) -> None:
        self.first: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._feed = Feed()
        self._default = SamplingParams()
        self._is_told = False
        self._is_stopped = False

    def take(self, message: Message | None) -> None:
        """A message of the job, in the channel's thread."""
        if message is None:
            os._exit(_ORPHANED)
        if not self._is_told:
            self._is_told = True
            self._default = SamplingParams(**message["sampling"])
            self.first.put(message)
            return
        for index, prompt, params in message.get("rows", ()):
            self._feed.put(
                Request(prompt, dataclasses.replace(self._default, **params), str(index))
            )
        if "stop" in message:
            self._is_stopped = True
        if "stop" in message or "end" in message:
            self._feed.end()

    def run(self, told: Message) -> None:
        """Until the job says that there is no more. Raises GraphEngineError for what a user can
        fix, before the first row."""
        module, _, name = told["factory"].partition(":")
        make = getattr(importlib.import_module(module), name)  # seconds: it imports torch
        with make(**told["engine"]) as llm:
            self.channel.send({"ready": True})
            over = threading.Event()
            reporter = threading.Thread(target=self._report, args=(llm, over), daemon=True)
            reporter.start()
            with contextlib.closing(llm.stream(self._feed)) as outputs:
                for output in outputs:
                    self.channel.send({"result": _result(output, with_ids=told["token_ids"])})
                    if self._is_stopped:
                        break
            over.set()
            reporter.join()

    def _report(self, llm: Any, over: threading.Event) -> None:
        """Sends how far the engine is, now and then."""
        while not over.wait(STATS_INTERVAL_S):
            stats = llm.stats()
            self.channel.send({"stats": [stats.output_tokens, stats.gpu_busy]})


def _result(output: RequestOutput, *, with_ids: bool) -> list[Any]:
    """Row index, then the fields of Result."""
    completion = output.outputs[0]
    return [
        int(output.request_id),
        completion.text,
        completion.token_ids if with_ids else [],
        completion.finish_reason,
        len(output.prompt_token_ids),
        len(completion.token_ids),
        output.error,
    ]


def _die_with_parent() -> None:
    """Asks the kernel for a SIGKILL when the job's process dies: the socket tells it too, but a
    thread that never lets go of the interpreter would not hear of it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
