"""Does a job survive SIGKILL and a full disk? A short form of perf/jobs_kill.py, real model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from perf.jobs_kill import (
    NUM_ROWS,
    fill_disk,
    kill_until_complete,
    output_of,
    read_rows,
    run_job,
    small_disk,
    write_input,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "in.jsonl"
    write_input(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> list[bytes]:
    code, stderr = run_job("jsonl", source, output_of("jsonl", source.parent))
    assert code == 1, stderr  # some rows are no prompts
    rows = read_rows(output_of("jsonl", source.parent))
    assert len(rows) == NUM_ROWS
    return rows


def test_killed_again_and_again_a_job_ends_with_the_same_rows(
    tmp_path: Path, source: Path, undisturbed: list[bytes]
) -> None:
    output = output_of("jsonl-in-order", tmp_path)
    counts = kill_until_complete("jsonl-in-order", source, output, random.Random(0), most_kills=10)
    assert counts["job"] + counts["worker"] >= 5, "it was done before it was killed"
    assert counts["orphans"] == 0
    assert read_rows(output) == undisturbed
    assert output.read_bytes().splitlines() == undisturbed, "it is in the input's order"


def test_full_disk_is_one_line_and_the_job_goes_on_with_more_room(
    tmp_path: Path, source: Path, undisturbed: list[bytes]
) -> None:
    try:
        with small_disk(tmp_path / "disk", "160k") as disk:
            code, line, num_kept, output = fill_disk("jsonl", source, disk)
            rows = read_rows(output)
    except PermissionError:
        pytest.skip("needs the right to mount; test_jobs_store.py has a disk that pretends")
    assert code == 2
    assert line.endswith("make room and run the same command again")
    assert "No space left on device" in line
    assert 500 < num_kept < NUM_ROWS
    assert rows == undisturbed
