"""What did the runs find? One self-contained page of charts and tables to look at, and PNGs."""

from __future__ import annotations

import dataclasses
import re
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from graphengine.errors import ConfigError
from graphengine.output_file import STDOUT_FILENO, is_one_file
from perf.recorded import Recorded, Result, best_mode, clean, read_result
from perf.report_style import STYLE

if TYPE_CHECKING:
    from perf.drawing import Chart

_MODE_NOTES = {
    "async": "graphs, the next step scheduled while one runs",
    "sync": "graphs, each step waited for",
    "eager": "no graphs, each step waited for",
}
_LADDER = ("ms_per_step", "gpu_busy", "out_tok_per_s", "device_ms_per_decode_step")
_LADDER_HEADS = ("ms/step", "GPU busy", "tok/s", "device ms of a decode step")
_MAX_ROWS = 256  # of the padding chart where no grid was run: the engine's default


def build_report(paths: list[Path], output: Path, png_dir: Path | None = None) -> list[Path]:
    """Writes the page, and into `png_dir` a PNG of each chart; returns all files written.

    Several results follow one another, their figures side by side in the tables at the end.
    Raises InputError for a file that is no result and ConfigError where nothing can be written or
    matplotlib is missing."""
    if not paths:
        raise ConfigError("no result files given; give at least one that perf run wrote")
    if any(is_one_file(str(output), str(path), dash=STDOUT_FILENO) for path in paths):
        raise ConfigError(f"the page {clean(output)!r} is also a result; give another --output")
    results = _named_apart([read_result(path) for path in paths])
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "perf report draws with matplotlib, which is not installed; "
            'in the clone: pip install -e ".[report]"'
        )
    # Imported once needed: the command line must start without it.
    from perf.drawing import chart_png

    charts = [_charts(result) for result in results]
    page = _page(results, charts)
    if png_dir is not None:
        try:
            png_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--png-dir {clean(png_dir)} is no directory ({error.strerror}); give another"
            ) from error
    written = [output]
    path = output
    try:
        output.write_text(page, "utf-8")
        if png_dir is not None:
            for result, found in zip(results, charts, strict=True):
                for chart in found:
                    stem = chart.name if len(results) == 1 else f"{result.name}-{chart.name}"
                    path = png_dir / f"{_file_name(stem)}.png"
                    chart_png(chart, path)
                    written.append(path)
    except OSError as error:
        raise ConfigError(
            f"{clean(path)!r} cannot be written ({error.strerror}); give another place"
        ) from error
    return written


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip(".")[:100] or "chart"


def _named_apart(results: list[Result]) -> list[Result]:
    """The same results with names that differ, also as file names."""
    named: dict[str, Result] = {}
    for result in results:
        name, i = result.name, 1
        while _file_name(name) in named:
            i += 1
            name = f"{result.name} ({i})"
        named[_file_name(name)] = dataclasses.replace(result, name=name)
    return list(named.values())


def _charts(result: Result) -> list[Chart]:
    """In the order of the page. The first workload with most modes gives "timeline"."""
    from perf import grid_charts, run_charts
    from perf.peers_chart import peers_chart
    from perf.timeline_chart import timeline_chart

    found: list[Chart | None] = []
    for i, workload in enumerate(_by_modes(result)):
        name = "timeline" if i == 0 else f"timeline-{workload}"
        found.append(timeline_chart(result, workload, name=name))
    found.append(peers_chart(result, name="peers"))
    for workload in result.workloads:
        found.append(grid_charts.context_chart(result, workload, name=f"context-{workload}"))
        found.append(grid_charts.throughput_chart(result, workload, name=f"throughput-{workload}"))
    for workload in _by_modes(result):
        found.append(run_charts.host_chart(result, workload, name=f"host-{workload}"))
    if result.workloads:
        found.append(grid_charts.padding_chart(_max_rows(result), name="padding"))
    found.append(run_charts.memory_chart(result, name="memory"))
    for workload in result.workloads:
        found.append(run_charts.startup_chart(result, workload, name=f"startup-{workload}"))
    return [chart for chart in found if chart is not None]


def _by_modes(result: Result) -> list[str]:
    """Workloads with a timeline of at least two steps, those in most modes first."""
    nums = {
        workload: sum(
            sum(span.row == "device" for span in measured.timeline) >= 2
            for measured in modes.values()
        )
        for workload, modes in result.workloads.items()
    }
    return sorted((name for name, num in nums.items() if num), key=lambda name: -nums[name])


def _max_rows(result: Result) -> int:
    rows = [
        rows
        for modes in result.workloads.values()
        for measured in modes.values()
        for rows, _ in measured.grid("device_ms")
    ]
    return min(4096, max(rows, default=_MAX_ROWS))


def _page(results: list[Result], charts: list[list[Chart]]) -> str:
    parts = [_header(results)]
    for result, found in zip(results, charts, strict=True):
        parts.append(_section(result, found, num_results=len(results)))
    parts.append(_figure_tables(results))
    parts.append(_environments(results))
    body = "\n".join(parts)
    from perf.drawing import COLOURS

    day = ";".join(f"--{name}:{pair[0]}" for name, pair in COLOURS.items())
    night = ";".join(f"--{name}:{pair[1]}" for name, pair in COLOURS.items())
    colours = f":root{{{day}}}\n@media (prefers-color-scheme:dark){{:root{{{night}}}}}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Nothing is loaded, and nothing that a result file holds could make it so.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<title>graphengine performance report</title>\n"
        f"<style>\n{colours}\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _header(results: list[Result]) -> str:
    cards = "".join(
        f"<li><b>{escape(result.name)}</b> {escape(result.device)}"
        f"<span>{_commit(result)}{escape(_config(result))}</span></li>"
        for result in results
    )
    return f'<header><h1>graphengine performance</h1><ul class="files">{cards}</ul></header>'


def _commit(result: Result) -> str:
    if not result.commit:
        return ""
    dirty = " with local changes" if result.is_dirty else ""
    return f"commit <code>{escape(result.commit)}</code>{dirty} · "


def _config(result: Result) -> str:
    config = result.config
    texts = [result.created.replace("T", " ").replace("+00:00", " UTC")]
    if config.get("model"):
        texts.append(f"model {clean(config['model'])}")
    if "scale" in config:
        texts.append(f"lengths x {clean(config['scale'])}")
    if "repeats" in config:
        texts.append(f"{clean(config['repeats'])} repeats")
    return " · ".join(text for text in texts if text)


def _section(result: Result, charts: list[Chart], *, num_results: int) -> str:
    from perf.drawing import chart_svg

    parts = []
    if num_results > 1:
        parts.append(f"<h2>{escape(result.name)} <small>{escape(result.device)}</small></h2>")
    ladders = {f"timeline-{workload}": workload for workload in result.workloads}
    by_modes = _by_modes(result)
    if by_modes:
        ladders["timeline"] = by_modes[0]
    others: list[str] = []
    for chart in charts:
        wide, narrow = (
            chart_svg(chart, page=result.name, is_narrow=narrow) for narrow in (False, True)
        )
        under = ""
        if chart.name in ladders:
            under = _ladder(result, ladders[chart.name]) + _gaps(result, ladders[chart.name])
        html = (
            f"<figure><h3>{escape(chart.title)}</h3>"
            f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
            f"<figcaption>{escape(chart.note)}</figcaption>{under}</figure>"
        )
        is_more = chart.name.startswith("timeline-")
        (others if is_more else parts).append(html)
    if others:
        parts.append(
            f"<details><summary>Timelines of {len(others)} more "
            f"workload{'s' if len(others) > 1 else ''}</summary>{''.join(others)}</details>"
        )
    return f"<section>{''.join(parts)}</section>"


def _ladder(result: Result, workload: str) -> str:
    """A row per mode: what graphs and overlap gain."""
    from perf.drawing import amount
    from perf.timeline_chart import busy_text

    modes = result.workloads[workload]
    used = [
        (name, head)
        for name, head in zip(_LADDER, _LADDER_HEADS, strict=True)
        if any(name in measured.figures for measured in modes.values())
    ]
    if len(modes) < 2 or not used:
        return ""
    slowest = max(
        (m.figures["total_s"].median for m in modes.values() if "total_s" in m.figures), default=0.0
    )
    rows = []
    for mode, measured in modes.items():
        cells = []
        for name, _ in used:
            figure = measured.figures.get(name)
            text = "–" if figure is None else amount(figure.median, figure.unit)
            if name == "gpu_busy":
                text = busy_text(mode, measured) or "–"
            cells.append(f"<td>{escape(text)}</td>")
        total = measured.figures.get("total_s")
        speed = f"{slowest / total.median:.2f} x" if total and total.median > 0.0 else "–"
        note = _MODE_NOTES.get(mode, "") if result.has_gpu else ""
        rows.append(
            f"<tr><th>{escape(mode)} <small>{escape(note)}</small></th>{''.join(cells)}"
            f"<td>{speed}</td></tr>"
        )
    heads = "".join(f"<th>{escape(head)}</th>" for _, head in used)
    return (
        f'<div class="scroll"><table><thead><tr><th>mode</th>{heads}'
        "<th>against the slowest</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _gaps(result: Result, workload: str) -> str:
    """The longest gaps of each mode, and what the host did in them."""
    from perf.drawing import duration, number

    rows = []
    for mode, measured in result.workloads[workload].items():
        for i, gap in enumerate(measured.longest_gaps[:3]):
            host = sorted(gap.host_ms.items(), key=lambda item: -item[1])[:4]
            did = ", ".join(f"{phase} {duration(ms)}" for phase, ms in host)
            rows.append(
                f"<tr><th>{escape(mode) if i == 0 else ''}</th><td>{duration(gap.ms)}</td>"
                f'<td>{number(gap.at_s)} s</td><td class="text">{escape(did)}</td></tr>'
            )
    if not rows:
        return ""
    device = "GPU" if result.has_gpu else "device"
    return (
        f"<details><summary>Longest gaps of the {device}, and what the host did in them</summary>"
        '<div class="scroll"><table><thead><tr><th>mode</th><th>gap</th><th>at</th>'
        f'<th class="text">host meanwhile</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div></details>"
    )


def _figure_tables(results: list[Result]) -> str:
    """Every figure of every file: one table a workload, files side by side."""
    workloads = list(dict.fromkeys(name for result in results for name in result.workloads))
    peers = [name for result in results for loads in result.peers.values() for name in loads]
    workloads += [name for name in dict.fromkeys(peers) if name not in workloads]
    if not workloads:
        return ""
    tables = []
    for workload in workloads:
        having = [
            result
            for result in results
            if workload in result.workloads
            or any(workload in loads for loads in result.peers.values())
        ]
        rows = _figure_rows(having, workload)
        if not rows:
            continue
        heads = "".join(
            f"<th>{escape(result.name) if len(results) > 1 else 'median'}</th>"
            '<th class="range">range</th><th>n</th>'
            for result in having
        )
        is_open = " open" if len(rows) <= 40 else ""
        tables.append(
            f"<details{is_open}><summary>{escape(workload)} <small>{len(rows)} figures</small>"
            f'</summary><div class="scroll"><table class="figures"><thead><tr><th>who</th><th>'
            f"figure</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
        )
    text = "Median of the repeats, their range and number. ↓ lower is better, ↑ higher is better."
    if peers:
        text += " Ratios are graphengine against a peer: above 1 graphengine is better."
    return f"<section><h2>All figures</h2><p>{text}</p>{''.join(tables)}</section>"


def _figure_rows(results: list[Result], workload: str) -> list[str]:
    who: dict[tuple[str, str], list[dict[str, Recorded]]] = {}
    for i, result in enumerate(results):
        modes = result.workloads.get(workload, {})
        found = [(("", mode), measured.figures) for mode, measured in modes.items()]
        found += [
            (("peer", peer), loads[workload])
            for peer, loads in result.peers.items()
            if workload in loads
        ]
        for key, figures in found:
            who.setdefault(key, [{} for _ in results])[i] = figures
    rows = []
    for (kind, name), columns in who.items():
        names = dict.fromkeys(figure for column in columns for figure in column)
        for j, figure in enumerate(names):
            first = next(column[figure] for column in columns if figure in column)
            arrow = {"lower": "↓", "higher": "↑"}.get(first.better, "")
            cells = "".join(
                _cells(column.get(figure), _ratio(result, workload, figure) if kind else None)
                for column, result in zip(columns, results, strict=True)
            )
            head = f"{escape(name)}{' <small>peer</small>' if kind else ''}" if j == 0 else ""
            line = ' class="first"' if j == 0 else ""
            rows.append(
                f'<tr{line}><th>{head}</th><td class="text"><code>{escape(figure)}</code> {arrow}'
                f"</td>{cells}</tr>"
            )
    return rows


def _ratio(result: Result, workload: str, figure: str) -> Recorded | None:
    """Our figure to compare a peer's with."""
    modes = result.workloads.get(workload)
    return modes[best_mode(modes)].figures.get(figure) if modes else None


def _cells(figure: Recorded | None, ours: Recorded | None) -> str:
    from perf.drawing import amount
    from perf.peers_chart import ratio_of

    if figure is None:
        return '<td>–</td><td class="range"></td><td></td>'
    ratio = ratio_of(ours.median, figure.median, ours.better) if ours else None
    beside = f' <b class="ratio">{ratio:.2f} x</b>' if ratio is not None else ""
    low, high = amount(figure.low, figure.unit), amount(figure.high, figure.unit)
    low = low.removesuffix(f" {figure.unit}").removesuffix(" %")
    return (
        f"<td>{escape(amount(figure.median, figure.unit))}{beside}</td>"
        f'<td class="range">{escape(low)} – {escape(high)}</td><td>{figure.num_samples}</td>'
    )


def _environments(results: list[Result]) -> str:
    from perf.drawing import bandwidth

    lines = [dict(_flat({**result.environment, "config": result.config})) for result in results]
    for line, result in zip(lines, results, strict=True):
        if result.read_bandwidth_bytes_per_s is not None:
            line["read bandwidth"] = bandwidth(result.read_bandwidth_bytes_per_s)
    names = dict.fromkeys(name for line in lines for name in line)
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f'<td class="text">{escape(line.get(name, "–"))}</td>' for line in lines)
        + "</tr>"
        for name in names
    )
    head = ""
    if len(results) > 1:
        cells = "".join(f'<th class="text">{escape(result.name)}</th>' for result in results)
        head = f"<thead><tr><th></th>{cells}</tr></thead>"
    return (
        "<section><h2>Environment and configuration</h2>"
        f'<div class="scroll"><table class="environment">{head}<tbody>{rows}</tbody></table></div>'
        "</section>"
    )


def _flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """Entries of nested objects, their names joined by spaces; at most 100."""
    if isinstance(value, dict):
        found: list[tuple[str, str]] = []
        for key, entry in value.items():
            found += _flat(entry, f"{name} {clean(key)}".strip())
        return found[:100]
    if isinstance(value, list):
        return [(name, ", ".join(clean(entry) for entry in value[:50]))]
    if isinstance(value, bool):
        return [(name, "yes" if value else "no")]
    return [(name, "–" if value in (None, "") else clean(value))]
