"""Who may touch a step's buffers, and when? Banks with a state machine, and the launch order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch

from captures.clock import StepClock
from captures.streams import COMPUTE, COPY_IN, COPY_OUT, Streams


class BankState(StrEnum):
    FREE = "free"
    FILLING = "filling"  # the host writes host_in
    LAUNCHED = "launched"  # host_in belongs to the copy, host_out to the device
    READY = "ready"  # the host reads host_out


class BankStateError(RuntimeError):
    """A bank was used out of turn: a bug in the caller, never a matter of timing."""


@dataclass(frozen=True, slots=True)
class BankPart:
    """The first bytes of a bank's buffers: what one launch moves and works on."""

    host_in: torch.Tensor
    device_in: torch.Tensor
    device_out: torch.Tensor
    host_out: torch.Tensor


class Bank:
    """One set of buffers for one launch in flight. All uint8, allocated once.

    host_in (pinned) > device_in > [step] > device_out > host_out (pinned).
    copied: host_in may be rewritten. computed: device_out is written. ready: host_out is.
    """

    def __init__(self, streams: Streams, name: str, *, in_bytes: int, out_bytes: int) -> None:
        self.name = name
        self.state = BankState.FREE
        self.host_in = streams.host_buffer(in_bytes)
        self.host_out = streams.host_buffer(out_bytes)
        self.device_in = torch.zeros(in_bytes, dtype=torch.uint8, device=streams.device)
        self.device_out = torch.zeros(out_bytes, dtype=torch.uint8, device=streams.device)
        self.copied = streams.event(f"{name}.copied")
        self.computed = streams.event(f"{name}.computed")
        self.ready = streams.event(f"{name}.ready")
        self.copy_in_name, self.copy_out_name = f"{name}.in", f"{name}.out"
        self._part_sizes = (-1, -1)
        self._part: BankPart | None = None

    def part(self, in_bytes: int, out_bytes: int) -> BankPart:
        """Kept until other sizes are asked for: steps that follow one another mostly have the same,
        and cutting four tensors takes as long as launching a copy."""
        if self._part is None or self._part_sizes != (in_bytes, out_bytes):
            self._part_sizes = (in_bytes, out_bytes)
            self._part = BankPart(
                self.host_in[:in_bytes],
                self.device_in[:in_bytes],
                self.device_out[:out_bytes],
                self.host_out[:out_bytes],
            )
        return self._part

    def advance(self, expected: BankState, new: BankState) -> None:
        if self.state is not expected:
            raise BankStateError(
                f"{self.name} is {self.state.value}; only {expected.value} may become {new.value}"
            )
        self.state = new


class Banks:
    """`count` banks used in turn, so the host fills one while the device runs another."""

    def __init__(
        self,
        streams: Streams,
        name: str,
        *,
        in_bytes: int,
        out_bytes: int,
        count: int = 2,
        clock: StepClock | None = None,
    ) -> None:
        """`clock` times every launch under `name`."""
        self._streams = streams
        self._name = name
        self._clock = clock
        self._banks = [
            Bank(streams, f"{name}{index}", in_bytes=in_bytes, out_bytes=out_bytes)
            for index in range(count)
        ]
        self._turn = 0

    def open(self) -> Bank:
        """The next bank in turn, now FILLING. Blocks until its last copy-in has passed: the host is
        about to write what that copy reads. Raises BankStateError unless the bank is FREE."""
        bank = self._banks[self._turn]
        bank.advance(BankState.FREE, BankState.FILLING)
        self._turn = (self._turn + 1) % len(self._banks)
        bank.copied.synchronize()
        return bank

    def launch(
        self, bank: Bank, step: Callable[[BankPart], None], *, in_bytes: int, out_bytes: int
    ) -> None:
        """Enqueues copy-in, `step` on the compute stream, copy-out; returns without waiting.

        `step` reads its device_in and writes its device_out. Neither can be in use by an earlier
        launch: a bank is FREE only after its `ready` event, which follows all its device work.
        """
        bank.advance(BankState.FILLING, BankState.LAUNCHED)
        streams, clock = self._streams, self._clock
        copy_clock = clock if clock is not None and clock.times_copies else None
        part = bank.part(in_bytes, out_bytes)
        if copy_clock is not None:
            copy_clock.begin(self._name, COPY_IN)
        streams.copy(COPY_IN, part.device_in, part.host_in, bank.copy_in_name)
        if copy_clock is not None:
            copy_clock.end(COPY_IN)
        streams.record(bank.copied, COPY_IN)
        # Reader of device_in: the step. Writer: the copy. Between them: `copied`.
        streams.wait(COMPUTE, bank.copied)
        if clock is not None:
            clock.begin(self._name)
        with streams.on(COMPUTE):
            step(part)
        if clock is not None:
            clock.end()
        streams.record(bank.computed, COMPUTE)
        # Reader of device_out: the copy-out. Writer: the step. Between them: `computed`.
        streams.wait(COPY_OUT, bank.computed)
        if copy_clock is not None:
            copy_clock.begin(self._name, COPY_OUT)
        streams.copy(COPY_OUT, part.host_out, part.device_out, bank.copy_out_name)
        if copy_clock is not None:
            copy_clock.end(COPY_OUT)
        streams.record(bank.ready, COPY_OUT)

    def wait(self, bank: Bank) -> None:
        """Blocks until host_out is written; the bank is READY."""
        bank.advance(BankState.LAUNCHED, BankState.READY)
        bank.ready.synchronize()

    def reset(self) -> None:
        """Every bank is FREE again, whatever it was. The caller has synchronized the streams."""
        for bank in self._banks:
            bank.state = BankState.FREE

    def release(self, bank: Bank) -> None:
        """The host has read host_out; the bank is FREE."""
        bank.advance(BankState.READY, BankState.FREE)
