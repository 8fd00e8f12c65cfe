"""How does a step become one CUDA-graph replay? Warm up, capture largest first, replay."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from captures.buckets import BucketLadder
from captures.runner import HostArrays, Step, StepFn, StepPipeline
from captures.streams import COMPUTE, Streams


class CaptureError(RuntimeError):
    """A bucket could not be captured; names it. The cause is chained."""


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """What the graphs cost, of which a bucket has one for each bank. Bytes are device memory the
    driver reports as taken, per bucket."""

    seconds: dict[int, float]
    bytes: dict[int, int]
    num_graphs: int

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


class Replayable(Protocol):
    """Work that runs on torch's current stream, over and over."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Called:
    """The twin of a graph: calls where that replays."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.replay = step

    def reset(self) -> None:
        pass


def capture(
    step: Callable[[], None], streams: Streams, pool: Any, *, warm_up: bool = True
) -> Replayable:
    """`step` as a graph, its memory from `pool` of torch.cuda.graph_pool_handle. It runs once
    before, unless its like has (warm_up), and reads and writes tensors that keep their addresses.
    On the CPU it is called when it is replayed. Blocks until the streams are empty."""
    if streams.device.type != "cuda":
        return Called(step)
    graph = torch.cuda.CUDAGraph()
    with streams.on(COMPUTE):
        # Warm-up outside the capture: kernels compile and libraries allocate at first use.
        if warm_up:
            step()
        streams.synchronize()
        # capture_begin directly: torch.cuda.graph() also empties the allocator's cache, which is
        # slow and would give back what the next bucket needs.
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            step()
        except BaseException:
            with contextlib.suppress(Exception):  # the step's own error is the one to tell
                graph.capture_end()
            raise
        graph.capture_end()
    return graph


class GraphRunner:
    """One CUDA graph per bucket and bank, all in one memory pool."""

    def __init__(self, pipeline: StepPipeline, step_fn: StepFn, streams: Streams) -> None:
        """Captures every bucket; takes up to a tenth of a second each. Raises CaptureError."""
        self._pipeline = pipeline
        self._step_fn = step_fn
        self._streams = streams
        self._graphs: dict[tuple[int, int], Replayable] = {}
        self._pool = torch.cuda.graph_pool_handle()
        seconds: dict[int, float] = {}
        num_bytes: dict[int, int] = {}
        # Largest first: the smaller graphs then fit in the memory the pool has already.
        for bucket in reversed(self.ladder.sizes):
            free_before, _ = torch.cuda.mem_get_info(streams.device)
            start = time.perf_counter()
            try:
                for bank_index in range(pipeline.num_banks):
                    self._graphs[bucket, bank_index] = self._capture(bucket, bank_index)
            except Exception as error:
                raise CaptureError(f"capture of the {bucket}-row bucket failed: {error}") from error
            seconds[bucket] = time.perf_counter() - start
            num_bytes[bucket] = max(0, free_before - torch.cuda.mem_get_info(streams.device)[0])
        self.report = CaptureReport(seconds, num_bytes, len(self._graphs))

    def _capture(self, bucket: int, bank_index: int) -> Replayable:
        buffers = self._pipeline.buffers[bucket, bank_index]
        with self._streams.on(COMPUTE):
            self._pipeline.fill_with_padding(bucket, bank_index)

        def step() -> None:
            self._step_fn(buffers.inputs, buffers.outputs)

        return capture(step, self._streams, self._pool, warm_up=bank_index == 0)

    @property
    def ladder(self) -> BucketLadder:
        return self._pipeline.ladder

    def open(self, num_rows: int) -> Step:
        return self._pipeline.open(num_rows)

    def launch(self, step: Step) -> None:
        self._pipeline.launch(step, self._graphs[step.bucket, step.bank.index].replay)

    def wait(self, step: Step) -> HostArrays:
        return self._pipeline.wait(step)

    def reset(self) -> None:
        self._pipeline.reset()

    def close(self) -> None:
        """Frees the graphs and their pool. Blocks until nothing runs."""
        self._streams.synchronize()
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
