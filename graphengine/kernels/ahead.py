"""How do kernels compile before they are launched? Side by side, while the weights are read.

A kernel that compiles where it is first launched keeps a first start waiting, one after the other.
So a start first runs its steps with nothing of ours launched, and only learns what it will want.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

_T = TypeVar("_T")
# Beyond this many Triton's own Python, one thread at a time, is what takes the time.
_NUM_THREADS = 8
# What makes ready what will be launched; None where kernels are launched as ever. Of a context:
# another thread's engine runs on.
_wanted: ContextVar[list[Callable[[], object]] | None] = ContextVar("wanted", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """Of a Triton kernel: `kernel[grid](*args, **options)`, but in a rehearsal it only compiles."""
    if not is_rehearsal():
        kernel[grid](*args, **options)
        return
    compiled = kernel.warmup(*args, grid=grid, **options)
    if hasattr(compiled, "result"):  # on its way
        want(compiled.result)


def is_rehearsal() -> bool:
    """Whether nothing is to be launched here: see `compiled_ahead`."""
    return _wanted.get() is not None


def want(make_ready: Callable[[], object]) -> None:
    """In a rehearsal: what will be launched will be made ready by this, at the latest."""
    wanted = _wanted.get()
    assert wanted is not None
    wanted.append(make_ready)


@contextlib.contextmanager
def expendable() -> Iterator[None]:
    """In a rehearsal: what is wanted within may fail to compile, which whoever launches it sees."""
    wanted = _wanted.get()
    if wanted is None:
        yield
        return
    within: list[Callable[[], object]] = []
    token = _wanted.set(within)
    try:
        yield
    finally:
        _wanted.reset(token)
        wanted += [functools.partial(_try, make_ready) for make_ready in within]


def _try(make_ready: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        make_ready()


@contextlib.contextmanager
def compiled_ahead(device: torch.device, steps: Callable[[], None]) -> Iterator[None]:
    """Calls `steps` as a rehearsal: no kernel of ours is launched, so what they compute means
    nothing. What they would have launched is compiled by threads, and loaded to the GPU before this
    is left; then a compiler's error is raised, if there was one."""
    from triton import AsyncCompileMode

    wanted: list[Callable[[], object]] = []
    pool = ThreadPoolExecutor(_NUM_THREADS, initializer=torch.cuda.set_device, initargs=(device,))

    def rehearse() -> None:
        _wanted.set(wanted)
        # Never left: leaving waits, and the context that it is active in ends here.
        AsyncCompileMode(_Loading(pool)).__enter__()
        steps()

    try:
        contextvars.copy_context().run(rehearse)
        yield
        for make_ready in wanted:
            make_ready()
    finally:
        pool.shutdown(cancel_futures=True)


class Begun(Generic[_T]):
    """A call that another thread has begun. Where that failed, or was cancelled, the caller makes
    it again: nothing that went wrong once is kept for those who ask later."""

    def __init__(self, pool: Executor, call: Callable[[], _T]) -> None:
        self._call = call
        self._future = pool.submit(call)

    def result(self) -> _T:
        try:
            return self._future.result()
        except Exception:  # not a user's Ctrl-C
            return self._call()


class _Loading(Executor):
    """Loads what was compiled too: for a kernel with arguments of new types Triton compiles C code
    to launch it, which takes as long again."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool

    def submit(self, fn: Callable[[], Any], /) -> Begun[Any]:  # type: ignore[override]
        def loaded() -> Any:
            kernel = fn()
            kernel[(1, 1, 1)]  # what would launch it, made and not called
            return kernel

        # Triton keeps it for the process and asks for its result alone.
        return Begun(self._pool, loaded)
