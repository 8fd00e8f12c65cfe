"""Which helpers do the tests of jobs share? Inputs, runs with a stand-in engine, outputs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import job_engines
from rich.console import Console

from graphengine.config import EngineConfig
from graphengine.jobs.config import JobConfig
from graphengine.jobs.job import run_job
from graphengine.jobs.watch import Outcome
from graphengine.request import SamplingParams

# A broken line does not cost the rows after it; written as it is.
Raw = bytes


def write_jsonl(path: Path, rows: Iterable[dict[str, Any] | Raw]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def config(source: Path, output: Path, **options: Any) -> JobConfig:
    engine = {"device": "cpu", "max_num_seqs": 8, **options.pop("engine", {})}
    sampling = {"temperature": 0.0, **options.pop("sampling", {})}
    return JobConfig(
        engine=EngineConfig("demo", **engine),
        sampling=SamplingParams(**sampling),
        input=str(source),
        output=str(output),
        **options,
    )


class Said(list[str]):
    """The lines that a job said."""

    @property
    def text(self) -> str:
        return "\n".join(self)


def run(
    source: Path,
    output: Path,
    *,
    factory: str = job_engines.FACTORY,
    said: Said | None = None,
    **options: Any,
) -> Outcome:
    return run_job(
        config(source, output, **options),
        environment=os.environ,
        console=Console(file=io.StringIO()),
        say=(said if said is not None else Said()).append,
        factory=factory,
    )


def refused(outcome: Outcome) -> None:
    """Raises what ended a job whose counts are told all the same."""
    if outcome.error is not None:
        raise outcome.error


def read(output: Path) -> list[dict[str, Any]]:
    """The records of an output, in the order they stand there."""
    if output.is_dir():
        import pyarrow.parquet

        rows: list[dict[str, Any]] = []
        for part in sorted(output.glob("*.parquet")):
            rows += pyarrow.parquet.read_table(part).to_pylist()
        return rows
    return [json.loads(line) for line in output.read_bytes().splitlines()]


def by_index(output: Path) -> dict[int, dict[str, Any]]:
    rows = read(output)
    found = {row["row_index"]: row for row in rows}
    assert len(found) == len(rows), "a row stands there twice"
    return found
