"""How long did the device work, and how long did it wait? Event pairs, collected without a stop."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from captures.streams import COMPUTE, Event, Streams


@dataclass(slots=True)
class _Entry:
    label: str
    start: Event
    end: Event


@dataclass(slots=True)
class ClockReading:
    """Sums since the last reset. Busy: from a launch's first to its last event on the compute
    stream. Idle: between one launch's end and the next one's start. In eager mode the gaps between
    the kernels of one launch count as busy: only a graph replay is busy throughout."""

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


class StepClock:
    """Times launches on the compute stream. `begin` and `end` enqueue; `collect` reads what has
    passed. Events are recycled once read, so their number follows the launches in flight."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._pending: deque[_Entry] = deque()
        self._spare: list[_Entry] = []
        self._last: _Entry | None = None
        self.reading = ClockReading()

    def begin(self, label: str) -> None:
        if self._spare:
            entry = self._spare.pop()
            entry.label = label
        else:
            entry = _Entry(label, self._streams.event("start"), self._streams.event("end"))
        self._streams.record(entry.start, COMPUTE)
        self._pending.append(entry)

    def end(self) -> None:
        self._streams.record(self._pending[-1].end, COMPUTE)

    def collect(self) -> None:
        """Adds every launch that has ended to `reading`. Never blocks. Call it between launches:
        an entry that has begun and not ended must not be pending."""
        reading = self.reading
        while self._pending and self._pending[0].end.query():
            entry = self._pending.popleft()
            busy_ms = entry.start.elapsed_ms(entry.end)
            reading.busy_ms += busy_ms
            reading.num_launches[entry.label] = reading.num_launches.get(entry.label, 0) + 1
            reading.launch_ms[entry.label] = reading.launch_ms.get(entry.label, 0.0) + busy_ms
            if self._last is not None:
                gap_ms = max(0.0, self._last.end.elapsed_ms(entry.start))
                reading.idle_ms += gap_ms
                reading.longest_gap_ms = max(reading.longest_gap_ms, gap_ms)
                self._spare.append(self._last)
            self._last = entry

    def drop_pending(self) -> None:
        """Forgets launches not collected yet, also one that has begun and not ended. The caller has
        synchronized the streams."""
        self._pending.clear()

    def reset(self) -> None:
        """Starts new sums. The gap before the next launch counts to neither."""
        self.collect()
        self.reading = ClockReading()
        if self._last is not None:
            self._spare.append(self._last)
            self._last = None
