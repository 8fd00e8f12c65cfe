"""Does a job with an engine for each GPU outlive one of them? A short form of perf/jobs_gpus.py.

Two workers share the CPU, or the GPU where there is only one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perf.jobs_gpus import FOR_GOOD, Load, Run, equal_share, write_load


def accounted(found: dict[str, Any], load: Load) -> dict[str, Any]:
    """The summary of a run of all rows of `load`, after a look at its counts."""
    num_rows = len(load.max_tokens)
    assert found["rows"] == {
        "num_written": num_rows,
        "num_lost": 0,
        "num_doubled": 0,
        "num_wrong": 0,
    }
    summary: dict[str, Any] = found["summary"]
    workers = summary["workers"]
    assert summary["output_tokens"] == sum(load.max_tokens)
    assert sum(worker["num_rows"] for worker in workers) == num_rows
    assert sum(worker["output_tokens"] for worker in workers) == sum(load.max_tokens)
    return summary


def run_and_lose_a_worker(load: Load, calm: Load, folder: Path) -> tuple[dict[str, Any], float]:
    """The summary of a job that loses a worker half-way for good, and the share of its rows that
    are those of a job with one worker. calm: the same rows, in batches as you like."""
    one = Run(calm, folder / "one.jsonl", workers="1")
    accounted(one.wait(), calm)
    two = Run(load, folder / "two.jsonl", workers="2")
    found = two.wait(FOR_GOOD)
    summary = accounted(found, load)
    # The first death and each start after it.
    assert summary["num_worker_deaths"] == found["kill"]["num_kills"] == 5
    # The other one never waits for what is started again; a row takes milliseconds.
    assert found["kill"]["longest_time_without_a_row_s"] < 2.0
    left, lost = sorted(summary["workers"], key=lambda worker: worker["num_starts"])
    assert (left["num_starts"], lost["num_starts"]) == (1, 5)
    assert 0 < lost["num_rows"] < left["num_rows"]
    assert summary["tail_share"] > 0.1
    return summary, equal_share(two.token_ids(), one.token_ids())


def test_job_on_two_workers_of_a_cpu_ends_on_one(tmp_path: Path) -> None:
    load = write_load(
        "demo", tmp_path, num_rows=600, max_num_seqs=8, options=("--device=cpu", "--seed=3")
    )
    summary, share = run_and_lose_a_worker(load, load, tmp_path)
    assert share == 1.0
    assert summary["gpu_busy"] is None


@pytest.mark.gpu
def test_job_on_two_workers_of_one_or_two_gpus_ends_on_one(tmp_path: Path) -> None:
    import torch

    # float32 and plain attention: rounding is far below the distance of most two logits.
    options = ("--device=cuda", "--dtype=float32", "--attention=reference")
    # Small batches keep the first worker busy until one that shares its GPU has started.
    load, calm = (
        write_load("demo", tmp_path, num_rows=6_000, max_num_seqs=size, options=options)
        for size in (4, 256)
    )
    summary, share = run_and_lose_a_worker(load, calm, tmp_path)
    # Prompts are noise to the model, so now and then two tokens are as good as equal.
    assert share >= 0.99
    workers = summary["workers"]
    assert len({worker["device"] for worker in workers}) == min(2, torch.cuda.device_count())
    assert all(0.0 < worker["gpu_busy"] <= 1.0 for worker in workers)
    left, lost = sorted(workers, key=lambda worker: worker["num_starts"])
    assert left["fed_gpu_busy"] is not None
    # The lost one is idle from its death on, and counted so.
    active_share = (1.0 + lost["last_result_s"] / summary["elapsed_s"]) / 2
    assert summary["gpu_busy"] <= active_share + 0.01
