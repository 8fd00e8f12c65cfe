"""Who may launch kernels whose blocks wait for each other? One engine of a process at a time.

Such a kernel needs all multiprocessors of its GPU for itself. Two of them at once, on two streams,
could each get some and wait for the rest for ever. Processes take turns on a GPU, so it is enough
that the engines of one process do; where CUDA's Multi-Process Service lets processes run beside
each other, no such kernels are used (`DecodeChain.takes`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from graphengine.errors import BusyError

_lock = threading.Lock()
# GPUs in use. Of the process, not of an engine: that is what it is about.
_held: set[torch.device] = set()


@contextlib.contextmanager
def held(device: torch.device) -> Iterator[None]:
    """Has `device` for the time of a with block. Raises BusyError if it is in use."""
    with _lock:
        if device in _held:
            raise BusyError(
                f"another LLM of this process is running on {device}; let it end or close it "
                "first, or give each a process of its own"
            )
        _held.add(device)
    try:
        yield
    finally:
        with _lock:
            _held.remove(device)
