"""How do the processes of a job talk? JSON messages over a socket; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

import orjson

Message = dict[str, Any]
# Messages that wait are sent together, this many at most.
_MOST_AT_ONCE = 256


class Channel:
    """One end. `send` returns at once: a thread writes, since the other side may be slow or
    stopped. A message is its length in four bytes, then JSON."""

    def __init__(self, connected: socket.socket, on_message: Callable[[Message | None], None]):
        """on_message: is called in a thread, last with None when the other end is gone."""
        self._socket = connected
        self._on_message = on_message
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="channel-out", daemon=True)
        self._reader = threading.Thread(target=self._read, name="channel-in", daemon=True)
        self._writer.start()
        self._reader.start()

    def send(self, message: Message) -> None:
        # Here and not in the thread: what cannot be sent is the caller's bug.
        data = orjson.dumps(message)
        self._outgoing.put(len(data).to_bytes(4, "little") + data)

    def finish(self, timeout_s: float) -> None:
        """Blocks until all messages are sent, or the other end is gone. Nothing is sent after."""
        self._outgoing.put(None)
        self._writer.join(timeout_s)

    def close(self) -> None:
        self._outgoing.put(None)
        with contextlib.suppress(OSError):  # the other end is gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._writer.join()
        self._socket.close()

    def _write(self) -> None:
        try:
            while (frame := self._outgoing.get()) is not None:
                frames = [frame]
                is_last = False
                with contextlib.suppress(queue.Empty):
                    while len(frames) < _MOST_AT_ONCE and not is_last:
                        more = self._outgoing.get_nowait()
                        is_last = more is None
                        if more is not None:
                            frames.append(more)
                self._socket.sendall(b"".join(frames))
                if is_last:
                    return
        except OSError:
            return  # the reader tells that the other end is gone

    def _read(self) -> None:
        with self._socket.makefile("rb") as file:
            try:
                while (message := _receive(file)) is not None:
                    self._on_message(message)
            except OSError:
                pass  # reset, as by a process that died
            finally:
                self._on_message(None)


def _receive(file: BinaryIO) -> Message | None:
    """None at the end, also within a message: its sender died."""
    head = file.read(4)
    if len(head) < 4:
        return None
    num_bytes = int.from_bytes(head, "little")
    data = file.read(num_bytes)
    if len(data) < num_bytes:
        return None
    message: Message = orjson.loads(data)
    return message
