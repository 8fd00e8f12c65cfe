"""Does a job survive SIGKILL at any moment, in any process? Compares with an uninterrupted run.

`python -m perf.jobs_kill --kills 200 --output FILE.json`: jobs of 2,000 rows of the demo model with
seeded sampling, in several forms, each killed and run again until it is complete. Then the same on
a disk that is full, if this process may mount one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perf.result_file import result_path, write_result
from perf.script import check_least, errors_as_exit

NUM_ROWS = 2000
_OPTIONS = ("--device=cpu", "--temperature=1.5", "--max-tokens=12", "--seed=7", "--token-ids")
# A job takes a few seconds of work then, so that kills meet it at work.
_SMALL_BATCHES = ("--max-num-seqs=16",)
FORMS: dict[str, tuple[str, ...]] = {
    "jsonl": (),
    "jsonl-2-workers": ("--workers=2",),
    "jsonl-in-order": ("--order=input", "--workers=2"),
    "parquet": ("--part-rows=300", "--workers=2"),
}
_MOST_RUNS = 200


def write_input(path: Path, num_rows: int = NUM_ROWS) -> None:
    """Sums, some of them no prompt at all: rows in error come through a kill as others do."""
    rng = random.Random(0)
    with path.open("w") as file:
        for index in range(num_rows):
            prompt = "" if index % 97 == 13 else f"{rng.randrange(1000)}+{rng.randrange(1000)}="
            file.write(json.dumps({"id": f"row-{index}", "prompt": prompt}) + "\n")


def output_of(form: str, folder: Path) -> Path:
    return folder / ("out" if form == "parquet" else "out.jsonl")


def read_rows(output: Path) -> list[bytes]:
    """Every row of an output, sorted by index, as the bytes of one line."""
    if output.is_dir():
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(output).to_pylist()
    else:
        rows = [json.loads(line) for line in output.read_bytes().splitlines()]
        if all(line.endswith(b"\n") for line in output.read_bytes().splitlines(keepends=True)):
            lines = output.read_bytes().splitlines()
            order = sorted(range(len(rows)), key=lambda place: int(rows[place]["row_index"]))
            return [lines[place] for place in order]
        raise AssertionError("the output of a complete job ends within a line")
    rows.sort(key=lambda row: int(row["row_index"]))
    return [json.dumps(row).encode() for row in rows]


def start_job(form: str, source: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cli", "run", "demo", str(source), "--output", str(output)]
    return subprocess.Popen(
        [*command, *_OPTIONS, *_SMALL_BATCHES, *FORMS[form]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def run_job(form: str, source: Path, output: Path) -> tuple[int, str]:
    """Exit code and standard error of a job nobody disturbs."""
    process = start_job(form, source, output)
    _, stderr = process.communicate()
    return process.returncode, stderr.decode()


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                # The name, in parentheses, may hold anything; the parent is the second after it.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def num_bytes_written(output: Path) -> int:
    """Of all files of an output, journals too."""
    total = 0
    for path in (output, output.with_name(output.name + ".job")):
        files = path.rglob("*") if path.is_dir() else [path]
        for file in files:
            with contextlib.suppress(OSError):
                total += file.stat().st_size if file.is_file() else 0
    return total


def kill_until_complete(
    form: str, source: Path, output: Path, rng: random.Random, *, most_kills: int
) -> dict[str, int]:
    """Runs one job again and again, killing a process of it each time until it is complete or
    `most_kills` were done. Counts of what was killed, and when."""
    counts = dict.fromkeys(("job", "worker", "starting", "working", "runs", "orphans"), 0)
    while counts["runs"] < _MOST_RUNS:
        counts["runs"] += 1
        process = start_job(form, source, output)
        while process.poll() is None and counts["job"] + counts["worker"] < most_kills:
            _kill_one(process, output, rng, counts)
        _, stderr = process.communicate()
        if process.returncode in (0, 1):  # 1: some rows are in error, as in the undisturbed run
            return counts
        if process.returncode not in (-signal.SIGKILL, 3):
            raise AssertionError(f"exit code {process.returncode}: {stderr.decode()}")
    raise AssertionError(f"not complete after {_MOST_RUNS} runs")


def _kill_one(
    process: subprocess.Popen[bytes], output: Path, rng: random.Random, counts: dict[str, int]
) -> None:
    """Waits for a random moment, then kills the job or one of its workers."""
    is_early = rng.random() < 0.3
    before = num_bytes_written(output)
    until_s = time.monotonic() + (rng.uniform(0.0, 5.0) if is_early else 60.0)
    has_grown = False
    while time.monotonic() < until_s and process.poll() is None:
        if not is_early and num_bytes_written(output) > before + 1000:
            has_grown = True
            break
        time.sleep(0.01)
    if has_grown:
        time.sleep(rng.uniform(0.0, 1.0))
    workers = children(process.pid)
    if process.poll() is not None:
        return
    is_worker = bool(workers) and rng.random() < 0.5
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(workers) if is_worker else process.pid, signal.SIGKILL)
        counts["worker" if is_worker else "job"] += 1
        counts["working" if has_grown else "starting"] += 1
    if not is_worker:
        process.wait()
        counts["orphans"] += _num_orphans(workers)


def _num_orphans(workers: list[int]) -> int:
    """Workers that outlive their job by more than a moment."""
    for _ in range(100):
        alive = [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists() and is_worker(pid)]
        if not alive:
            return 0
        time.sleep(0.05)
    return len(alive)


def is_worker(pid: int) -> bool:
    """Whether a process is a worker of a job, by its command line."""
    try:
        return b"graphengine.jobs.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size`. Needs the right to mount: else raises PermissionError."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)],
        capture_output=True,
        check=False,
    ).returncode:
        raise PermissionError("no right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_disk(form: str, source: Path, folder: Path) -> tuple[int, str, int, Path]:
    """Runs a job on a disk too small for it, makes the disk larger, and runs it again. Exit code
    and last line of the first run, rows it kept, and the output, on a larger disk."""
    output = output_of(form, folder)
    code, stderr = run_job(form, source, output)
    num_kept = 0
    for path in (output, output.with_name(output.name + ".job")):
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            num_kept += file.read_bytes().count(b"\n") if file.is_file() else 0
    if output.is_dir() and any(output.glob("*.parquet")):
        num_kept += len(read_rows(output))
    subprocess.run(["mount", "-o", "remount,size=16m", str(folder)], check=True)
    again, stderr_again = run_job(form, source, output)
    if again not in (0, 1):
        raise AssertionError(f"exit code {again} on the larger disk: {stderr_again}")
    return code, stderr.splitlines()[-1], num_kept, output


@errors_as_exit()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=result_path, required=True)
    options = parser.parse_args()
    check_least(options, 1, "kills")
    result = _measure(options.kills, options.seed)
    print(json.dumps({key: value for key, value in result.items() if key != "jobs"}), flush=True)
    write_result(result, options.output)


def _measure(most_kills: int, seed: int) -> dict[str, Any]:
    """Jobs by form in turn until there were `most_kills`, then those on a full disk."""
    rng = random.Random(seed)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "in.jsonl"
        write_input(source)
        expected = _undisturbed(source, folder)
        jobs: list[dict[str, Any]] = []
        num_kills = 0
        while num_kills < most_kills:
            form = list(FORMS)[len(jobs) % len(FORMS)]
            shutil.rmtree(folder / "job", ignore_errors=True)
            (folder / "job").mkdir()
            output = output_of(form, folder / "job")
            counts = kill_until_complete(form, source, output, rng, most_kills=12)
            num_kills += counts["job"] + counts["worker"]
            is_same = read_rows(output) == expected[form == "parquet"]
            jobs.append({"form": form, "is_same": is_same, **counts})
            print(f"{num_kills} kills: {jobs[-1]}", file=sys.stderr, flush=True)
        disks = _full_disks(source, folder, expected)
    totals = {
        key: sum(job[key] for job in jobs) for key in jobs[0] if key not in ("form", "is_same")
    }
    return {
        "num_rows": NUM_ROWS,
        "num_kills": num_kills,
        "num_jobs": len(jobs),
        "num_jobs_with_other_rows": sum(not job["is_same"] for job in jobs),
        "totals": totals,
        "full_disk": disks,
        "seconds": round(time.monotonic() - began_s, 1),
        "jobs": jobs,
    }


def _undisturbed(source: Path, folder: Path) -> dict[bool, list[bytes]]:
    """Rows of a run nobody disturbs, by whether they are in Parquet."""
    expected = {}
    for form in ("jsonl", "parquet"):
        output = output_of(form, folder)
        code, stderr = run_job(form, source, output)
        assert code == 1, stderr
        expected[form == "parquet"] = read_rows(output)
        assert len(expected[form == "parquet"]) == NUM_ROWS
    return expected


def _full_disks(
    source: Path, folder: Path, expected: dict[bool, list[bytes]]
) -> list[dict[str, Any]]:
    found = []
    for form, size in (("jsonl", "160k"), ("jsonl-in-order", "160k"), ("parquet", "48k")):
        try:
            with small_disk(folder / f"disk-{form}", size) as disk:
                code, line, num_kept, output = fill_disk(form, source, disk)
                is_same = read_rows(output) == expected[form == "parquet"]
                line = line.replace(str(disk), "DISK")
        except PermissionError as error:
            return [{"skipped": str(error)}]
        found.append(
            {"form": form, "exit_code": code, "line": line, "kept": num_kept, "is_same": is_same}
        )
    return found


if __name__ == "__main__":
    main()
