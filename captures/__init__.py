"""How does any static-shape step run? Knows rows, buckets and banks; never tokens or models."""

from captures.banks import Bank, Banks, BankState, BankStateError
from captures.buckets import BatchTooLarge, BucketLadder
from captures.clock import ClockReading, DeviceSpan, StepClock
from captures.eager import EagerRunner
from captures.fields import Arena, Field, Layout
from captures.graph import Called, CaptureError, CaptureReport, GraphRunner, Replayable, capture
from captures.runner import HostArrays, Step, StepFn, StepPipeline, StepRunner
from captures.streams import COMPUTE, CpuStreams, CudaStreams, Event, Streams, make_streams

__all__ = [
    "COMPUTE",
    "Arena",
    "Bank",
    "BankState",
    "BankStateError",
    "Banks",
    "BatchTooLarge",
    "BucketLadder",
    "Called",
    "CaptureError",
    "CaptureReport",
    "ClockReading",
    "CpuStreams",
    "CudaStreams",
    "DeviceSpan",
    "EagerRunner",
    "Event",
    "Field",
    "GraphRunner",
    "HostArrays",
    "Layout",
    "Replayable",
    "Step",
    "StepClock",
    "StepFn",
    "StepPipeline",
    "StepRunner",
    "Streams",
    "capture",
    "make_streams",
]
