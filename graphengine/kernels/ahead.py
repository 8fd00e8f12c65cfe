"""How do kernels compile before they are launched? Side by side, while the weights are read.

A kernel that compiles where it is first launched keeps a first start waiting, one after the other.
So a start first runs its steps with nothing of ours launched, and only learns what it will want.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch

# Beyond this many threads Triton's own Python, one thread at a time, is what takes the time.
_MAX_THREADS = 8
# What will be launched, on its way; None where kernels are launched as ever. Of a context: another
# thread's engine runs on.
_wanted: ContextVar[list[Any] | None] = ContextVar("wanted", default=None)


def is_rehearsal() -> bool:
    """Whether nothing is to be launched here: see `compiled_ahead`."""
    return _wanted.get() is not None


def want(kernel: Any) -> None:
    """kernel: what Triton's warmup gave, compiled or on its way."""
    wanted = _wanted.get()
    assert wanted is not None
    wanted.append(kernel)


@contextlib.contextmanager
def compiled_ahead(device: torch.device, steps: Callable[[], None]) -> Iterator[None]:
    """Calls `steps` with no kernel of ours launched, so what they compute means nothing. What they
    would have launched is compiled and loaded to the GPU by threads, which leaving this waits for;
    then a compiler's error is raised, if there was one. CUDA C++ compiles by itself: see
    `nvrtc.compiling`."""
    from triton import AsyncCompileMode

    wanted: list[Any] = []
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(num_threads, initializer=torch.cuda.set_device, initargs=(device,))

    def rehearse() -> None:
        _wanted.set(wanted)
        # Never left: leaving waits, and the context that it is active in ends here.
        AsyncCompileMode(_Loading(pool)).__enter__()
        steps()

    try:
        contextvars.copy_context().run(rehearse)
        yield
        for kernel in wanted:
            if hasattr(kernel, "result"):
                kernel.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Loading(Executor):
    """Loads what was compiled too: for a kernel with arguments of new types Triton compiles C code
    to launch it, which takes as long again."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._pool.submit(_loaded, fn, *args, **kwargs)


def _loaded(compiles: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kernel = compiles(*args, **kwargs)
    kernel[(1, 1, 1)]  # what would launch it, made and not called
    return kernel
