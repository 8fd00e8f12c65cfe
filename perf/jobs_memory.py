"""Does a job's memory or its time per row grow with the rows? Runs jobs of two sizes and samples.

`python -m perf.jobs_memory --output FILE.json --chart FILE.png`: 10,000 and 1,000,000 short rows
through the whole job, with an engine that answers at once, so that the job itself is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graphengine.errors import ConfigError
from graphengine.output_file import check_output_path, write_errors
from perf.result_file import result_path, write_result
from perf.script import check_least, errors_as_exit

_SIZES = (10_000, 1_000_000)
_FORMS = {"jsonl": "out.jsonl", "parquet": "out"}
_CHART_ENDINGS = (".png", ".svg", ".pdf")
_SAMPLE_S = 0.2
_NUM_BLOCKS = 20  # of rows, whose time is compared


@errors_as_exit()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs=2, default=_SIZES)
    parser.add_argument("--output", type=result_path, required=True)
    parser.add_argument("--chart")
    options = parser.parse_args()
    check_least(options, 1, "rows")
    if options.chart is not None:
        _check_chart(options.chart)
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for form, output in _FORMS.items():
            for num_rows in options.rows:
                folder = Path(name) / f"{form}-{num_rows}"
                folder.mkdir()
                runs.setdefault(form, []).append(_measure(num_rows, folder, output))
                shown = {k: v for k, v in runs[form][-1].items() if k != "samples"}
                print(f"{form}: {shown}", file=sys.stderr, flush=True)
    figures = {
        form: {
            "peak_mib": [run["peak_mib"] for run in pair],
            "growth_mib": round(pair[1]["peak_mib"] - pair[0]["peak_mib"], 1),
            "us_per_row": [run["us_per_row"] for run in pair],
            "us_per_row_first_and_last_fifth": pair[1]["us_per_row_first_and_last_fifth"],
        }
        for form, pair in runs.items()
    }
    result = {"rows": list(options.rows), "engine": "perf.stub_engine", "figures": figures}
    print(json.dumps(result), flush=True)
    write_result({**result, "runs": runs}, options.output)
    if options.chart is not None:
        with write_errors(options.chart):
            _draw(runs, Path(options.chart))


def _check_chart(chart: str) -> None:
    """Raises ConfigError if it could not be drawn once all is measured."""
    check_output_path(chart, None, option="--chart")
    if not chart.endswith(_CHART_ENDINGS):
        endings = " or ".join(_CHART_ENDINGS)
        raise ConfigError(f"--chart is {chart}; give a name that ends in {endings}")
    if find_spec("matplotlib") is None:
        raise ConfigError("--chart needs matplotlib, which is not installed; leave it out")


def _measure(num_rows: int, folder: Path, output: str) -> dict[str, Any]:
    """One job in a process of its own; its samples are (seconds, rows written, MiB)."""
    with (folder / "in.jsonl").open("w") as file:
        for index in range(num_rows):
            file.write(f'{{"id": "row-{index}", "prompt": "{index}+{index}="}}\n')
    done = subprocess.run(
        [sys.executable, "-m", "perf.jobs_memory", "--child", str(folder), output],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    samples = found["samples"]
    found["peak_mib"] = max(mib for _, _, mib in samples)
    found["us_per_row"] = round(1e6 * found["elapsed_s"] / num_rows, 2)
    blocks = _us_per_row(samples)
    fifth = max(1, len(blocks) // 5)
    found["us_per_row_first_and_last_fifth"] = [
        round(sum(us for _, us in part) / fifth, 2) for part in (blocks[:fifth], blocks[-fifth:])
    ]
    return found


def _us_per_row(samples: list[tuple[float, int, float]]) -> list[tuple[int, float]]:
    """(rows, microseconds a row since the entry before), for blocks of about the same size."""
    first = next((place for place, sample in enumerate(samples) if sample[1]), 0)
    last_s, last_rows, _ = samples[first]
    step = max(1, (samples[-1][1] - last_rows) // _NUM_BLOCKS)
    blocks = []
    for at_s, rows, _ in samples[first + 1 :]:
        if rows - last_rows >= step:
            blocks.append((rows, 1e6 * (at_s - last_s) / (rows - last_rows)))
            last_s, last_rows = at_s, rows
    return blocks or [(samples[-1][1], 0.0)]


def _child(folder: Path, output: str) -> None:
    from rich.console import Console

    from graphengine.config import EngineConfig
    from graphengine.jobs.config import JobConfig
    from graphengine.jobs.job import run_job
    from graphengine.jobs.watch import Counts
    from graphengine.request import SamplingParams
    from perf.stub_engine import FACTORY

    counts = Counts()
    samples: list[tuple[float, int, float]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_S):
            samples.append((_seconds(began_s), counts.num_finished, _rss_mib()))

    config = JobConfig(
        engine=EngineConfig("demo", device="cpu"),
        sampling=SamplingParams(temperature=0.0),
        input=str(folder / "in.jsonl"),
        output=str(folder / output),
    )
    began_s = time.perf_counter()
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    outcome = run_job(
        config,
        environment=os.environ,
        console=Console(stderr=True),
        say=lambda line: print(line, file=sys.stderr),
        factory=FACTORY,
        counts=counts,
    )
    over.set()
    sampler.join()
    samples.append((_seconds(began_s), counts.num_finished, _rss_mib()))
    assert outcome.stats.num_failed == 0
    print(json.dumps({"elapsed_s": outcome.stats.elapsed_s, "samples": samples}))


def _seconds(since_s: float) -> float:
    return round(time.perf_counter() - since_s, 3)


def _rss_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError("/proc tells no VmRSS")


def _draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    for form, (small, large) in runs.items():
        (drawn,) = memory.plot(
            [rows / 1e6 for _, rows, _ in large["samples"]],
            [mib for _, _, mib in large["samples"]],
            label=form,
        )
        memory.axhline(small["peak_mib"], color=drawn.get_color(), linestyle=":", linewidth=1)
        blocks = _us_per_row(large["samples"])
        speed.plot([rows / 1e6 for rows, _ in blocks], [us for _, us in blocks], label=form)
    memory.set(xlabel="million rows written", ylabel="resident memory, MiB")
    memory.set_title("Memory of a job (dotted: its peak at 10,000 rows)", fontsize=10)
    speed.set(xlabel="million rows written", ylabel="microseconds a row")
    speed.set_title("Time per row", fontsize=10)
    for axes in (memory, speed):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
