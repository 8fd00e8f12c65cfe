"""How does a step of N rows run, whatever the step computes? Pad to a bucket, launch, wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from captures.banks import Bank, BankPart, Banks
from captures.buckets import BucketLadder
from captures.clock import StepClock
from captures.fields import Arena, Field
from captures.streams import COMPUTE, Streams

HostArrays = dict[str, npt.NDArray[np.generic]]


class StepFn(Protocol):
    """What is captured: reads `inputs`, writes every row of `outputs`; [bucket, *row_shape] each,
    at the same addresses in every call for a bucket. No host sync, no data-dependent shape."""

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One step between open and wait. `inputs`: host views [bucket, *row_shape] to write; rows from
    num_rows on hold the pad values already. They must not be touched after launch."""

    bank: Bank
    num_rows: int
    bucket: int
    inputs: HostArrays


class StepRunner(Protocol):
    """GraphRunner and EagerRunner: the same steps, captured or called."""

    @property
    def ladder(self) -> BucketLadder: ...

    def open(self, num_rows: int) -> Step:
        """A bank to fill. May block for its last copy-in."""

    def launch(self, step: Step) -> None:
        """Enqueues the step and returns."""

    def wait(self, step: Step) -> HostArrays:
        """Blocks until the step's outputs are in host memory; gives copies [num_rows, *row_shape]
        and frees the bank. The only way to the outputs, once per step."""

    def reset(self) -> None:
        """Frees every bank, whatever its step came to. The caller has synchronized the streams."""

    def close(self) -> None: ...


class StepPipeline:
    """What both runners share: arenas, static buffers, banks, padding and the launch order.

    The static inputs and outputs are what a captured graph is bound to; banks stage around them,
    so one set of graphs serves all banks at the price of two small device copies a step.
    """

    def __init__(
        self,
        inputs: Sequence[Field],
        outputs: Sequence[Field],
        ladder: BucketLadder,
        streams: Streams,
        *,
        name: str = "step",
        num_banks: int = 2,
        clock: StepClock | None = None,
    ) -> None:
        self.ladder = ladder
        self._streams = streams
        in_arena, out_arena = Arena(inputs), Arena(outputs)
        self._fields = in_arena.fields
        self._in_layouts = {size: in_arena.layout(size) for size in ladder.sizes}
        self._out_layouts = {size: out_arena.layout(size) for size in ladder.sizes}
        in_bytes = self._in_layouts[ladder.max_rows].nbytes
        out_bytes = self._out_layouts[ladder.max_rows].nbytes
        self._static_in = torch.zeros(in_bytes, dtype=torch.uint8, device=streams.device)
        self._static_out = torch.zeros(out_bytes, dtype=torch.uint8, device=streams.device)
        self.static_inputs = {s: v.views(self._static_in) for s, v in self._in_layouts.items()}
        self.static_outputs = {s: v.views(self._static_out) for s, v in self._out_layouts.items()}
        # By bucket, the bytes of both that its rows take: slices would be cut every step.
        self._static_parts = {
            size: (
                self._static_in[: self._in_layouts[size].nbytes],
                self._static_out[: self._out_layouts[size].nbytes],
            )
            for size in ladder.sizes
        }
        self._banks = Banks(
            streams,
            name,
            in_bytes=in_bytes,
            out_bytes=out_bytes,
            count=num_banks,
            clock=clock,
        )
        self._host_views: dict[tuple[str, int], tuple[HostArrays, HostArrays]] = {}

    def fill_with_padding(self, bucket: int) -> None:
        """Makes every row of the static inputs a padded row, for warm-up and capture."""
        for field in self._fields:
            self.static_inputs[bucket][field.name].fill_(field.pad)

    def open(self, num_rows: int) -> Step:
        bucket = self.ladder.pick(num_rows)
        bank = self._banks.open()
        inputs, _ = self._views(bank, bucket)
        if num_rows < bucket:
            for field in self._fields:
                inputs[field.name][num_rows:] = field.pad
        return Step(bank, num_rows, bucket, inputs)

    def launch(self, step: Step, execute: Callable[[int], None]) -> None:
        static_in, static_out = self._static_parts[step.bucket]

        def run(part: BankPart) -> None:
            # The compute stream orders these three after the previous step's reads of the static
            # inputs and before the next step's writes of the static outputs.
            self._streams.copy(COMPUTE, static_in, part.device_in, "static.in")
            execute(step.bucket)
            self._streams.copy(COMPUTE, part.device_out, static_out, "static.out")

        self._banks.launch(
            step.bank,
            run,
            in_bytes=self._in_layouts[step.bucket].nbytes,
            out_bytes=self._out_layouts[step.bucket].nbytes,
        )

    def wait(self, step: Step) -> HostArrays:
        self._banks.wait(step.bank)
        _, outputs = self._views(step.bank, step.bucket)
        copies = {name: view[: step.num_rows].copy() for name, view in outputs.items()}
        self._banks.release(step.bank)
        return copies

    def reset(self) -> None:
        self._banks.reset()

    def _views(self, bank: Bank, bucket: int) -> tuple[HostArrays, HostArrays]:
        key = (bank.name, bucket)
        if key not in self._host_views:
            self._host_views[key] = (
                self._in_layouts[bucket].host_views(bank.host_in),
                self._out_layouts[bucket].host_views(bank.host_out),
            )
        return self._host_views[key]
