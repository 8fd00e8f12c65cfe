"""graphengine perf report: parses and prints; the work is in perf.report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    files: Annotated[list[Path], typer.Argument(help="Results that perf run wrote.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("report.html"),
    png_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a PNG of each chart there too.")
    ] = None,
) -> None:
    """Draw results as one self-contained HTML page: timelines, step times, memory, all figures."""
    from perf.report import build_report

    for path in build_report(files, output, png_dir):
        print(path)
