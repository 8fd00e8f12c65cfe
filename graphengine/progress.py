"""How far is a run? A live bar on a terminal, elsewhere a line now and then; a summary."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

if TYPE_CHECKING:
    from graphengine.metrics import EngineStats

# Drawing takes about a millisecond beside the engine's loop: four a second cost it nothing.
LIVE_INTERVAL_S = 0.25
QUIET_INTERVAL_S = 10.0
_RATE_WINDOW_S = 5.0
_BAR_COLUMNS = 24
_NUM_PHASES = 3  # named in the summary


class Counted(Protocol):
    """What a bar needs of a snapshot; its line may show more."""

    @property
    def num_finished(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...


S = TypeVar("S", bound=Counted)


class Progress(Generic[S]):
    """Shows `stats()` while it is entered: from a thread of its own, since the loop that it looks
    at may take seconds to finish a request.

    total: gives the number of requests as far as it is known. line: says a snapshot, that number
    and the tokens per second of late. The console decides: a terminal gets a bar that is redrawn
    and vanishes at the end, anything else gets lines."""

    def __init__(
        self,
        stats: Callable[[], S],
        total: Callable[[], int | None],
        console: Console,
        *,
        line: Callable[[S, int | None, float], str],
    ) -> None:
        self._stats = stats
        self._total = total
        self._line = line
        self._console = console
        self._rate = Rate()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # Prints to the same terminal go above the bar; a pipe on the other stream does not.
            self._live = Live(
                console=console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=not console.stderr,
            )

    def __enter__(self) -> Progress[S]:
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._live is not None:
            self._live.stop()

    def _run(self) -> None:
        interval_s = QUIET_INTERVAL_S if self._live is None else LIVE_INTERVAL_S
        while not self._stop.wait(interval_s):
            stats, total = self._stats(), self._total()
            line = self._line(stats, total, self._rate.update(stats.output_tokens))
            if self._live is None:
                self._console.print(line, soft_wrap=True, highlight=False, markup=False)
            else:
                self._live.update(_bar(stats.num_finished, total, line), refresh=True)


class Rate:
    """Tokens per second over the last seconds, from a count that grows."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])

    def update(self, count: int) -> float:
        now = self._clock()
        while len(self._samples) > 1 and self._samples[1][0] <= now - _RATE_WINDOW_S:
            self._samples.popleft()
        since, before = self._samples[0]
        self._samples.append((now, count))
        return (count - before) / (now - since) if now > since else 0.0


def status_line(stats: EngineStats, total: int | None, tokens_per_s: float) -> str:
    """`12/64 requests, 310 tok/s, 8 running, 44 waiting, KV 61 %`; waiting counts what was read."""
    done = f"{stats.num_finished:,}" + (f"/{total:,}" if total is not None else "")
    return (
        f"{done} requests, {tokens_per_s:,.0f} tok/s, {stats.num_running:,} running, "
        f"{stats.num_waiting:,} waiting, KV {stats.kv_usage:.0%}"
    )


def _bar(num_finished: int, total: int | None, line: str) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.add_column(width=_BAR_COLUMNS)
    row.add_column(no_wrap=True, overflow="ellipsis")
    row.add_row(ProgressBar(total=total, completed=num_finished, pulse=total is None), line)
    return row


def summary(stats: EngineStats) -> str:
    """The end of a run: requests, tokens and speed; below it the steps, if there were any."""
    tokens_per_s = stats.output_tokens / stats.elapsed_s if stats.elapsed_s > 0 else 0.0
    failed = f" ({stats.num_failed:,} failed)" if stats.num_failed else ""
    plural = "" if stats.num_finished == 1 else "s"
    line = (
        f"{stats.num_finished:,} request{plural}{failed}: {stats.prompt_tokens:,} prompt and "
        f"{stats.output_tokens:,} output tokens in {stats.elapsed_s:.2f} s, "
        f"{tokens_per_s:,.0f} output tok/s"
    )
    parts = [
        f"{kind} steps: {num_steps:,} of {step_ms:.2f} ms"
        for kind, num_steps, step_ms in (
            ("prefill", stats.num_prefill_steps, stats.prefill_ms),
            ("decode", stats.num_decode_steps, stats.decode_ms),
        )
        if num_steps
    ]
    if stats.gpu_busy is not None:
        parts.append(f"GPU busy {stats.gpu_busy:.1%}, longest gap {stats.longest_gap_ms:.2f} ms")
    if stats.num_preemptions:
        parts.append(f"{stats.num_preemptions:,} preemptions")
    lines = [line, ", ".join(parts)]
    if stats.gpu_busy is not None and stats.longest_gaps:
        longest = stats.longest_gaps[0]
        lines.append(
            f"GPU idle while the host was in {_phases(stats.idle_host_ms)}; longest gap at "
            f"{longest.at_s:.2f} s: {_phases(longest.host_ms)}"
        )
    return "\n".join(text for text in lines if text)


def _phases(host_ms: dict[str, float]) -> str:
    """The phases that took most, most first: `prefill 16.0 ms, schedule 7.1 ms`."""
    ranked = sorted(host_ms.items(), key=lambda item: -item[1])[:_NUM_PHASES]
    return ", ".join(f"{phase} {ms:.2f} ms" for phase, ms in ranked)
