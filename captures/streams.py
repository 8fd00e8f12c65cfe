"""Where does work run, and what orders it? Two streams, events, and a CPU twin that logs."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from typing import Protocol

import torch

COMPUTE = "compute"
COPY_IN = "copy_in"
STREAMS = (COMPUTE, COPY_IN)


class Event(Protocol):
    """A point in a stream. Recorded once per use; belongs to one bank or one clock entry."""

    name: str

    def synchronize(self) -> None:
        """Blocks the host until the last recording has passed. At once if there was none."""

    def query(self) -> bool:
        """Whether the last recording has passed. Never blocks."""

    def elapsed_ms(self, end: Event) -> float:
        """Milliseconds from this recording to `end`'s. Both are timed and must have passed."""


class Streams(Protocol):
    """Work of one stream runs in order; streams meet only through events."""

    device: torch.device

    def event(self, name: str, *, timed: bool = False) -> Event:
        """timed: `elapsed_ms` will be asked; recording it takes longer."""

    def record(self, event: Event, stream: str) -> None: ...

    def wait(self, stream: str, event: Event) -> None:
        """Later work of `stream` starts after `event`. The host goes on."""

    def copy(self, stream: str, dst: torch.Tensor, src: torch.Tensor, what: str) -> None:
        """Enqueues dst <- src, both dense and of as many bytes. Both must be kept until it has
        passed. `what` names the copy in the log of the CPU twin."""

    def on(self, stream: str) -> AbstractContextManager[object]:
        """Torch work launched inside goes to `stream`."""

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] that copies to the device without a stop, and that its kernels can write:
        pinned on CUDA."""

    def synchronize(self) -> None:
        """Blocks until both streams are empty."""


class _CudaEvent:
    def __init__(self, name: str, *, timed: bool) -> None:
        self.name = name
        self.cuda = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def query(self) -> bool:
        return bool(self.cuda.query())  # type: ignore[no-untyped-call]

    def elapsed_ms(self, end: Event) -> float:
        assert isinstance(end, _CudaEvent)
        return float(self.cuda.elapsed_time(end.cuda))


class _OnStream:
    """What torch.cuda.stream does, by the calls that it makes itself, without the objects it makes
    and the checks between them: one of these is entered every step."""

    __slots__ = ("_before", "_device_index", "_stream")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        stream = self._stream
        self._device_index = torch._C._cuda_getDevice()
        self._before = torch._C._cuda_getCurrentStream(stream.device_index)
        _set_stream(stream.stream_id, stream.device_index, stream.device_type)

    def __exit__(self, *_: object) -> None:
        _set_stream(*self._before)
        if self._device_index != self._stream.device_index:
            torch.cuda.set_device(self._device_index)


def _set_stream(stream_id: int, device_index: int, device_type: int) -> None:
    """Also makes the stream's device the current one."""
    torch._C._cuda_setStream(
        stream_id=stream_id, device_index=device_index, device_type=device_type
    )


def _cuda_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CudaStreams:
    """Two distinct CUDA streams of one device."""

    def __init__(self, device: torch.device) -> None:
        # Imported here: a CPU machine need not have it.
        from cuda.bindings import driver

        self.device = device
        self._driver = driver
        self._streams = {name: _cuda_stream(device) for name in STREAMS}
        # torch hands streams out of a pool in turn and can give the same one twice.
        handles = {stream.cuda_stream for stream in self._streams.values()}
        if len(handles) != len(STREAMS):
            raise RuntimeError("torch gave the same CUDA stream twice; too many streams in use")
        self._handles = {name: stream.cuda_stream for name, stream in self._streams.items()}

    def event(self, name: str, *, timed: bool = False) -> Event:
        return _CudaEvent(name, timed=timed)

    def record(self, event: Event, stream: str) -> None:
        assert isinstance(event, _CudaEvent)
        event.cuda.record(self._streams[stream])

    def wait(self, stream: str, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        self._streams[stream].wait_event(event.cuda)

    def copy(self, stream: str, dst: torch.Tensor, src: torch.Tensor, what: str) -> None:
        # torch's copy_ takes the host five times as long.
        arguments = dst.data_ptr(), src.data_ptr(), dst.nbytes, self._handles[stream]
        (status,) = self._driver.cuMemcpyAsync(*arguments)
        if status == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            # A thread's first call: the runtime makes the context current, the driver does not.
            self._streams[stream].query()
            (status,) = self._driver.cuMemcpyAsync(*arguments)
        if status:
            raise RuntimeError(f"CUDA cannot copy {what}: {status.name}")

    def on(self, stream: str) -> AbstractContextManager[object]:
        return _OnStream(self._streams[stream])

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def synchronize(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


class _CpuEvent:
    def __init__(self, name: str, *, timed: bool) -> None:
        self.name = name
        self.timed = timed
        self.at_s = 0.0

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_ms(self, end: Event) -> float:
        assert isinstance(end, _CpuEvent)
        assert self.timed
        assert end.timed
        return 1e3 * (end.at_s - self.at_s)


def check_copy(dst: torch.Tensor, src: torch.Tensor) -> None:
    """Whether CudaStreams could copy so, which does not look."""
    assert dst.nbytes == src.nbytes
    assert dst.is_contiguous()
    assert src.is_contiguous()


class CpuStreams:
    """The CPU twin: everything runs at once, in the order of the calls. With `log`, each call
    appends (stream, verb, name), so a test can check the order that CUDA would have to keep."""

    def __init__(self, log: list[tuple[str, str, str]] | None = None) -> None:
        self.device = torch.device("cpu")
        self._log = log

    def _note(self, stream: str, verb: str, name: str) -> None:
        if self._log is not None:
            self._log.append((stream, verb, name))

    def event(self, name: str, *, timed: bool = False) -> Event:
        return _CpuEvent(name, timed=timed)

    def record(self, event: Event, stream: str) -> None:
        assert isinstance(event, _CpuEvent)
        event.at_s = time.perf_counter()
        self._note(stream, "record", event.name)

    def wait(self, stream: str, event: Event) -> None:
        self._note(stream, "wait", event.name)

    def copy(self, stream: str, dst: torch.Tensor, src: torch.Tensor, what: str) -> None:
        check_copy(dst, src)
        dst.copy_(src)
        self._note(stream, "copy", what)

    def on(self, stream: str) -> AbstractContextManager[object]:
        self._note(stream, "run", "")
        return contextlib.nullcontext()

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def synchronize(self) -> None:
        pass


def make_streams(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else CpuStreams()
