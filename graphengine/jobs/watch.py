"""How far is a job? Counts, a line for the progress bar, and the summary at the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphengine.errors import GraphEngineError
from graphengine.jobs.workers import Worker


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """device: its CUDA_VISIBLE_DEVICES; None if that is the job's own, or on the CPU. num_rows:
    that came back from it. gpu_busy: share of the time in which it had rows. fed_gpu_busy: the
    same, when it last told while rows were left to hand out. ready_s, last_result_s: when its last
    process was ready and when its last row came back, since the job's first engine was ready; None
    if neither has been."""

    number: int
    device: str | None
    num_starts: int
    num_rows: int
    output_tokens: int
    gpu_busy: float | None
    fed_gpu_busy: float | None
    ready_s: float | None
    last_result_s: float | None


@dataclass(frozen=True, slots=True)
class JobStats:
    """num_finished: rows of the output. num_failed: those of them with an error. num_before: those
    finished by earlier runs. total: rows in all, estimated unless is_exact; None if unknown.
    gpu_busy: of all workers' time, elapsed_s each. startup_s: until the first engine was ready.
    elapsed_s: since then; the speeds are of it."""

    num_finished: int
    num_failed: int
    num_before: int
    total: int | None
    is_exact: bool
    output_tokens: int
    prompt_tokens: int
    gpu_busy: float | None
    num_workers: int
    num_alive: int
    num_deaths: int
    startup_s: float
    elapsed_s: float
    workers: tuple[WorkerStats, ...]

    @property
    def tail_share(self) -> float | None:
        """At the end: the share of elapsed_s from the moment on when a worker had no row left, for
        good. None with one worker."""
        if self.num_workers < 2 or self.elapsed_s <= 0.0:
            return None
        last_s = min(worker.last_result_s or 0.0 for worker in self.workers)
        return (self.elapsed_s - last_s) / self.elapsed_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """signum: of the signal that ended the job, None if none did. error: what else ended it before
    its input did. Either way it can be resumed."""

    output: Path
    stats: JobStats
    signum: int | None = None
    error: GraphEngineError | None = None


@dataclass(slots=True)
class Counts:
    """Advanced by the loop."""

    num_finished: int = 0
    num_failed: int = 0
    num_before: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    num_deaths: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    ready_s: float | None = None


def job_stats(
    counts: Counts, workers: Sequence[Worker], total: int | None, *, is_exact: bool
) -> JobStats:
    """output_tokens are live: those of rows that run still, too."""
    now_s = time.perf_counter()
    ready_s = now_s if counts.ready_s is None else counts.ready_s
    elapsed_s = now_s - ready_s
    busy_s = [activity[1] for worker in workers if (activity := worker.activity()) is not None]
    return JobStats(
        num_finished=counts.num_finished,
        num_failed=counts.num_failed,
        num_before=counts.num_before,
        total=None if total is None else max(total, counts.num_finished),
        is_exact=is_exact,
        output_tokens=counts.output_tokens + sum(worker.running_tokens for worker in workers),
        prompt_tokens=counts.prompt_tokens,
        gpu_busy=sum(busy_s) / (len(workers) * elapsed_s) if busy_s else None,
        num_workers=len(workers),
        num_alive=sum(worker.is_alive for worker in workers),
        num_deaths=counts.num_deaths,
        startup_s=ready_s - counts.started_s,
        elapsed_s=elapsed_s,
        workers=tuple(_worker_stats(worker, ready_s) for worker in workers),
    )


def _worker_stats(worker: Worker, since_s: float) -> WorkerStats:
    activity = worker.activity()
    ready_s, last_result_s = worker.ready_s, worker.last_result_s  # see Worker.activity
    return WorkerStats(
        number=worker.number,
        device=worker.device,
        num_starts=worker.num_starts,
        num_rows=worker.num_rows,
        output_tokens=worker.output_tokens,
        gpu_busy=None if activity is None else activity[1] / activity[0],
        fed_gpu_busy=worker.fed_busy,
        ready_s=None if ready_s is None else ready_s - since_s,
        last_result_s=None if last_result_s is None else last_result_s - since_s,
    )


def job_line(stats: JobStats, total: int | None, tokens_per_s: float) -> str:
    """`1,200/~5,000 rows, 310 tok/s, ETA 0:02:10, 3 errors, GPU busy 99%, 7 of 8 workers`."""
    done = f"{stats.num_finished:,}"
    if total is not None:
        done += f"/{'' if stats.is_exact else '~'}{total:,}"
    parts = [f"{done} rows", f"{tokens_per_s:,.0f} tok/s"]
    eta_s = _eta_s(stats)
    if eta_s is not None:
        parts.append(f"ETA {_clock(eta_s)}")
    parts.append(f"{stats.num_failed:,} error{'' if stats.num_failed == 1 else 's'}")
    if stats.gpu_busy is not None:
        parts.append(f"GPU busy {stats.gpu_busy:.0%}")
    if stats.num_workers > 1:
        parts.append(f"{stats.num_alive} of {stats.num_workers} workers")
    return ", ".join(parts)


def job_summary(outcome: Outcome) -> dict[str, Any]:
    """What --summary writes, and the last line of standard output."""
    stats = outcome.stats
    num_rows = stats.num_finished - stats.num_before
    per_s = 1.0 / stats.elapsed_s if stats.elapsed_s > 0 else 0.0
    return {
        "output": str(outcome.output),
        "is_complete": outcome.signum is None and outcome.error is None,
        "num_rows": stats.num_finished,
        "num_errors": stats.num_failed,
        "num_rows_of_earlier_runs": stats.num_before,
        "startup_s": round(stats.startup_s, 3),
        "elapsed_s": round(stats.elapsed_s, 3),
        "rows_per_s": round(num_rows * per_s, 1),
        "prompt_tokens": stats.prompt_tokens,
        "output_tokens": stats.output_tokens,
        "output_tokens_per_s": round(stats.output_tokens * per_s, 1),
        "gpu_busy": _rounded(stats.gpu_busy),
        "num_workers": stats.num_workers,
        "num_worker_deaths": stats.num_deaths,
        "tail_share": _rounded(stats.tail_share),
        "workers": [
            {
                name: _rounded(value) if isinstance(value, float) else value
                for name, value in dataclasses.asdict(worker).items()
            }
            for worker in stats.workers
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def job_report(stats: JobStats) -> str:
    """The end of a run for a person: rows, tokens and speed."""
    failed = f" ({stats.num_failed:,} failed)" if stats.num_failed else ""
    before = f", {stats.num_before:,} by earlier runs" if stats.num_before else ""
    per_s = stats.output_tokens / stats.elapsed_s if stats.elapsed_s > 0 else 0.0
    busy = "" if stats.gpu_busy is None else f", GPU busy {stats.gpu_busy:.1%}"
    return (
        f"{stats.num_finished:,} row{'' if stats.num_finished == 1 else 's'}{failed}{before}: "
        f"{stats.prompt_tokens:,} prompt and {stats.output_tokens:,} output tokens in "
        f"{stats.elapsed_s:.2f} s, {per_s:,.0f} output tok/s{busy}"
    )


def _eta_s(stats: JobStats) -> float | None:
    num_rows = stats.num_finished - stats.num_before
    if stats.total is None or num_rows <= 0:
        return None
    return stats.elapsed_s * (stats.total - stats.num_finished) / num_rows


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
