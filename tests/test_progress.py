"""Does progress show what the engine reports, on a terminal and elsewhere?"""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from graphengine import progress
from graphengine.metrics import Gap
from graphengine.progress import Progress, Rate, status_line, summary


def stats(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "num_running": 8,
        "num_waiting": 1200,
        "num_finished": 12,
        "prompt_tokens": 500,
        "output_tokens": 3100,
        "kv_usage": 0.614,
        "num_failed": 0,
        "num_preemptions": 0,
        "elapsed_s": 10.0,
        "num_prefill_steps": 1,
        "num_decode_steps": 2048,
        "prefill_ms": 12.0,
        "decode_ms": 4.7512,
        "longest_gap_ms": 0.5,
        "gpu_busy": None,
        "idle_host_ms": {},
        "longest_gaps": (),
    }
    return SimpleNamespace(**(values | changes))


def test_status_line_names_requests_rate_rows_and_kv() -> None:
    line = "12/64 requests, 310 tok/s, 8 running, 1,200 waiting, KV 61%"
    assert status_line(stats(), 64, 310.4) == line
    assert status_line(stats(), None, 0).startswith("12 requests, 0 tok/s")


def test_summary_names_failures_preemptions_and_gpu_share_only_if_there_are_any() -> None:
    assert summary(stats()) == (
        "12 requests: 500 prompt and 3,100 output tokens in 10.00 s, 310 output tok/s\n"
        "prefill steps: 1 of 12.00 ms, decode steps: 2,048 of 4.75 ms"
    )
    full = summary(stats(gpu_busy=0.994, num_preemptions=3, num_failed=2))
    assert full.startswith("12 requests (2 failed): ")
    assert full.endswith(", GPU busy 99.4%, longest gap 0.50 ms, 3 preemptions")
    nothing = stats(elapsed_s=0.0, output_tokens=0, num_prefill_steps=0, num_decode_steps=0)
    assert summary(nothing).endswith("in 0.00 s, 0 output tok/s")


def test_summary_says_what_the_host_did_while_the_gpu_idled() -> None:
    gaps = (Gap(0.219, 2.3, {"wait": 0.1, "prefill": 1.3, "commit": 0.2, "schedule": 0.6}),)
    idle = {"commit": 2.1, "prefill": 16.0}
    text = summary(stats(gpu_busy=0.994, idle_host_ms=idle, longest_gaps=gaps))
    assert text.splitlines()[2] == (
        "GPU idle while the host was in prefill 16.00 ms, commit 2.10 ms; longest gap at 0.22 s: "
        "prefill 1.30 ms, schedule 0.60 ms, commit 0.20 ms"
    )


def test_rate_is_of_the_last_seconds() -> None:
    now = 0.0
    rate = Rate(clock=lambda: now)
    assert rate.update(0) == 0.0
    for second in range(1, 20):
        now = float(second)
        last = rate.update(100 * second if second <= 10 else 1000)
    assert last == 0.0
    now = 20.0
    assert rate.update(1050) == pytest.approx(10.0)  # 50 in 5 s


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("total", [64, None])
def test_progress_is_shown_while_a_request_runs(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, total: int | None
) -> None:
    monkeypatch.setattr(progress, "LIVE_INTERVAL_S", 0.01)
    monkeypatch.setattr(progress, "QUIET_INTERVAL_S", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    asked = threading.Semaphore(0)

    def counted() -> Any:
        asked.release()
        return stats()

    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=120, color_system=None)
    with Progress(counted, lambda: total, console, line=status_line):
        for _ in range(3):
            assert asked.acquire(timeout=10)
    shown = file.getvalue()
    assert "12/64 requests" in shown if total else "12 requests" in shown
    assert "8 running, 1,200 waiting, KV 61%" in shown
    assert ("\x1b" in shown) is is_terminal
    if is_terminal:
        assert shown.rstrip().endswith("\x1b[2K")  # the bar is wiped at the end


def test_short_run_prints_nothing_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    with Progress(stats, lambda: 64, Console(file=file), line=status_line):
        pass
    assert file.getvalue() == ""
