"""How does a step of N rows run, whatever the step computes? Pad to a bucket, launch, wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from captures.banks import Bank, Banks
from captures.buckets import BucketLadder
from captures.clock import StepClock
from captures.fields import Arena, Field
from captures.streams import Streams

HostArrays = dict[str, npt.NDArray[np.generic]]


class StepFn(Protocol):
    """What is captured: reads `inputs`, writes every row of `outputs`; [bucket, *row_shape] each,
    at the same addresses in every call for a bucket and a bank. No host sync, no data-dependent
    shape. The outputs are in host memory, on CUDA pinned: for kernels to write, which can, or for
    copies that do not block."""

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


@dataclass(frozen=True, slots=True)
class StaticBuffers:
    """A bucket's views of one bank, [bucket, *row_shape] each: what the host fills and reads, and
    what the step function is bound to. They stay where they are."""

    host_inputs: HostArrays
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    host_outputs: HostArrays


class StepPipeline:
    """What both runners share: arenas, banks, padding and the launch order.

    A step works on its bank in place, so a captured graph is one bank's: twice as many of them, for
    two copies on the device less in each step, which took it 10 us and the host 37 (perf/LOG.md).
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
        in_arena, out_arena = Arena(inputs), Arena(outputs)
        self._fields = in_arena.fields
        in_layouts = {size: in_arena.layout(size) for size in ladder.sizes}
        out_layouts = {size: out_arena.layout(size) for size in ladder.sizes}
        self._in_bytes = {size: layout.nbytes for size, layout in in_layouts.items()}
        self._banks = Banks(
            streams,
            name,
            in_bytes=in_layouts[ladder.max_rows].nbytes,
            out_bytes=out_layouts[ladder.max_rows].nbytes,
            count=num_banks,
            clock=clock,
        )
        self.num_banks = num_banks
        # Rows of each bank's last step: what follows them, in their bucket, is padding.
        self._padded: dict[int, int] = {}
        # By bucket and bank.
        self.buffers = {
            (size, bank.index): StaticBuffers(
                in_layouts[size].host_views(bank.host_in),
                in_layouts[size].views(bank.device_in),
                out_layouts[size].views(bank.host_out),
                out_layouts[size].host_views(bank.host_out),
            )
            for size in ladder.sizes
            for bank in self._banks
        }

    def fill_with_padding(self, bucket: int, bank_index: int) -> None:
        """Makes every row of the step's inputs a padded row, for warm-up and capture."""
        for field in self._fields:
            self.buffers[bucket, bank_index].inputs[field.name].fill_(field.pad)

    def open(self, num_rows: int) -> Step:
        bucket = self.ladder.pick(num_rows)
        bank = self._banks.open()
        inputs = self.buffers[bucket, bank.index].host_inputs
        # Taken out first: should the padding be cut off, the next step's is written whole.
        if self._padded.pop(bank.index, None) != num_rows and num_rows < bucket:
            for field in self._fields:
                inputs[field.name][num_rows:] = field.pad
        self._padded[bank.index] = num_rows
        return Step(bank, num_rows, bucket, inputs)

    def launch(self, step: Step, execute: Callable[[], None]) -> None:
        self._banks.launch(step.bank, execute, in_bytes=self._in_bytes[step.bucket])

    def wait(self, step: Step) -> HostArrays:
        self._banks.wait(step.bank)
        outputs = self.buffers[step.bucket, step.bank.index].host_outputs
        copies = {name: view[: step.num_rows].copy() for name, view in outputs.items()}
        self._banks.release(step.bank)
        return copies

    def reset(self) -> None:
        self._banks.reset()
