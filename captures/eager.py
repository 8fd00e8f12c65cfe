"""How does a step run without a graph? The twin of GraphRunner: same banks and checks."""

from __future__ import annotations

from captures.buckets import BucketLadder
from captures.runner import HostArrays, Step, StepFn, StepPipeline


class EagerRunner:
    """Calls the step function where GraphRunner replays. CPU or CUDA."""

    def __init__(self, pipeline: StepPipeline, step_fn: StepFn) -> None:
        self._pipeline = pipeline
        self._step_fn = step_fn

    @property
    def ladder(self) -> BucketLadder:
        return self._pipeline.ladder

    def open(self, num_rows: int) -> Step:
        return self._pipeline.open(num_rows)

    def launch(self, step: Step) -> None:
        buffers = self._pipeline.buffers[step.bucket, step.bank.index]
        self._pipeline.launch(step, lambda: self._step_fn(buffers.inputs, buffers.outputs))

    def wait(self, step: Step) -> HostArrays:
        return self._pipeline.wait(step)

    def reset(self) -> None:
        self._pipeline.reset()

    def close(self) -> None:
        pass
