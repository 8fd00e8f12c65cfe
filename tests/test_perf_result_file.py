"""Is a result whole, wherever it is written? And is a place that takes none found first?"""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import perf.engine_figures
import perf.job_overhead
import perf.jobs_gpus
import perf.jobs_kill
import perf.jobs_memory
from graphengine.errors import ConfigError
from perf.result_file import check_result_path, result_path, write_result

RESULT = {"figures": [1, 2]}


def write_and_read(path: Path) -> object:
    assert result_path(str(path)) == path
    write_result(RESULT, path)
    return json.loads(path.read_text())


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may pass 32 KiB, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_place_that_takes_an_empty_file_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"r\.json: File too large; make room"):
        result_path(str(tmp_path / "r.json"))
    with pytest.raises(ConfigError, match="File too large"):
        check_result_path(str(tmp_path / "r.json"))
    assert list(tmp_path.iterdir()) == []


def test_pipe_is_written_in_place() -> None:
    """It was refused, for no file can be made beside it."""
    end, into = os.pipe()
    try:
        path = Path(f"/dev/fd/{into}")
        assert result_path(str(path)) == path
        write_result(RESULT, path)
        assert json.loads(os.read(end, 1000)) == RESULT
    finally:
        os.close(end)
        os.close(into)


@pytest.mark.parametrize("name", ["é" * 125 + ".json", "r" * 250 + ".json"])
def test_name_may_be_as_long_as_the_file_system_takes(name: str, tmp_path: Path) -> None:
    assert write_and_read(tmp_path / name) == RESULT
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_file_in_a_folder_that_takes_no_other_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's permissions are made up: root has them all."""
    path = tmp_path / "r.json"
    path.write_text("old")
    number = path.stat().st_ino
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    assert write_and_read(path) == RESULT
    assert path.stat().st_ino == number


def test_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "latest.json").symlink_to("first.json")
    assert write_and_read(tmp_path / "latest.json") == RESULT
    assert (tmp_path / "latest.json").is_symlink()
    assert json.loads((tmp_path / "first.json").read_text()) == RESULT


def test_standard_output_is_refused_where_the_summary_goes() -> None:
    """Scripts made a file named "-"."""
    with pytest.raises(argparse.ArgumentTypeError, match="--output is -, where the summary goes"):
        result_path("-")


class MadeUpRun:
    """Of perf.jobs_gpus, where nothing runs."""

    def __init__(self, *arguments: object, **options: object) -> None: ...

    def wait(self, kill: str | None = None) -> dict[str, Any]:
        workers = [{"fed_gpu_busy": None}]
        return {"summary": {"workers": workers, "output_tokens_per_s": 1.0, "tail_share": 0.0}}

    def token_ids(self) -> dict[int, list[int]]:
        return {0: [1]}


RUN = {"samples": [], "peak_mib": 1.0, "us_per_row": 1.0, "us_per_row_first_and_last_fifth": []}
# What a script measures with, made up, and its options.
SCRIPTS: dict[str, tuple[ModuleType, str, Callable[..., Any], list[str]]] = {
    "jobs_memory": (perf.jobs_memory, "_measure", lambda *arguments: RUN, []),
    "job_overhead": (perf.job_overhead, "_run", lambda told: 1.0, ["--rows", "1"]),
    "engine_figures": (
        perf.engine_figures,
        "tokens_of",
        lambda *arguments, **load: [[1], [2]],
        ["host", "--shape", "tiny"],
    ),
    "jobs_kill": (perf.jobs_kill, "_measure", lambda *arguments: {"num_kills": 1, "jobs": []}, []),
    "jobs_gpus": (perf.jobs_gpus, "Run", MadeUpRun, ["--device", "cpu", "--shape", "demo"]),
}


@pytest.mark.parametrize(("module", "name", "made_up", "options"), SCRIPTS.values(), ids=SCRIPTS)
def test_scripts_print_and_keep_what_was_there_if_they_cannot_write(
    module: ModuleType,
    name: str,
    made_up: Callable[..., Any],
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They wrote in place: a disk that filled up left half a file, and of some nothing printed.
    Then they ended in a traceback."""
    path = tmp_path / "r.json"
    monkeypatch.setattr(module, name, made_up)
    monkeypatch.setattr(sys, "argv", [name, "--output", str(path), *options])
    module.main()
    before = path.read_text()
    assert json.loads(before)
    capsys.readouterr()

    def full(part: Path, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])
    assert printed.err.endswith(
        f"error: {path}: No space left on device; make room or write the output elsewhere\n"
    )
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]
