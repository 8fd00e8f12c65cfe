"""Is it told right what ran when, and what the device waited for?"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from captures import COMPUTE, CpuStreams, StepClock
from graphengine import LLM, SamplingParams
from graphengine.demo.sums import heldout_pairs, prompt
from graphengine.engine import _SPANS_AT_ONCE
from graphengine.errors import ConfigError
from graphengine.metrics import _RECENT_LAPS, IdleAccount, Lap, Laps

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def test_gap_is_laid_to_the_phases_it_overlaps() -> None:
    account = IdleAccount(started_s=10.0)
    account.add("decode", 10.0, 11.0, [])
    laps = [Lap("wait", 10.5, 11.5), Lap("commit", 11.5, 12.0), Lap("launch", 12.25, 13.5)]
    account.add("decode", 13.0, 14.0, laps)
    (gap,) = account.longest
    assert (gap.at_s, gap.ms) == (1.0, 2000.0)
    assert gap.host_ms == pytest.approx(
        {"wait": 500.0, "commit": 500.0, "launch": 750.0, "outside": 250.0}
    )
    assert account.host_ms == gap.host_ms


def test_longest_gaps_are_kept_and_the_devices_own_are_not() -> None:
    account = IdleAccount(started_s=0.0)
    at_s = 0.0
    for gap_ms in (0.0, 3.0, 0.004, 1.0, 9.0, 2.0, 0.015, 7.0, 5.0, 4.0):
        at_s += 1e-3 * gap_ms
        account.add("decode", at_s, at_s + 1.0, [])
        at_s += 1.0
    assert [round(gap.ms, 6) for gap in account.longest] == [9.0, 7.0, 5.0, 4.0, 3.0]
    assert account.host_ms["outside"] == pytest.approx(31.0)


def test_clock_gives_spans_on_the_hosts_clock() -> None:
    clock = StepClock(CpuStreams())
    times = []
    for label in ("prefill", "decode", "decode"):
        begin_s = time.perf_counter()
        clock.begin(label)
        time.sleep(0.002)
        clock.end()
        times.append((label, begin_s, time.perf_counter()))
    spans = clock.collect()
    assert [(span.label, span.stream) for span in spans] == [(t[0], COMPUTE) for t in times]
    for span, (_, begin_s, end_s) in zip(spans, times, strict=True):
        assert span.start_s == pytest.approx(begin_s, abs=1e-3)
        assert span.end_s == pytest.approx(end_s, abs=1e-3)
    assert clock.collect() == []


def test_laps_are_handed_on_as_they_end() -> None:
    seen: list[Lap] = []
    laps = Laps(seen.append)
    laps.end("schedule")
    laps.end("launch")
    assert [lap.phase for lap in seen] == ["schedule", "launch"] == [x.phase for x in laps.recent]
    assert seen[0].end_s == seen[1].start_s
    assert laps.seconds["launch"] == pytest.approx(seen[1].end_s - seen[1].start_s)


def test_trace_of_a_run_holds_every_step_of_every_stream(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    with LLM("demo", max_num_seqs=4, trace=str(file)) as llm:
        llm.generate([prompt(a, b) for a, b in heldout_pairs()[:12]], GREEDY)
        stats = llm.stats()
    events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [(rows[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    for stream in ("copy_in", "compute"):
        names = [name for row, name, _, _ in spans if row == stream]
        assert names.count("decode") == stats.num_decode_steps > 0
        assert names.count("prefill") == stats.num_prefill_steps > 0
    host = {name for row, name, _, _ in spans if row == "host"}
    assert {"config", "weights", "intake", "schedule", "launch", "wait", "commit"} <= host
    for row in rows.values():
        ends = 0.0
        for _, _, start, duration in sorted((s for s in spans if s[0] == row), key=lambda s: s[2]):
            assert start >= ends - 0.5, f"{row} does two things at once"
            ends = start + duration
    first_copy = min(start for row, _, start, _ in spans if row == "copy_in")
    assert first_copy <= min(start for row, _, start, _ in spans if row == "compute")


def test_trace_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace .* cannot be written"):
        LLM("demo", trace=str(tmp_path / "no" / "trace.json"))


def test_stats_name_what_the_device_waited_for() -> None:
    with LLM("demo", max_num_seqs=2, async_scheduling=False) as llm:
        llm.generate([prompt(1, 2)] * 6, GREEDY)
        stats = llm.stats()
        laps, launches = llm.timeline()
    assert sum(stats.idle_host_ms.values()) > 0.0
    longest = stats.longest_gaps
    assert [gap.ms for gap in longest] == sorted((gap.ms for gap in longest), reverse=True)
    assert {lap.phase for lap in laps} >= {"schedule", "commit"}
    assert {label for label, _, _ in launches} <= {"prefill", "decode"}


@pytest.mark.parametrize("num_taken", [1, 2])
def test_stream_that_is_left_early_is_accounted_for(num_taken: int, tmp_path: Path) -> None:
    """Though spans are read many at a time."""
    file = tmp_path / "trace.json"
    with LLM("demo", max_num_seqs=4, trace=str(file)) as llm:
        outputs = llm.stream([prompt(a, b) for a, b in heldout_pairs()[:2]], GREEDY)
        for _ in range(num_taken):
            next(outputs)
        outputs.close()
        stats = llm.stats()
        assert stats.num_prefill_steps == 1
        assert stats.num_decode_steps >= stats.output_tokens // 2 - 1 > 0
    names = [event["name"] for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("decode") >= 2 * stats.num_decode_steps


@pytest.mark.parametrize("num_requests", [1, 200])
def test_trace_on_a_full_disk_ends_with_one_warning_and_costs_no_answer(
    caplog: pytest.LogCaptureFixture, num_requests: int
) -> None:
    """Told when the buffer is first written: some steps on, or at the close. It had ended the run
    with a traceback, and lost what was finished."""
    requests = [prompt(a, b) for a, b in heldout_pairs()[:num_requests]]
    with LLM("demo", max_num_seqs=4, trace="/dev/full") as llm:
        for _ in range(2):
            assert len(llm.generate(requests, GREEDY)) == num_requests
    wanted = "trace '/dev/full' ends here: No space left on device; the run goes on without it"
    assert caplog.messages == [wanted]


def test_stats_of_an_engine_that_waits_for_requests_are_those_of_all_it_has_done() -> None:
    more = threading.Event()

    def requests() -> Iterator[str]:
        yield from (prompt(a, b) for a, b in heldout_pairs()[:2])
        assert more.wait(60)

    finished: list[object] = []
    with LLM("demo", max_num_seqs=4) as llm:
        stream = llm.stream(requests(), GREEDY)
        thread = threading.Thread(target=lambda: finished.extend(stream))
        thread.start()
        try:
            ends_s = time.monotonic() + 60
            while len(finished) < 2 and time.monotonic() < ends_s:
                time.sleep(0.01)
            time.sleep(0.2)  # it waits for the next request
            stats = llm.stats()
        finally:
            more.set()
            thread.join()
    assert stats.num_prefill_steps == 1
    # The last step's end may be read with the next launch.
    assert stats.num_decode_steps >= stats.output_tokens // 2 - 2 > 0


def test_laps_reach_back_as_far_as_spans_are_read_late() -> None:
    """A turn has six, and three turns lie between a launch and its end."""
    assert _RECENT_LAPS >= 6 * (_SPANS_AT_ONCE + 3)
