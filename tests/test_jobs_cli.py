"""Does `graphengine run` do a job from the command line, and say what is wrong in one line?"""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import job_engines
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import by_index, read, write_jsonl
from typer.testing import CliRunner, Result

import cli
import graphengine.jobs.job
from cli import app
from graphengine.jobs.watch import (
    JobStats,
    Outcome,
    WorkerStats,
    job_line,
    job_report,
    job_summary,
)
from graphengine.jobs.workers import ENGINE
from graphengine.request import SamplingParams

ROOT = Path(__file__).parents[1]
ON_CPU = ("--device=cpu", "--max-num-seqs=8")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    real = graphengine.jobs.job.run_job
    monkeypatch.setattr(graphengine.jobs.job, "run_job", partial(real, factory=job_engines.FACTORY))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["run", "demo", *map(str, arguments), *ON_CPU])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", ({"q": f"q{i}", "n": i} for i in range(20)))


def test_job_ends_with_its_counts_on_standard_output(tmp_path: Path, source: Path) -> None:
    out, summary = tmp_path / "out.jsonl", tmp_path / "summary.json"
    result = run(source, "--output", out, "--prompt-column=q", "--summary", summary)
    assert result.exit_code == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert counts == json.loads(summary.read_text())
    assert counts["num_rows"] == 20
    assert counts["is_complete"] is True
    assert counts["output_tokens"] == 60
    assert "20 rows: 40 prompt and 60 output tokens in" in result.stderr
    assert len(by_index(out)) == 20


def test_full_standard_output_is_one_line_and_the_rows_are_written(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once a traceback and exit code 1, which is that of rows in error."""
    out = tmp_path / "out.jsonl"
    arguments = ["run", "demo", str(source), f"--output={out}", "--prompt-column=q", *ON_CPU]
    monkeypatch.setattr(sys, "argv", ["graphengine", *arguments])
    # Closing it would raise if text were left, as exit does.
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: standard output: No space left on device")
    assert len(by_index(out)) == 20


def test_options_reach_the_rows(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    result = run(
        source,
        "--output",
        out,
        "--template={{ q }}/{{ n }}",
        "--id-column=n",
        "--keep-columns=q=question,n",
        "--token-ids",
        "--order=input",
        "--part-rows=8",
        "--temperature=0.5",
        "--max-tokens=2",
        "--workers=2",
        "--shard=1/2",
    )
    assert result.exit_code == 0, result.stderr
    rows = read(out / "shard-00001-of-00002")
    assert [row["row_index"] for row in rows] == list(range(1, 20, 2))
    assert [row["id"] for row in rows] == [str(i) for i in range(1, 20, 2)]
    assert [row["question"] for row in rows] == [f"q{i}" for i in range(1, 20, 2)]
    assert [row["n"] for row in rows] == [str(i) for i in range(1, 20, 2)]  # JSONL has no types
    assert all(row["text"].startswith(f"<q{row['n']}/{row['n']}>") for row in rows)
    assert all(row["text"].endswith(" 0.5") for row in rows)
    assert all(row["token_ids"] == [7, 7] for row in rows)
    assert len(list((out / "shard-00001-of-00002").glob("*.parquet"))) == 2


def test_exit_code_tells_rows_in_error_broken_input_and_lost_workers(tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"prompt": 5}])
    assert run(bad, "--output", tmp_path / "bad-out.jsonl").exit_code == 1
    texts = ["a", "die", "b", "die", "c"]
    deadly = write_jsonl(tmp_path / "deadly.jsonl", ({"prompt": text} for text in texts))
    result = run(deadly, "--output", tmp_path / "deadly-out.jsonl")
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1].startswith("error: no worker is left")
    assert json.loads(result.stdout.splitlines()[-1])["is_complete"] is False


def parquet(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def truncated(path: Path) -> Path:
    parquet(path, prompt=["a"] * 1000)
    path.write_bytes(path.read_bytes()[:-50])
    return path


def made(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


ROW = b'{"prompt": "a"}\n'
JOB_PROBLEMS: dict[str, tuple[Callable[[Path], list[str | Path]], str]] = {
    "missing file": (lambda p: [p / "none.jsonl"], "none.jsonl: No such file or directory"),
    "empty file": (lambda p: [made(p / "in.jsonl", b"")], "holds no row"),
    "blank lines only": (lambda p: [made(p / "in.jsonl", b"\n \n")], "holds no row"),
    "empty Parquet": (lambda p: [parquet(p / "in.parquet", prompt=[])], "holds no row"),
    "empty gz": (lambda p: [made(p / "in.jsonl.gz", b"")], "holds no row"),
    "truncated Parquet": (lambda p: [truncated(p / "in.parquet")], "no whole Parquet file"),
    "text as Parquet": (lambda p: [made(p / "in.parquet", ROW)], "no whole Parquet file"),
    "no gz": (lambda p: [made(p / "in.jsonl.gz", ROW)], "cannot be read on (Not a gzipped file"),
    "no zst": (lambda p: [made(p / "in.jsonl.zst", ROW)], "cannot be read on"),
    "missing Parquet column": (
        lambda p: [parquet(p / "in.parquet", q=["a"]), "--prompt-column=prompt"],
        "no column 'prompt'; it has 'q'",
    ),
    "no Parquet column of a prompt": (
        lambda p: [parquet(p / "in.parquet", q=["a"])],
        "name one with --prompt-column",
    ),
    "missing Parquet column to keep": (
        lambda p: [parquet(p / "in.parquet", prompt=["a"]), "--keep-columns=x"],
        "no column 'x'; it has 'prompt'",
    ),
    "broken template": (
        lambda p: [made(p / "in.jsonl", ROW), "--template={{ a"],
        "--template cannot be used",
    ),
    "directory without an input": (lambda p: [p], "no input in this directory"),
    "digits": (
        lambda p: [made(p / "in.jsonl", ROW), f"--workers={'1' * 5000}"],
        "--workers is '1111",
    ),
    "workers": (lambda p: [made(p / "in.jsonl", ROW), "--workers=many"], "give a number or auto"),
    "shard": (lambda p: [made(p / "in.jsonl", ROW), "--shard=3/2"], "--shard is '3/2'"),
    "sampling": (lambda p: [made(p / "in.jsonl", ROW), "--top-p=7"], "top_p is 7.0"),
    "output suffix": (
        lambda p: [made(p / "in.jsonl", ROW), "--output=out.csv"],
        "give a .jsonl file, or a directory",
    ),
    "bytes as a column": (
        lambda p: [made(p / "in.jsonl", ROW), "--keep-columns", os.fsdecode(b"\xff")],
        "--keep-columns holds half of a surrogate pair (\\udcff), on a command line the byte 0xff",
    ),
    "bytes as output": (
        lambda p: [made(p / "in.jsonl", ROW), f"--output={p}/" + os.fsdecode(b"\xff.jsonl")],
        "--output holds half of a surrogate pair (\\udcff), on a command line the byte 0xff",
    ),
    "output dash": (
        lambda p: [made(p / "in.jsonl", ROW), "--output=-"],
        "--output is -, where the summary goes; give a file or a directory",
    ),
    "output nowhere": (
        lambda p: [made(p / "in.jsonl", ROW), f"--output={p}/none/out.jsonl"],
        "make it first",
    ),
    "output directory nowhere": (
        lambda p: [made(p / "in.jsonl", ROW), f"--output={p}/none/out"],
        "make it first",
    ),
    "file as directory": (
        lambda p: [made(p / "in.jsonl", ROW), f"--output={made(p / 'out', b'')}"],
        "is a file; give a directory",
    ),
    "summary nowhere": (
        lambda p: [made(p / "in.jsonl", ROW), f"--summary={p}/none/x.json"],
        "--summary {p}/none/x.json: no directory {p}/none; make it first",
    ),
    "summary dash": (
        lambda p: [made(p / "in.jsonl", ROW), "--summary=-"],
        "--summary is -; give a file",
    ),
    "trace dash": (
        lambda p: [made(p / "in.jsonl", ROW), "--trace=-"],
        "--trace is -; give a file",
    ),
    "trace nowhere": (
        lambda p: [made(p / "in.jsonl", ROW), f"--trace={p}/none/x.json"],
        "--trace {p}/none/x.json: no directory {p}/none; make it first",
    ),
    "OpenAI lines in Parquet": (
        lambda p: [
            made(p / "in.jsonl", b'{"custom_id": "a", "url": "u", "body": {}}\n'),
            f"--output={p}/out",
        ],
        "OpenAI lines are JSON; give a .jsonl file",
    ),
}


@pytest.mark.parametrize(("make", "error"), JOB_PROBLEMS.values(), ids=JOB_PROBLEMS)
def test_job_problem_is_one_line_and_exit_code_2(
    tmp_path: Path, make: Callable[[Path], list[str | Path]], error: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    arguments = make(folder)
    result = run(arguments[0], f"--output={tmp_path}/out.jsonl", *arguments[1:])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert error.replace("{p}", str(folder)) in line
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("what", ["input", "output", "output directory"])
def test_place_without_permission_is_one_line(tmp_path: Path, what: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}])
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    if what == "input":
        source.chmod(0)
    output = {"input": tmp_path / "out", "output": closed / "out.jsonl"}.get(what, closed / "out")
    command = [sys.executable, "-m", "cli", "run", "demo", str(source), "--output", str(output)]
    if os.getuid() == 0:
        # Root may write anywhere, unless it gives that up.
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root needs setpriv to be refused anything")
        powers = "-dac_override,-dac_read_search"
        command = [setpriv, f"--bounding-set={powers}", f"--inh-caps={powers}", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    closed.chmod(stat.S_IRWXU)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "ermission denied" in line or "not allowed to write there" in line


def test_refused_resume_shows_the_difference_and_touches_nothing(
    tmp_path: Path, source: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert run(source, "--output", out, "--prompt-column=q").exit_code == 0
    before = out.read_bytes()
    result = run(source, "--output", out, "--prompt-column=q", "--max-tokens=7")
    assert result.exit_code == 2
    assert "config.sampling.max_tokens was 256, now 7" in result.stderr
    assert out.read_bytes() == before


def test_rows_of_every_kind_of_trouble_are_in_one_output(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"id": "good", "prompt": "a"},
        b'{"prompt": ',
        {"text": "no prompt"},
        {"prompt": 5},
        {"prompt": None},
        b'{"prompt": "' + b"x" * 10_000_000 + b'"}',
        b'{"prompt": "\xff"}',
        {"id": "good", "prompt": "again"},
        b'{"prompt": "a\0b"}',
        {"prompt": "a\0b"},  # spelled as an escape it is text
        {"prompt": "last"},
    ]
    out = tmp_path / "out.jsonl"
    result = run(write_jsonl(tmp_path / "in.jsonl", rows), "--output", out, "--order=input")
    assert result.exit_code == 1
    found = read(out)
    assert [row["row_index"] for row in found] == list(range(11))
    assert [bool(row["error"]) for row in found] == [False] + [True] * 8 + [False, False]
    assert all(isinstance(row["error"], str) for row in found)


def test_missing_package_is_one_line_that_names_the_extra(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, output in (("orjson", "out.jsonl"), ("pyarrow", "out"), ("filelock", "o.jsonl")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            patch.delitem(sys.modules, "pyarrow.parquet", raising=False)
            result = run(source, "--output", tmp_path / output, "--prompt-column=q")
        assert result.exit_code == 2, module
        last = result.stderr.splitlines()[-1]
        wanted = (
            f'error: {module} is not installed; in the clone, pip install -e ".[jobs]" brings it'
        )
        assert last == wanted


def start(
    source: Path, output: Path, *, stderr: int, stdout: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """The command in a process of its own, with the stand-in engine."""
    code = (
        "import functools, sys\nimport graphengine.jobs.job as job\nimport cli\n"
        f"job.run_job = functools.partial(job.run_job, factory={job_engines.FACTORY!r})\n"
        f"sys.argv = ['graphengine', 'run', 'demo', {str(source)!r}, '--output', "
        f"{str(output)!r}, '--device=cpu', '--max-num-seqs=8']\ncli.main()\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "TERM": "xterm", "COLUMNS": "160"},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
    )


@pytest.mark.parametrize(
    ("signum", "code", "name"), [(signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_signal_ends_the_command_in_order(
    tmp_path: Path, signum: int, code: int, name: str
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ({"prompt": f"{i} slow"} for i in range(300)))
    out = tmp_path / "out.jsonl"
    job = start(source, out, stderr=subprocess.PIPE)
    while not out.exists():
        time.sleep(0.01)
    job.send_signal(signum)
    stdout, stderr = job.communicate(timeout=20)
    assert job.returncode == code
    counts = json.loads(stdout.splitlines()[-1])
    assert counts["is_complete"] is False
    assert counts["num_rows"] == len(read(out)) < 300
    wanted = f"{name}: stopped; run the same command again to go on"
    assert stderr.decode().splitlines()[-1] == wanted


@pytest.mark.parametrize("reader", ["full", "closed"])
@pytest.mark.parametrize(("end", "code"), [("all good", 2), ("SIGTERM", 143), ("bad row", 1)])
def test_counts_that_nobody_takes_are_told_and_the_job_keeps_its_exit_code(
    tmp_path: Path, end: str, code: int, reader: str
) -> None:
    """A full standard output once made 2 of all, a closed one 1 without a word."""
    if reader == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, stdout = os.pipe()
        os.close(reading)
    rows: list[Any] = [{"prompt": f"{i} slow"} for i in range(300 if end == "SIGTERM" else 3)]
    if end == "bad row":
        rows.append({"prompt": 5})
    out = tmp_path / "out.jsonl"
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    job = start(source, out, stderr=subprocess.PIPE, stdout=stdout)
    os.close(stdout)
    while end == "SIGTERM" and not out.exists():
        time.sleep(0.01)
    if end == "SIGTERM":
        job.send_signal(signal.SIGTERM)
    _, stderr = job.communicate(timeout=20)
    assert job.returncode == code, stderr
    lines = stderr.decode().splitlines()
    wanted = {
        "full": "error: standard output: No space left on device; make room or write the output "
        "elsewhere",
        "closed": "error: standard output is closed; read it to its end",
    }
    assert lines.count(wanted[reader]) == 1, lines
    last = "SIGTERM: stopped; run the same command again to go on"
    assert lines[-1] == (last if end == "SIGTERM" else wanted[reader])


@pytest.mark.parametrize(
    ("texts", "code", "last"),
    [
        (["a"], 2, "error: /dev/full: No space left on device"),
        (["a", "refuse"], 1, "error: /dev/full: No space left on device"),
        (["a", "die", "b", "die", "c"], 3, "error: no worker is left"),
    ],
)
def test_summary_that_cannot_be_written_leaves_the_counts_and_the_exit_code(
    tmp_path: Path, texts: list[str], code: int, last: str
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ({"prompt": text} for text in texts))
    result = run(source, "--output", tmp_path / "out.jsonl", "--summary=/dev/full")
    assert result.exit_code == code, result.stderr
    assert "error: /dev/full: No space left on device" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(last)
    assert json.loads(result.stdout.splitlines()[-1])["num_workers"] == 1


def test_bar_is_on_standard_error_and_the_cursor_comes_back(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ({"prompt": f"{i} slow"} for i in range(100)))
    terminal, child_end = pty.openpty()
    with start(source, tmp_path / "out.jsonl", stderr=child_end) as job:
        os.close(child_end)
        shown = b""
        try:
            while data := os.read(terminal, 65536):
                shown += data
        except OSError:  # Linux reports a closed terminal so
            pass
        assert job.stdout is not None
        stdout = job.stdout.read()
    os.close(terminal)
    text = shown.decode()
    assert re.search(r"\d+/100 rows, [\d,]+ tok/s, ETA 0:00:\d\d, 0 errors, GPU busy 50%", text)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    (line,) = stdout.splitlines()
    assert json.loads(line)["num_rows"] == 100


def stats(**changes: Any) -> JobStats:
    values: dict[str, Any] = {
        "num_finished": 1200,
        "num_failed": 3,
        "num_before": 200,
        "total": 5000,
        "is_exact": False,
        "output_tokens": 31000,
        "prompt_tokens": 5000,
        "gpu_busy": 0.994,
        "num_workers": 8,
        "num_alive": 7,
        "num_deaths": 1,
        "startup_s": 5.0,
        "elapsed_s": 100.0,
        "workers": (),
    }
    return JobStats(**(values | changes))


def test_line_tells_rows_speed_eta_errors_and_gpu() -> None:
    assert job_line(stats(), 5000, 310.4) == (
        "1,200/~5,000 rows, 310 tok/s, ETA 0:06:20, 3 errors, GPU busy 99%, 7 of 8 workers"
    )
    bare = stats(num_finished=0, num_before=0, num_failed=1, gpu_busy=None, num_workers=1)
    assert job_line(bare, None, 0.0) == "0 rows, 0 tok/s, 1 error"
    assert job_line(stats(is_exact=True), 5000, 0.0).startswith("1,200/5,000 rows")
    assert job_report(stats()) == (
        "1,200 rows (3 failed), 200 by earlier runs: 5,000 prompt and 31,000 output tokens in "
        "100.00 s, 310 output tok/s, GPU busy 99.4%"
    )


def test_summary_tells_of_each_worker_and_of_the_tail() -> None:
    worker = WorkerStats(0, "0", 1, 600, 16000, 0.99123, 0.99987, 0.0, 99.0)
    idle = dataclasses.replace(worker, number=1, device="1", ready_s=1.5, last_result_s=96.0)
    unused = dataclasses.replace(worker, number=2, ready_s=None, last_result_s=None)
    both = stats(num_workers=2, workers=(worker, idle))
    found = job_summary(Outcome(Path("out.jsonl"), both))
    assert found["tail_share"] == 0.04
    assert found["workers"][1] == {
        "number": 1,
        "device": "1",
        "num_starts": 1,
        "num_rows": 600,
        "output_tokens": 16000,
        "gpu_busy": 0.9912,
        "fed_gpu_busy": 0.9999,
        "ready_s": 1.5,
        "last_result_s": 96.0,
    }
    assert stats(num_workers=3, workers=(worker, idle, unused)).tail_share == 1.0
    assert stats(num_workers=1, workers=(idle,)).tail_share is None


def test_prompts_of_token_ids_need_no_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = partial(graphengine.jobs.job.run_job, factory=ENGINE)
    monkeypatch.setattr(graphengine.jobs.job, "run_job", real)
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt_token_ids": [1, 5, 14, 5, 15]}])
    out = tmp_path / "out.jsonl"
    result = run(source, "--output", out, "--skip-tokenizer-init", "--token-ids")
    assert result.exit_code == 0, result.stderr
    (row,) = read(out)
    assert row["text"] == ""
    assert len(row["token_ids"]) > 1


def test_options_of_sampling_are_those_of_generate() -> None:
    import inspect

    from cli import generate
    from graphengine.jobs.command import run as run_command

    ours, theirs = inspect.signature(run_command), inspect.signature(generate)
    names = set(SamplingParams.__slots__) | {"tokenizer", "dtype", "max_num_seqs", "trace"}
    for name in names & set(theirs.parameters):
        assert ours.parameters[name] == theirs.parameters[name]


def test_summary_and_trace_never_take_the_place_of_rows(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(source, "--output", out, "--prompt-column=q").exit_code == 0
    rows = out.read_bytes()
    for option, path in (
        ("--summary", out),
        ("--trace", out),
        ("--summary", tmp_path / "out.jsonl.job" / "manifest.json"),
        ("--summary", source),
    ):
        result = run(source, "--output", out, "--prompt-column=q", option, path)
        assert result.exit_code == 2, (option, path)
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert out.read_bytes() == rows
    assert len(source.read_text().splitlines()) == 20


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--trace=data.jsonl", "--workers=2"], "--trace data-0.jsonl is the input file"),
        (["--trace=out.jsonl", "--workers=2"], "--trace out-1.jsonl is within"),
        (["--summary=s.json", "--trace=s.json"], "--summary s.json is the file of --trace s.json"),
        (
            ["--summary=s-1.json", "--trace=s.json", "--workers=2"],
            "--summary s-1.json is the file of --trace s-1.json",
        ),
        (["--summary=link.jsonl"], "--summary link.jsonl is the input file"),
        (["--output=link.jsonl"], "--output link.jsonl is the input file"),
    ],
)
def test_names_that_are_really_written_take_the_place_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], what: str
) -> None:
    """Those of the workers' traces were not looked at, nor hard links."""
    monkeypatch.chdir(tmp_path)
    source = write_jsonl(Path("data-0.jsonl"), [{"prompt": "a"}])
    before = source.read_bytes()
    Path("link.jsonl").hardlink_to(source)
    result = run(source, "--output=out-1.jsonl", *arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {what}")
    assert source.read_bytes() == before
    assert sorted(os.listdir()) == ["data-0.jsonl", "link.jsonl"]


@pytest.mark.parametrize("option", ["--trace", "--summary", "--output"])
def test_file_that_is_standard_output_is_refused(tmp_path: Path, option: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}])
    path = tmp_path / "same.jsonl"
    command = [sys.executable, "-m", "cli", "run", "demo", str(source), "--device=cpu"]
    command += ["--output", str(tmp_path / "out.jsonl"), option, str(path)]
    with path.open("w") as stdout:
        done = subprocess.run(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {option} {path} is the file of standard output")
    assert path.read_text() == ""


def test_hard_link_to_one_of_many_inputs_is_no_summary(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    source = write_jsonl(folder / "a.jsonl", [{"prompt": "a"}])
    before = source.read_bytes()
    link = tmp_path / "s.json"
    link.hardlink_to(source)
    out = tmp_path / "out.jsonl"
    for given in (folder, f"{folder}/*.jsonl"):
        result = run(given, "--output", out, "--summary", link)
        assert result.exit_code == 2
        assert f"--summary {link} is within the input" in result.stderr
    assert source.read_bytes() == before
    assert run(source, "--output", out).exit_code == 0
    linked = tmp_path / "linked.json"
    linked.hardlink_to(out)
    assert (
        "is within the input or the output"
        in run(source, "--output", out, "--trace", linked).stderr
    )


def test_removed_working_directory_is_told_before_a_worker_starts(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker died of it as it loaded torch, and no line said why."""
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    result = run(source, "--output", tmp_path / "out.jsonl", "--prompt-column=q")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the working directory cannot be found (No such file")
    assert not (tmp_path / "out.jsonl").exists()
