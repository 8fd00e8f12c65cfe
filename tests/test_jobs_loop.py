"""Does a job write each row once, in any order, whatever becomes of its workers and itself?

Real worker processes, with an engine that starts at once; `test_jobs_kill.py` has the real model.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import job_engines
import orjson
import pytest
from jobs import Said, by_index, config, read, refused, run, write_jsonl

from graphengine.errors import (
    ConfigError,
    GraphEngineError,
    InputError,
    OutputError,
    WorkersLostError,
)
from graphengine.intake import derived_seed
from graphengine.jobs import loop
from graphengine.jobs.output import Place
from graphengine.jobs.shard import Shard


def prompts(path: Path, texts: list[str]) -> Path:
    return write_jsonl(path, ({"prompt": text} for text in texts))


def expected(texts: list[str]) -> dict[int, str]:
    return {index: f"<{text}> {derived_seed(0, index)} 0" for index, text in enumerate(texts)}


def texts_of(output: Path) -> dict[int, str]:
    return {index: row["text"] for index, row in by_index(output).items()}


TEXTS = [f"{index}{' slow' if index % 17 == 0 else ''}" for index in range(400)]


@pytest.mark.parametrize("output", ["out.jsonl", "out"])
@pytest.mark.parametrize("order", ["completion", "input"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_each_row_is_written_once(
    tmp_path: Path, num_workers: int, order: str, output: str
) -> None:
    source = prompts(tmp_path / "in.jsonl", TEXTS)
    outcome = run(source, tmp_path / output, workers=num_workers, order=order)
    assert texts_of(tmp_path / output) == expected(TEXTS)
    assert outcome.stats.num_finished == outcome.stats.total == 400
    assert outcome.stats.output_tokens == 1200
    if order == "input":
        assert [row["row_index"] for row in read(tmp_path / output)] == list(range(400))


def test_rows_out_of_order_are_held_back_within_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    real = loop.RowOrder.read

    def watched(self: loop.RowOrder, index: int) -> None:
        nonlocal most
        real(self, index)
        most = max(most, len(self))

    monkeypatch.setattr(loop.RowOrder, "read", watched)
    texts = ["slow " * 1, *(str(n) for n in range(3000))]
    source = prompts(tmp_path / "in.jsonl", texts)
    run(source, tmp_path / "out.jsonl", workers=2, order="input")
    limit = 2 * 8 + 1
    assert most <= loop._WINDOW * limit * 2


def test_shards_have_outputs_of_their_own_and_global_indices(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", TEXTS)
    found: dict[int, str] = {}
    for index in range(3):
        outcome = run(source, tmp_path / "out.jsonl", shard=Shard(index, 3))
        part = texts_of(outcome.output)
        assert outcome.stats.total == len(part)
        assert all(row % 3 == index for row in part)
        found |= part
    assert found == expected(TEXTS)


# --- bad rows


def test_bad_rows_are_written_and_the_job_goes_on(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "a"}, b"{broken", {"prompt": "refuse"}, {"x": 1}, {"prompt": "b"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    said = Said()
    outcome = run(source, tmp_path / "out.jsonl", said=said)
    errors = {index: row["error"] for index, row in by_index(tmp_path / "out.jsonl").items()}
    assert [bool(errors[index]) for index in range(5)] == [False, True, True, True, False]
    assert errors[2] == "the prompt is refused"
    assert (outcome.stats.num_finished, outcome.stats.num_failed) == (5, 3)
    assert "error: row 1: broken JSON" in said.text


def test_column_that_no_row_has_is_told_once_at_the_end(tmp_path: Path) -> None:
    """A slip in its name once gave nulls, or the job's own sampling, without a word."""
    rows = [{"prompt": "a", "rare": 1}, b"{broken", {"prompt": "b"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    keep = (("rare", "rare"), ("nope", "n"), ("heat", "heat"))
    options: dict[str, Any] = {"keep": keep, "sampling_column": "heat"}
    for expected in (
        [
            "warning: --keep-columns 'nope': no row of this run has that column",
            "warning: --keep-columns 'heat': no row of this run has that column",
            "warning: --sampling-column 'heat': no row of this run has that column",
        ],
        [],  # all is finished: it looks at no row
    ):
        said = Said()
        run(source, tmp_path / "out.jsonl", said=said, **options)
        assert [line for line in said if line.startswith("warning")] == expected
    assert [row["rare"] for row in by_index(tmp_path / "out.jsonl").values()].count(1) == 1


def test_column_that_rows_of_an_earlier_run_had_is_no_slip(tmp_path: Path) -> None:
    """Both a retry and a job that goes on look at some rows only."""
    rows = [{"prompt": "a", "rare": 1}, {"prompt": "b", "rare": 2}, {"prompt": "refuse"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    run(source, out, keep=(("rare", "rare"),), order="input")
    said = Said()
    run(source, out, said=said, keep=(("rare", "rare"),), order="input", retry_errors=True)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:2]))
    run(source, out, said=said, keep=(("rare", "rare"),), order="input")
    assert len(read(out)) == 3
    assert "warning" not in said.text


def test_input_with_bad_rows_only_starts_no_worker(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"x": 1}] * 2500)
    outcome = run(source, tmp_path / "out.jsonl", factory=job_engines.BROKEN_FACTORY)
    assert outcome.stats.num_failed == 2500
    assert outcome.error is None


def test_ids_that_stand_twice_are_errors_of_the_later_rows_also_after_a_resume(
    tmp_path: Path,
) -> None:
    rows = [{"id": name, "prompt": "p"} for name in ("a", "b", "a", "c", "b", "a")]
    rows.append({"prompt": "p", "id": 6})
    rows.append({"prompt": "p", "id": "6"})
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    run(source, out, order="input")
    whole = out.read_bytes()
    errors = [row["error"] for row in read(out)]
    assert [bool(error) for error in errors] == [0, 0, 1, 0, 1, 1, 0, 1]
    assert errors[5] == "id 'a' is that of row 0 too; give each its own"
    lines = whole.splitlines(keepends=True)
    for missing in range(len(lines)):
        out.write_bytes(b"".join(line for i, line in enumerate(lines) if i != missing))
        run(source, out, order="input")
        assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines()), missing


def test_input_that_breaks_off_keeps_what_came_before(tmp_path: Path) -> None:
    import gzip

    source = tmp_path / "in.jsonl.gz"
    lines = b"".join(b'{"prompt": "%s"}\n' % os.urandom(20).hex().encode() for _ in range(2000))
    source.write_bytes(gzip.compress(lines)[:20_000])
    outcome = run(source, tmp_path / "out.jsonl")
    assert isinstance(outcome.error, InputError)
    assert "cannot be read on" in str(outcome.error)
    rows = by_index(tmp_path / "out.jsonl")
    assert sorted(rows) == list(range(len(rows)))
    assert len(rows) > 100


# --- resume


@pytest.mark.parametrize("output", ["out.jsonl", "out"])
def test_a_resumed_job_runs_the_rows_that_are_missing(tmp_path: Path, output: str) -> None:
    source = prompts(tmp_path / "in.jsonl", TEXTS)
    out = tmp_path / output
    limited = run(source, out, part_rows=64)
    whole = read(out)
    if output == "out":
        parts = sorted(out.glob("*.parquet"))
        parts[1].unlink()
        parts[-1].unlink()
    else:
        out.write_bytes(out.read_bytes()[:5000])
    num_left = len(read(out) if output == "out" else out.read_bytes().splitlines()[:-1])
    said = Said()
    outcome = run(source, out, part_rows=64, said=said)
    assert outcome.stats.num_before == num_left < limited.stats.num_finished
    assert f"going on: {num_left} rows are finished" in said.text
    key = lambda row: row["row_index"]  # noqa: E731
    assert sorted(read(out), key=key) == sorted(whole, key=key)


def test_another_config_or_input_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", ["a", "b"])
    out = tmp_path / "out.jsonl"
    run(source, out)
    before = out.read_bytes()
    with pytest.raises(OutputError, match=r"config\.sampling\.temperature was 0\.0, now 0\.5"):
        run(source, out, sampling={"temperature": 0.5})
    prompts(source, ["a", "c"])
    with pytest.raises(OutputError, match=r"input\.0\.sha256 was"):
        run(source, out)
    assert out.read_bytes() == before
    prompts(source, ["a", "b"])
    assert run(source, out).stats.num_before == 2


def test_row_that_stands_twice_is_refused(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", ["a", "b"])
    out = tmp_path / "out.jsonl"
    run(source, out)
    out.write_bytes(out.read_bytes() * 2)
    with pytest.raises(OutputError, match="stands there twice"):
        run(source, out)


@pytest.mark.parametrize("index", [-1, -2, 3, 999, 10**15, 2**63, 2**64 - 1])
def test_row_that_the_input_has_not_is_refused(tmp_path: Path, index: int) -> None:
    """Once counted as finished, or told to stand there twice, or a MemoryError."""
    source = prompts(tmp_path / "in.jsonl", ["a", "b", "c"])
    out = tmp_path / "out.jsonl"
    run(source, out)
    row = {**read(out)[0], "id": "more", "row_index": index}
    whole = out.read_bytes() + json.dumps(row).encode() + b"\n"
    out.write_bytes(whole)
    wanted = rf"out\.jsonl: row {index} stands there, (but the input has 3 rows|which is no row)"
    with pytest.raises(OutputError, match=wanted):
        refused(run(source, out))
    assert out.read_bytes() == whole


def test_index_that_is_no_number_is_no_line_of_a_job(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", ["a", "b", "c"])
    out = tmp_path / "out.jsonl"
    run(source, out)
    first, *others = read(out)
    write_jsonl(out, [{**first, "row_index": bool(first["row_index"])}, *others])
    with pytest.raises(OutputError, match=r"out\.jsonl:1: not a line of this job"):
        run(source, out)


def test_row_of_another_shard_is_refused(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", TEXTS)
    out = run(source, tmp_path / "out.jsonl", shard=Shard(1, 3)).output
    write_jsonl(
        out, [{**row, "row_index": row["row_index"] + (i == 5)} for i, row in enumerate(read(out))]
    )
    with pytest.raises(OutputError, match=r"stands there, which is no row of shard 1/3"):
        run(source, tmp_path / "out.jsonl", shard=Shard(1, 3))


@pytest.mark.parametrize(
    ("index", "what"),
    [(-1, "row -1 stands there, which is no row"), (True, "no whole part of this job")],
)
def test_part_with_a_row_that_no_job_wrote_is_refused(
    tmp_path: Path, index: int, what: str
) -> None:
    import pyarrow
    import pyarrow.parquet

    source = prompts(tmp_path / "in.jsonl", ["a"])
    run(source, tmp_path / "out")
    rows = [{**row, "row_index": index} for row in read(tmp_path / "out")]
    part = tmp_path / "out" / "part-00000.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), part)
    with pytest.raises(OutputError, match=what):
        run(source, tmp_path / "out")


def test_output_of_no_job_is_refused_and_left_alone(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", ["a"])
    out = tmp_path / "out.jsonl"
    out.write_text('{"mine": 1}\n')
    with pytest.raises(OutputError, match="exists and is no job's"):
        run(source, out)
    assert out.read_text() == '{"mine": 1}\n'
    assert not (tmp_path / "out.jsonl.job").exists()


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".jsonl", "x" * 247 + ".jsonl"])
def test_output_of_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    """The last one alone could be, but its state's not."""
    source = prompts(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(ConfigError, match=r"--output .*: File name too long; give another name"):
        run(source, tmp_path / name)


def test_output_within_the_input_is_refused(tmp_path: Path) -> None:
    prompts(tmp_path / "in.jsonl", ["a"])
    for given, output in (
        (tmp_path, tmp_path / "out.jsonl"),
        (tmp_path, tmp_path / "out"),
        (tmp_path / "*.jsonl", tmp_path / "out.jsonl"),
        (tmp_path / "in.jsonl", tmp_path / "in.jsonl"),
    ):
        with pytest.raises(ConfigError, match=r"is within the input|is the input file"):
            run(given, output)


@pytest.mark.parametrize("output", ["out.jsonl", "out"])
@pytest.mark.parametrize("order", ["completion", "input"])
def test_failed_rows_are_retried_where_they_stand_and_once(
    tmp_path: Path, output: str, order: str
) -> None:
    key = tmp_path / "key"
    texts = [f"once {key} {i}" if i % 7 == 0 else str(i) for i in range(100)]
    texts[50] = "refuse"
    source = prompts(tmp_path / "in.jsonl", texts)
    out = tmp_path / output
    first = run(source, out, order=order, part_rows=30)
    assert first.stats.num_failed == 16
    places = [row["row_index"] for row in read(out)]
    # Without the option they are finished, as they are.
    assert run(source, out, order=order, part_rows=30).stats.num_failed == 16
    key.touch()
    second = run(source, out, order=order, part_rows=30, retry_errors=True)
    assert (second.stats.num_finished, second.stats.num_failed) == (100, 1)
    assert second.stats.num_before == 84
    assert [row["row_index"] for row in read(out)] == places
    wanted = expected(texts) | {50: ""}
    assert texts_of(out) == wanted
    assert run(source, out, order=order, part_rows=30, retry_errors=True).stats.num_failed == 1


@pytest.mark.parametrize("output", ["out.jsonl", "out"])
def test_retry_that_was_cut_off_is_taken_in_by_the_next_run(
    tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    texts = [f"once {key} {i}" for i in range(20)]
    source = prompts(tmp_path / "in.jsonl", texts)
    out = tmp_path / output
    run(source, out)
    key.touch()
    from graphengine.jobs import job

    with monkeypatch.context() as patch:
        patch.setattr(job._Job, "_take_in_retried", lambda self: None)
        run(source, out, retry_errors=True)
    assert all(row["error"] for row in read(out)), "nothing was put in its place yet"
    assert run(source, out).stats.num_failed == 0
    assert texts_of(out) == expected(texts)


# --- workers


def test_dead_worker_s_rows_go_to_others(tmp_path: Path) -> None:
    texts = [f"{i} slow" for i in range(300)]
    source = prompts(tmp_path / "in.jsonl", texts)
    said = Said()
    killed: list[int] = []

    def kill() -> None:
        """The second worker, once rows are being written."""
        wait_for(lambda: (tmp_path / "out.jsonl").exists())
        pid = worker_pids()[-1]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run(source, tmp_path / "out.jsonl", workers=2, said=said)
    killer.join()
    assert killed
    assert outcome.error is None
    assert outcome.stats.num_deaths == 1
    assert "died (killed by SIGKILL); its" in said.text
    assert texts_of(tmp_path / "out.jsonl") == expected(texts)
    # What the dead process had begun is counted once, where it was done again.
    assert outcome.stats.output_tokens == 900
    workers = outcome.stats.workers
    assert [worker.num_starts for worker in workers] == [1, 2]
    assert sum(worker.num_rows for worker in workers) == 300
    assert sum(worker.output_tokens for worker in workers) == 900


def test_job_goes_on_beside_a_worker_that_cannot_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWICE_DIR", str(tmp_path))
    texts = [f"{i} slow" for i in range(200)]
    texts[30] = f"fall {tmp_path / 'fell'}"
    source = prompts(tmp_path / "in.jsonl", texts)
    said = Said()
    outcome = run(
        source, tmp_path / "out.jsonl", workers=2, factory=job_engines.TWICE_FACTORY, said=said
    )
    assert outcome.error is None
    assert "gave up: the GPU is gone" in said.text
    assert texts_of(tmp_path / "out.jsonl") == expected(texts)
    alone, lost = sorted(outcome.stats.workers, key=lambda worker: worker.num_starts)
    assert (alone.num_starts, lost.num_starts) == (1, 2)
    assert alone.num_rows + lost.num_rows == 200
    assert alone.num_rows > 150
    assert lost.ready_s is None
    # From its last result on it was idle, and the GPU is counted so: half busy, half of the time.
    assert outcome.stats.tail_share is not None
    assert outcome.stats.tail_share > 0.5
    assert outcome.stats.gpu_busy is not None
    assert 0.2 < outcome.stats.gpu_busy < 0.4
    assert alone.gpu_busy == pytest.approx(0.5)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_row_that_kills_its_workers_is_given_up_and_no_other_is(
    tmp_path: Path, num_workers: int
) -> None:
    texts = [str(i) for i in range(60)]
    texts[20] = "die"
    source = prompts(tmp_path / "in.jsonl", texts)
    outcome = run(source, tmp_path / "out.jsonl", workers=num_workers)
    assert outcome.error is None
    assert outcome.stats.num_deaths == loop._DEATHS_TO_GIVE_UP
    rows = by_index(tmp_path / "out.jsonl")
    assert [index for index, row in rows.items() if row["error"]] == [20]
    assert rows[20]["error"] == "4 workers died on it, two of them with no other row"
    assert texts_of(tmp_path / "out.jsonl") == expected(texts) | {20: ""}


def test_job_ends_when_no_worker_is_left_and_goes_on_with_new_ones(tmp_path: Path) -> None:
    texts = [str(i) for i in range(60)]
    for place in (5, 25, 45):
        texts[place] = "die"
    source = prompts(tmp_path / "in.jsonl", texts)
    out = tmp_path / "out.jsonl"
    outcome = run(source, out)
    assert isinstance(outcome.error, WorkersLostError)
    assert 0 < len(read(out)) < 60
    for _ in range(3):
        outcome = run(source, out)
    assert outcome.error is None
    assert texts_of(out) == expected(texts) | {5: "", 25: "", 45: ""}


def test_engine_that_cannot_start_is_one_error_and_not_started_again(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", ["a"])
    said = Said()
    began_s = time.monotonic()
    outcome = run(
        source,
        tmp_path / "out.jsonl",
        workers=2,
        factory=job_engines.BROKEN_FACTORY,
        said=said,
    )
    assert type(outcome.error) is GraphEngineError
    assert str(outcome.error) == "the model does not fit; take a smaller one"
    assert outcome.stats.num_deaths == 0
    assert time.monotonic() - began_s < 20


def test_workers_go_with_a_job_that_is_killed(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", [f"{i} slow" for i in range(200)])
    job = start(source, tmp_path / "out.jsonl", workers=2)
    wait_for(lambda: (tmp_path / "out.jsonl").exists())
    pids = worker_pids(job.pid)
    assert len(pids) == 2
    job.kill()
    job.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids), seconds=5.0)
    assert run(source, tmp_path / "out.jsonl", workers=2).stats.num_finished == 200


def test_second_process_on_one_output_is_refused(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", [f"{i} slow" for i in range(150)])
    job = start(source, tmp_path / "out.jsonl")
    wait_for(lambda: (tmp_path / "out.jsonl").exists())
    with pytest.raises(OutputError, match="is being written by another process"):
        run(source, tmp_path / "out.jsonl")
    job.kill()
    job.wait()
    # The lock went with its process.
    assert run(source, tmp_path / "out.jsonl").stats.num_finished == 150


@pytest.mark.parametrize("order", ["completion", "input"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_a_job_that_goes_on(
    tmp_path: Path, signum: int, code: int, order: str
) -> None:
    texts = [f"{i} slow" for i in range(200)]
    source = prompts(tmp_path / "in.jsonl", texts)
    out = tmp_path / "out.jsonl"
    job = start(source, out, order=order)
    wait_for(lambda: out.exists() and out.stat().st_size > 2000)
    pids = worker_pids(job.pid)
    # Ctrl-C on a terminal reaches the workers too; what becomes of them is the job's affair.
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert all(is_alive(pid) for pid in pids)
    job.send_signal(signum)
    assert job.wait(20) == code
    assert not any(is_alive(pid) for pid in pids)
    assert out.read_bytes().endswith(b"\n")
    num_rows = len(read(out))
    assert 0 < num_rows < 200
    outcome = run(source, out, order=order)
    assert outcome.stats.num_before == num_rows
    assert texts_of(out) == expected(texts)


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    texts = [f"{i} slow" for i in range(150)]
    source = prompts(tmp_path / "in.jsonl", texts)
    out = tmp_path / "out.jsonl"
    job = start(source, out)
    wait_for(lambda: out.exists() and out.stat().st_size > 2000)
    # A worker that does not listen: the first signal waits for it.
    (pid,) = worker_pids(job.pid)
    os.kill(pid, signal.SIGSTOP)
    job.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    assert job.wait(2) == 130
    wait_for(lambda: not is_alive(pid))
    run(source, out)
    assert texts_of(out) == expected(texts)


def start(source: Path, output: Path, **options: Any) -> subprocess.Popen[bytes]:
    """A job in a process of its own, which exits as the command line does."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jobs import run\n"
        f"outcome = run(Path({str(source)!r}), Path({str(output)!r}), **{options!r})\n"
        "sys.exit(128 + outcome.signum if outcome.signum else 0)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})


def worker_pids(parent: int | None = None) -> list[int]:
    from perf.jobs_kill import children

    return children(parent or os.getpid())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until_s, "it never happened"
        time.sleep(0.01)


def test_output_has_one_lock_by_whatever_name(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", ["a", "b"])
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(real)
    assert Place.of(config(source, link)) == replace(
        Place.of(config(source, real)), config=config(source, link)
    )
    run(source, link, prompt_column="q")
    assert link.is_symlink()
    assert len(read(real)) == 2
    run(source, real, prompt_column="q")
    assert len(read(real)) == 2


def test_journal_of_a_part_goes_on_where_parts_were_taken_away(tmp_path: Path) -> None:
    source = prompts(tmp_path / "in.jsonl", [f"t{i}" for i in range(12)])
    output = tmp_path / "out"
    run(source, output, prompt_column="q", part_rows=4)
    records = read(output)
    for part in output.glob("*.parquet"):
        part.unlink()
    journal = output / "_job" / "part-00002.jsonl"
    journal.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records[8:]))
    run(source, output, prompt_column="q", part_rows=4)
    assert sorted(by_index(output)) == list(range(12))


def test_output_that_a_glob_would_read_again_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    prompts(folder / "in.jsonl", ["a"])
    for pattern, output in (
        (f"{folder}/./*.jsonl", folder / "out.jsonl"),
        (f"{tmp_path}/**/*.jsonl", tmp_path / "out.jsonl"),
        (f"{folder}/**/*.parquet", folder / "out"),
    ):
        with pytest.raises(ConfigError, match="is within the input"):
            Place.of(config(Path(pattern), output)).check()


def test_broken_row_takes_no_id_from_another(tmp_path: Path) -> None:
    rows = [b"{broken", {"id": 0, "q": "a"}, {"q": "b"}]
    source, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    for _ in range(2):  # and none when it is read back
        run(source, output, prompt_column="q")
        assert [row["error"] == "" for row in by_index(output).values()] == [False, True, True]
        lines = output.read_bytes().splitlines(keepends=True)
        output.write_bytes(b"".join(line for line in lines if b'"row_index":1' not in line))
