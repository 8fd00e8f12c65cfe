"""Who may touch a step's buffers, and when? Banks with a state machine, and the launch order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum

import torch

from captures.clock import StepClock
from captures.streams import COMPUTE, COPY_IN, Streams


class BankState(StrEnum):
    FREE = "free"
    FILLING = "filling"  # the host writes host_in
    LAUNCHED = "launched"  # host_in belongs to the copy, host_out to the step
    READY = "ready"  # the host reads host_out


class BankStateError(RuntimeError):
    """A bank was used out of turn: a bug in the caller, never a matter of timing."""


class Bank:
    """One set of buffers for one launch in flight. All uint8, allocated once.

    host_in (pinned) > device_in > [step] > host_out (pinned), which the step writes itself.
    copied: host_in may be rewritten. ready: host_out is written.
    """

    def __init__(
        self, streams: Streams, name: str, index: int, *, in_bytes: int, out_bytes: int
    ) -> None:
        self.name = f"{name}{index}"
        self.index = index
        self.state = BankState.FREE
        self.host_in = streams.host_buffer(in_bytes)
        self.host_out = streams.host_buffer(out_bytes)
        self.device_in = torch.zeros(in_bytes, dtype=torch.uint8, device=streams.device)
        self.copied = streams.event(f"{self.name}.copied")
        self.ready = streams.event(f"{self.name}.ready")
        self.copy_in_name = f"{self.name}.in"
        self._in_bytes = -1
        self._in_part = (self.device_in, self.host_in)

    def in_part(self, in_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first bytes of device_in and of host_in. Kept until another number is asked for:
        steps that follow one another mostly have the same, and cutting tensors takes time."""
        if self._in_bytes != in_bytes:
            self._in_bytes = in_bytes
            self._in_part = (self.device_in[:in_bytes], self.host_in[:in_bytes])
        return self._in_part

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
            Bank(streams, name, index, in_bytes=in_bytes, out_bytes=out_bytes)
            for index in range(count)
        ]
        self._turn = 0

    def __iter__(self) -> Iterator[Bank]:
        return iter(self._banks)

    def open(self) -> Bank:
        """The next bank in turn, now FILLING. Blocks until its last copy-in has passed: the host is
        about to write what that copy reads. Raises BankStateError unless the bank is FREE."""
        bank = self._banks[self._turn]
        bank.advance(BankState.FREE, BankState.FILLING)
        self._turn = (self._turn + 1) % len(self._banks)
        bank.copied.synchronize()
        return bank

    def launch(self, bank: Bank, step: Callable[[], None], *, in_bytes: int) -> None:
        """Enqueues the copy of the first in_bytes, then `step` on the compute stream; returns
        without waiting.

        `step` reads the bank's device_in and writes its host_out. Neither can be in use by an
        earlier launch: a bank is FREE only after its `ready` event, which follows all its work.
        """
        bank.advance(BankState.FILLING, BankState.LAUNCHED)
        streams, clock = self._streams, self._clock
        copy_clock = clock if clock is not None and clock.times_copies else None
        if copy_clock is not None:
            copy_clock.begin(self._name, COPY_IN)
        streams.copy(COPY_IN, *bank.in_part(in_bytes), bank.copy_in_name)
        if copy_clock is not None:
            copy_clock.end(COPY_IN)
        streams.record(bank.copied, COPY_IN)
        # Reader of device_in: the step. Writer: the copy. Between them: `copied`.
        streams.wait(COMPUTE, bank.copied)
        if clock is not None:
            clock.begin(self._name)
        with streams.on(COMPUTE):
            step()
        # Reader of host_out: the host. Writer: the step. Between them: `ready`.
        if clock is not None:
            # Should the clock record it again before it is waited for, the host waits longer.
            bank.ready = clock.end()
        else:
            streams.record(bank.ready, COMPUTE)

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
