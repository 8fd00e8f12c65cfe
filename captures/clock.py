"""When did the device work, and when did it wait? Event pairs, collected without a stop."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from captures.streams import COMPUTE, STREAMS, Event, Streams


@dataclass(slots=True)
class _Entry:
    label: str
    start: Event
    end: Event
    has_ended: bool = False  # whether the host has recorded the end


@dataclass(frozen=True, slots=True)
class DeviceSpan:
    """One stretch of work of one stream, in seconds of the host's perf_counter."""

    label: str
    stream: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class ClockReading:
    """Sums since the last reset. Busy: from a launch's first to its last event on the compute
    stream. Idle: between one launch's end and the next one's start. The gaps between the kernels of
    one launch count as busy: large in eager mode, and of a graph's replay next to none but for what
    lies before its first kernel, 7 us under a profiler (perf/LOG.md, 2026-11-29, fourth)."""

    busy_ms: float = 0.0
    idle_ms: float = 0.0
    longest_gap_ms: float = 0.0
    num_launches: dict[str, int] = field(default_factory=dict)
    launch_ms: dict[str, float] = field(default_factory=dict)

    @property
    def busy_share(self) -> float | None:
        """busy / (busy + idle), or None before the first launch."""
        total_ms = self.busy_ms + self.idle_ms
        return self.busy_ms / total_ms if total_ms > 0.0 else None

    def add(self, label: str, busy_ms: float, gap_ms: float) -> None:
        self.busy_ms += busy_ms
        self.idle_ms += gap_ms
        self.longest_gap_ms = max(self.longest_gap_ms, gap_ms)
        self.num_launches[label] = self.num_launches.get(label, 0) + 1
        self.launch_ms[label] = self.launch_ms.get(label, 0.0) + busy_ms


class StepClock:
    """Times launches on the compute stream, and with `times_copies` the copies beside them.

    `begin` and `end` enqueue; `collect` reads what has passed. Times are chained from event to
    event, so they stay exact to an event's resolution over a run of any length. They are tied to
    the host's clock once, by `reset`; whatever the two clocks drift apart after that stays in.
    Events are recycled once read, so their number follows the launches that are not."""

    def __init__(self, streams: Streams, *, times_copies: bool = False) -> None:
        self.times_copies = times_copies
        self._streams = streams
        self._pending: dict[str, deque[_Entry]] = {stream: deque() for stream in STREAMS}
        self._spare: list[_Entry] = []
        # Of each stream, the last entry read and where it ended.
        self._last: dict[str, tuple[_Entry, float]] = {}
        self._anchor = streams.event("anchor", timed=True)
        self.reset()

    def begin(self, label: str, stream: str = COMPUTE) -> None:
        if self._spare:
            entry = self._spare.pop()
            entry.label, entry.has_ended = label, False
        else:
            start, end = (self._streams.event(name, timed=True) for name in ("start", "end"))
            entry = _Entry(label, start, end)
        self._streams.record(entry.start, stream)
        self._pending[stream].append(entry)

    def end(self, stream: str = COMPUTE) -> Event:
        """The event it records, which the clock records again once it has read this and the next
        entry of the stream."""
        entry = self._pending[stream][-1]
        self._streams.record(entry.end, stream)
        entry.has_ended = True
        return entry.end

    def collect(self, *, least: int = 1) -> list[DeviceSpan]:
        """Everything that has ended since the last call, stream by stream in order; the compute
        stream's is added to `reading`. Never blocks. An entry that has begun and not ended is left,
        and so is what follows it. least: nothing, as long as fewer launches are pending: to read
        many at once costs the host less than one by one."""
        if len(self._pending[COMPUTE]) < least:
            return []
        spans = []
        for stream, pending in self._pending.items():
            for _ in range(_num_passed(pending)):
                spans.append(self._read(pending.popleft(), stream))
        return spans

    def drop_pending(self) -> None:
        """Forgets launches not collected yet, also one that has begun and not ended. The caller has
        synchronized the streams."""
        for pending in self._pending.values():
            pending.clear()

    def reset(self) -> None:
        """Starts new sums and ties the device's clock to the host's; blocks until the compute
        stream is empty. The gap before the next launch counts to neither side."""
        self.collect()
        self.reading = ClockReading()
        self._spare += [entry for entry, _ in self._last.values()]
        self._last.clear()
        self._streams.record(self._anchor, COMPUTE)
        self._anchor.synchronize()
        self._anchor_s = time.perf_counter()

    def _read(self, entry: _Entry, stream: str) -> DeviceSpan:
        last, last_s = self._last.get(stream, (None, self._anchor_s))
        since = self._anchor if last is None else last.end
        wait_ms = max(0.0, since.elapsed_ms(entry.start))
        busy_ms = entry.start.elapsed_ms(entry.end)
        start_s = last_s + 1e-3 * wait_ms
        end_s = start_s + 1e-3 * busy_ms
        if stream == COMPUTE:
            self.reading.add(entry.label, busy_ms, 0.0 if last is None else wait_ms)
        if last is not None:
            self._spare.append(last)
        self._last[stream] = (entry, end_s)
        return DeviceSpan(entry.label, stream, start_s, end_s)


def _num_passed(pending: deque[_Entry]) -> int:
    """How many have ended on the device. Those of one stream end in order, and mostly all but one
    or two have: the last that has tells all, and asking takes time."""
    for num in range(len(pending), 0, -1):
        entry = pending[num - 1]
        if entry.has_ended and entry.end.query():
            return num
    return 0
