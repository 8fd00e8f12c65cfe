"""Which commands does `graphengine perf` have? Parses, calls, prints; imports torch in none."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphengine.config import EngineConfig
from graphengine.errors import ConfigError
from graphengine.exit_codes import errors_as_exit_codes, say
from graphengine.options import Attention, environment_defaults
from graphengine.output_file import check_output_path, print_line
from perf.compare import Comparison, Key, compare, load_side
from perf.result_file import check_result_path, write_result
from perf.workloads import MAX_SCALE, WORKLOADS

TOO_SLOW = 1
FAILED_PEER = 1
_STYLES = {"SLOWER": "bold red", "faster": "green", "noise": "yellow", "info": "dim", "ok": ""}

perf_app = typer.Typer(
    help="Measure, compare and picture the speed of fixed workloads.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@perf_app.command("run")
def run_command(
    output: Annotated[
        str, typer.Option("--output", metavar="FILE.json", help="Where the result is written.")
    ],
    workload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"{', '.join(WORKLOADS)}. May be repeated; without it all run."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A directory, hub id or 'demo', not random weights of real shape."),
    ] = None,
    scale: Annotated[float, typer.Option(help="Shortens the lengths: 0.25 is a quarter.")] = 1.0,
    repeats: Annotated[
        int, typer.Option(help="Of each workload, after a warm-up; to compare, 3 or more.")
    ] = 5,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="async|sync|eager", help="How the engine runs; may be repeated. Default: async."
        ),
    ] = None,
    attention: Attention = EngineConfig.attention,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="transformers|transformers-sync|vllm",
            help="Another engine on the same requests; may be repeated.",
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write what ran when beside FILE, for Perfetto; one trace a model and mode.",
        ),
    ] = None,
) -> None:
    """Run fixed, seeded workloads in repeats that take turns.

    The table goes to standard error. The last line of standard output is one JSON object: the
    medians, and where the whole result was written; null if it could not be, and then the whole
    result too.

    Exit code: 1 if a peer failed (our own figures are kept), 2 for what cannot be measured or
    written, else 0.
    """
    with errors_as_exit_codes():
        if not 0.0 < scale <= MAX_SCALE:  # nor NaN
            raise ConfigError(f"--scale is {scale}; give a number above 0 and up to {MAX_SCALE}")
        if repeats < 1:
            raise ConfigError(f"--repeats is {repeats}; give 1 or more")
        # Hours may pass before it is written.
        check_result_path(output)
        if trace is not None:
            check_output_path(trace, None, option="--trace")
        # As `generate` does, before torch is imported.
        for name, value in environment_defaults().items():
            os.environ.setdefault(name, value)
        from perf.run import run  # imports torch, which takes seconds

        def save(part: dict[str, Any]) -> None:
            try:
                write_result(part, Path(output))
            except ConfigError as error:  # there may be room when all is measured
                say(f"error: {error}")

        result = run(
            list(dict.fromkeys(workload or WORKLOADS)),
            model=model,
            scale=scale,
            repeats=repeats,
            modes=list(dict.fromkeys(mode or ["async"])),
            attention=attention,
            say=say,
            peers=list(dict.fromkeys(peer or ())),
            save=save,
            trace=None if trace is None else Path(trace),
            output=Path(output),
        )
        failure: ConfigError | None = None
        try:
            write_result(result, Path(output))
        except ConfigError as error:
            failure = error
        _show(_run_table(result))
        medians = {
            name: {
                mode: {key: figure["median"] for key, figure in measured["figures"].items()}
                for mode, measured in modes.items()
            }
            for name, modes in result["workloads"].items()
        }
        summary: dict[str, Any] = {
            "output": None if failure else output,
            "config": result["config"],
            "read_bandwidth_bytes_per_s": result["read_bandwidth_bytes_per_s"],
            "medians": medians,
        }
        if "peer_errors" in result:
            summary["peer_errors"] = result["peer_errors"]
        # The line is then a result file itself, with two entries more.
        _print_json({**result, **summary} if failure else summary)
        if failure:
            raise failure
        if "peer_errors" in result:
            raise typer.Exit(FAILED_PEER)


@perf_app.command("compare")
def compare_command(
    base: Annotated[
        Path, typer.Argument(metavar="BASE.json", help="A result of `perf run`, or a folder.")
    ],
    new: Annotated[
        Path, typer.Argument(metavar="NEW.json", help="The result, or folder, that is judged.")
    ],
    max_regression: Annotated[
        str, typer.Option(metavar="SHARE", help="How much worse is allowed: 5% or 0.05.")
    ] = "5%",
) -> None:
    """Compare two results, figure by figure, by their best samples.

    A folder holds results of one version, taken in turns with the other's, as a machine that others
    use too needs; the best sample of each counts. A figure is SLOWER if it is worse than the limit
    and outside the spread of both.

    Exit code: 1 if a figure is SLOWER, 2 if the two cannot be compared (hardware, model, scale,
    modes or lengths differ, fewer than 3 repeats, or a broken file), else 0.
    """
    with errors_as_exit_codes():
        limit = _share(max_regression)
        comparison = compare(load_side(base), load_side(new), limit)
        _print_comparison(comparison)
        _print_json(
            {
                "slower": [_name(row.key) for row in comparison.slower],
                "max_regression": limit,
                "figures": [
                    {
                        "figure": _name(row.key),
                        "unit": row.unit,
                        "base": row.base,
                        "new": row.new,
                        "ratio": _or_null(row.ratio),
                        "median_ratio": _or_null(row.median_ratio),
                        "verdict": row.verdict,
                    }
                    for row in comparison.rows
                ],
                "changes": comparison.changes,
                "only_base": [_name(key) for key in comparison.only_base],
                "only_new": [_name(key) for key in comparison.only_new],
            }
        )
        if comparison.slower:
            raise typer.Exit(TOO_SLOW)


@perf_app.command("report")
def report_command(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE.json...", help="Results of `perf run`.")
    ],
    output: Annotated[
        str, typer.Option("--output", metavar="FILE.html", help="Where the page is written.")
    ] = "report.html",
    png_dir: Annotated[
        Path | None,
        typer.Option("--png-dir", metavar="DIR", help="Write each chart there as a PNG too."),
    ] = None,
) -> None:
    """Draw results: one self-contained page of charts and tables. Needs matplotlib.

    Several results follow one another, their figures side by side. The last line of standard output
    is one JSON object: the files written.
    """
    with errors_as_exit_codes():
        check_output_path(output, None)
        from perf.report import build_report

        page, *pngs = build_report(files, Path(output), png_dir)
        _print_json({"output": str(page), "pngs": [str(path) for path in pngs]})


def _share(text: str) -> float:
    """0.05 of "5%" or "0.05"."""
    try:
        value = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"--max-regression is {text!r}; give a share below 1, as 5% or 0.05")
    return value


def _or_null(ratio: float) -> float | None:
    """JSON has no infinity, which is what a base of zero gives."""
    return ratio if math.isfinite(ratio) else None


def _run_table(result: dict[str, Any]) -> Table:
    table = _table("workload", "mode", "figure", "unit", median="right", low="right", high="right")
    for name, modes in result["workloads"].items():
        for mode, measured in modes.items():
            for figure, contents in measured["figures"].items():
                numbers = (contents[part] for part in ("median", "low", "high"))
                table.add_row(name, mode, Text(figure), contents["unit"], *map(_number, numbers))
    return table


def _print_comparison(comparison: Comparison) -> None:
    for change in comparison.changes:
        say(f"changed: {change}")
    for where, keys in (("base", comparison.only_base), ("new", comparison.only_new)):
        for key in keys:
            say(f"only in {where}: {_name(key)}")
    table = _table(
        "workload",
        "mode",
        "figure",
        "unit",
        base="right",
        new="right",
        ratio="right",
        medians="right",
        verdict="left",
    )
    for row in comparison.rows:
        workload, mode, figure = row.key
        table.add_row(
            workload,
            mode,
            Text(figure),
            row.unit,
            _number(row.base),
            _number(row.new),
            f"{row.ratio:.3f}",
            f"{row.median_ratio:.3f}",
            Text(row.verdict, style=_STYLES[row.verdict]),
        )
    _show(table)
    if any(row.verdict == "noise" for row in comparison.rows):
        say("noise: beyond the limit, but not outside the spreads; more repeats tell")


def _table(*left: str, **columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in left:
        table.add_column(name, no_wrap=True)
    for name, justify in columns.items():
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]  # a literal
    return table


def _number(value: float) -> str:
    """Four digits that say something, and no exponent in the range the figures have."""
    if value == 0.0 or abs(value) >= 1000.0:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _name(key: Key) -> str:
    return " ".join(key)


def _show(table: Table) -> None:
    # In a log a table must not be cut to the 80 columns that rich takes a file to have.
    is_terminal = sys.stderr.isatty()
    console = Console(stderr=True) if is_terminal else Console(stderr=True, width=140)
    with contextlib.suppress(OSError):  # as `say`: the work goes on
        console.print(table)


def _print_json(value: dict[str, Any]) -> None:
    print_line(json.dumps(value))
