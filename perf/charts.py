"""Which charts does a result file give? A function returns None where the file lacks the data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator

from captures import BucketLadder
from perf.drawing import (
    HOST_WORK,
    MARKERS,
    PHASES,
    Canvas,
    Chart,
    bandwidth,
    duration,
    light,
    number,
    percent,
)
from perf.recorded import Measured, Result

_GIB = 2.0**30
_SERIES = 6
# Which figure says how fast a run was, best first; the two after it are better when lower.
_SPEED = ("out_tok_per_s", "ms_per_step", "total_s")


def best_mode(modes: dict[str, Measured]) -> str:
    """The mode a user gets, or the first there is."""
    return "async" if "async" in modes else next(iter(modes))


# --- decode grids


def context_chart(result: Result, workload: str, *, name: str) -> Chart | None:
    modes = result.workloads[workload]
    mode = best_mode(modes)
    times = modes[mode].grid("device_ms")
    shares = modes[mode].grid("bandwidth_share")
    if not times or min(times.values()) <= 0.0:
        return None
    note = "Solid: measured. Dashed: the bandwidth floor, the time that only reading weights and "
    note += "KV cache takes"
    if result.read_bandwidth_bytes_per_s:
        note += f" at {bandwidth(result.read_bandwidth_bytes_per_s)}"
    return Chart(
        name,
        f"{workload}: device time of a decode step against context, and its bandwidth floor",
        f"{note}. The table gives floor over measured. Mode {mode}; both axes logarithmic.",
        lambda canvas: _draw_context(canvas, times, shares),
    )


def _draw_context(
    canvas: Canvas,
    times: dict[tuple[int, int], float],
    shares: dict[tuple[int, int], float],
) -> Figure:
    figure, ax, heat = _line_and_cells(canvas)
    all_rows = sorted({rows for rows, _ in times})
    contexts = sorted({context for _, context in times})
    ends: list[tuple[float, str, str]] = []
    for i, rows in enumerate(all_rows):
        line = [(c, times[rows, c]) for c in contexts if (rows, c) in times]
        colour = light(f"series-{_shade(i, len(all_rows))}")
        marker = MARKERS[i % len(MARKERS)]
        ax.plot(*zip(*line, strict=True), color=colour, marker=marker)
        floor = [(c, ms * shares[rows, c]) for c, ms in line if (rows, c) in shares]
        if floor:
            ax.plot(*zip(*floor, strict=True), color=colour, ls=(0, (3, 2)), lw=1.1)
        if line[-1][0] == contexts[-1]:
            ends.append((line[-1][1], _rows_text(rows), colour))
        else:
            ax.annotate(
                _rows_text(rows),
                line[-1],
                xytext=(6, 0),
                textcoords="offset points",
                color=colour,
                weight="bold",
                va="center",
                fontsize=8.5,
            )
    _log_axis(ax, "x", contexts)
    _log_ticks(
        ax, [*times.values(), *(ms * shares[at] for at, ms in times.items() if at in shares)]
    )
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("device time of a step, ms")
    _label_ends(ax, ends, contexts[-1])
    handles = [Line2D([], [], color=light("ink"), marker="o", label="measured")]
    if shares:
        handles.append(_floor_handle())
    _legend_above(ax, handles)
    texts = {at: f"{100 * share:.0f} %" for at, share in shares.items()}
    heat.set_title("share of read bandwidth reached", pad=8)
    _cells(canvas, heat, texts, shares, all_rows, contexts)
    return figure


def throughput_chart(result: Result, workload: str, *, name: str) -> Chart | None:
    modes = result.workloads[workload]
    mode = best_mode(modes)
    times = modes[mode].grid("step_ms")
    if not times or min(times.values()) <= 0.0:
        return None
    device, shares = modes[mode].grid("device_ms"), modes[mode].grid("bandwidth_share")
    floors = {at: device[at] * shares[at] for at in times if at in device and at in shares}
    return Chart(
        name,
        f"{workload}: output tokens a second by rows of the bucket",
        f"Rows over the time of a whole step, host included. Dashed: what the bandwidth floor "
        f"would allow. Mode {mode}; both axes logarithmic.",
        lambda canvas: _draw_throughput(canvas, times, floors),
    )


def _draw_throughput(
    canvas: Canvas,
    times: dict[tuple[int, int], float],
    floors: dict[tuple[int, int], float],
) -> Figure:
    figure, ax, heat = _line_and_cells(canvas)
    all_rows = sorted({rows for rows, _ in times})
    contexts = sorted({context for _, context in times})
    for i, context in enumerate(contexts):
        line = [(r, 1e3 * r / times[r, context]) for r in all_rows if (r, context) in times]
        colour = light(f"series-{_shade(i, len(contexts))}")
        ax.plot(
            *zip(*line, strict=True),
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            label=f"context {context:,}",
        )
        floor = [(r, 1e3 * r / floors[r, context]) for r, _ in line if floors.get((r, context))]
        if floor:
            ax.plot(*zip(*floor, strict=True), color=colour, ls=(0, (3, 2)), lw=1.1)
    _log_axis(ax, "x", all_rows)
    rates = {at: 1e3 * at[0] / ms for at, ms in times.items()}
    top = max(rates.values())
    _log_ticks(ax, [*rates.values(), *(1e3 * at[0] / ms for at, ms in floors.items() if ms)])
    ax.set_xlabel("rows decoding at once")
    ax.set_ylabel("tok/s")
    handles = list(ax.get_legend_handles_labels()[0])
    _legend_above(ax, [*handles, _floor_handle()] if floors else handles)
    heat.set_title("tok/s", pad=8)
    texts = {at: f"{rate:,.0f}" for at, rate in rates.items()}
    _cells(canvas, heat, texts, {at: rate / top for at, rate in rates.items()}, all_rows, contexts)
    return figure


def padding_chart(max_rows: int, *, name: str) -> Chart:
    ladder = BucketLadder.up_to(max_rows)
    shares = [1.0 - rows / ladder.pick(rows) for rows in range(1, max_rows + 1)]
    return Chart(
        name,
        f"Padding: what share of a bucket is empty, for 1 to {max_rows} rows",
        f"{len(ladder.sizes)} buckets (ticks at the foot), each one captured graph. Mean over all "
        f"numbers of rows {percent(statistics.fmean(shares))}, most {percent(max(shares))}.",
        lambda canvas: _draw_padding(canvas, ladder, shares),
    )


def _draw_padding(canvas: Canvas, ladder: BucketLadder, shares: list[float]) -> Figure:
    figure = canvas.figure(2.4)
    ax = figure.subplots()
    rows = list(range(1, len(shares) + 1))
    edges = [row - 0.5 for row in (*rows, len(rows) + 1)]
    percents = [100.0 * share for share in shares]
    ax.stairs(percents, edges, fill=True, color=light("share"), alpha=0.35)
    ax.stairs(percents, edges, color=light("share"), lw=1.0)
    ax.plot(
        ladder.sizes,
        [-1.6] * len(ladder.sizes),
        ls="none",
        marker="|",
        markersize=6,
        color=light("ink"),
        clip_on=False,
    )
    ax.set_xlim(0.5, len(rows) + 0.5)
    ax.set_ylim(-3.2, max(10.0, 1.12 * max(percents)))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.set_xticks(_spread(ladder.sizes, len(rows), 0.05 if not canvas.is_narrow else 0.1))
    ax.set_xlabel("rows decoding")
    ax.set_ylabel("empty rows, %")
    return figure


# --- host, idle, memory, start-up


def host_chart(result: Result, workload: str, *, name: str) -> Chart | None:
    modes = {
        mode: measured
        for mode, measured in result.workloads[workload].items()
        if any(measured.host_ms.get(phase) for phase in HOST_WORK)
    }
    if not modes:
        return None
    idles = {
        mode: {phase: ms / measured.num_steps for phase, ms in measured.idle_host_ms.items()}
        for mode, measured in modes.items()
        if measured.num_steps and measured.idle_host_ms
    }
    note = "Mean of each phase. Waiting for the device and launching prefills are left out. "
    if idles:
        note += "Idle: what the host did while the device had nothing to do. "
    if not result.has_gpu:
        note += "On the CPU a launch is the computation itself."
    return Chart(
        name,
        f"{workload}: host time of a decode step by phase"
        + (", and how long the device idled" if idles else ""),
        note,
        lambda canvas: _draw_host(canvas, modes, idles),
    )


def _draw_host(
    canvas: Canvas, modes: dict[str, Measured], idles: dict[str, dict[str, float]]
) -> Figure:
    num = 2 if idles else 1
    bars = 0.36 * len(modes)
    if canvas.is_narrow:
        figure = canvas.figure(0.75 + num * (bars + 0.85))
        axes = figure.subplots(num, 1, squeeze=False)[:, 0]
    else:
        figure = canvas.figure(1.5 + bars)
        axes = figure.subplots(1, num, squeeze=False)[0]
    work = {
        mode: {phase: measured.host_ms.get(phase, 0.0) for phase in HOST_WORK}
        for mode, measured in modes.items()
    }
    # One scale for both panels: most host work should cause no idle time.
    longest = max(sum(parts.values()) for parts in (*work.values(), *idles.values())) or 1.0
    _stack(canvas, axes[0], work, "host work, ms a decode step", longest)
    if idles:
        shown = {mode: idles.get(mode, {}) for mode in modes}
        _stack(canvas, axes[1], shown, "device idle, ms a step", longest)
    used = [*HOST_WORK, *(phase for idle in idles.values() for phase in idle)]
    _phase_legend(canvas, figure, used)
    return figure


def _stack(
    canvas: Canvas, ax: Axes, bars: dict[str, dict[str, float]], title: str, longest: float
) -> None:
    """One horizontal bar each, of parts in the order of PHASES, its sum at the end."""
    for y, parts in enumerate(bars.values()):
        left = 0.0
        for phase in _in_order(parts):
            ax.barh(
                y,
                parts[phase],
                left=left,
                height=0.66,
                color=light(phase),
            )[0].set_gid(canvas.tip(f"{phase} {duration(parts[phase])}"))
            left += parts[phase]
        ax.text(left + 0.015 * longest, y, f"{duration(left)}", va="center", weight="bold")
    ax.set_yticks(range(len(bars)), [name[:24] for name in bars])
    ax.set_ylim(len(bars) - 0.45, -0.55)
    ax.set_xlim(0.0, 1.3 * longest)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.set_title(title)


def memory_chart(result: Result, *, name: str) -> Chart | None:
    """None on the CPU, where nothing is sampled."""
    loads = {}
    for workload, modes in result.workloads.items():
        found = {
            mode: measured.memory
            for mode, measured in modes.items()
            if any(used > 0.0 for _, used in measured.memory)
        }
        if found:
            loads[workload] = found
    if not loads:
        return None
    return Chart(
        name,
        "Device memory in use over a run",
        "Of the whole device, every process on it. Weights, graphs and KV cache are taken before "
        "the first request, so a rise during a run would be a leak.",
        lambda canvas: _draw_memory(canvas, loads),
    )


def _draw_memory(canvas: Canvas, loads: dict[str, dict[str, list[tuple[float, float]]]]) -> Figure:
    columns = min(len(loads), 2 if canvas.is_narrow else 4)
    lines = math.ceil(len(loads) / columns)
    figure = canvas.figure(1.9 * lines + 0.55)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    top = max(used for modes in loads.values() for run in modes.values() for _, used in run)
    shown: dict[str, None] = {}
    for i, (workload, modes) in enumerate(loads.items()):
        ax = grid[i // columns][i % columns]
        for j, (mode, samples) in enumerate(modes.items()):
            ax.plot(
                [at for at, _ in samples],
                [used / _GIB for _, used in samples],
                color=light(mode),
                ls=("-", (0, (4, 2)), (0, (1, 1.4)))[j % 3],
                lw=1.6,
                marker="." if len(samples) < 3 else None,
            )
            shown[mode] = None
        peak = max(used for run in modes.values() for _, used in run)
        ax.set_title(f"{workload[:20]}\npeak {number(peak / _GIB)} GiB", fontsize=8.5)
        ax.set_ylim(0.0, 1.12 * top / _GIB)
        ax.set_xlim(left=0.0)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        if i % columns == 0:
            ax.set_ylabel("in use, GiB")
        if i + columns >= len(loads):
            ax.set_xlabel("time, s")
    for i in range(len(loads), lines * columns):
        grid[i // columns][i % columns].set_visible(False)
    styles = ("-", (0, (4, 2)), (0, (1, 1.4)))
    handles = [
        Line2D([], [], color=light(mode), ls=styles[j % 3], lw=1.6, label=mode[:24])
        for j, mode in enumerate(shown)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=8.5)
    return figure


_STARTUP = {
    "Python": "other",
    "imports": "outside",
    "config": "intake",
    "tokenizer": "output",
    "weights": "decode",
    "memory": "schedule",
    "graphs": "launch",
    "other": "wait",
    "first token": "prefill",
}


def startup_chart(result: Result, workload: str, *, name: str) -> Chart | None:
    modes = result.workloads[workload]
    starts = next((measured.startup for measured in modes.values() if measured.startup), {})
    bars = {
        f"{kind} caches": _startup_parts(processes)
        for kind, processes in starts.items()
        if processes
    }
    if not any(sum(parts.values()) > 0.0 for parts in bars.values()):
        return None
    return Chart(
        name,
        f"{workload}: from process start to the first token, by phase",
        "Median of the processes. Cold and warm are the caches of compiled kernels; the "
        "checkpoint's pages were in memory.",
        lambda canvas: _draw_startup(canvas, bars),
    )


def _startup_parts(processes: list[dict[str, float]]) -> dict[str, float]:
    """Seconds by part, in order; they add up to the time to the first token."""

    def middle(name: str) -> float:
        return statistics.median(process.get(name, 0.0) for process in processes)

    phases = [name.removeprefix("phase ") for name in processes[0] if name.startswith("phase ")]
    parts = {"Python": middle("python"), "imports": middle("imported") - middle("python")}
    parts |= {phase: middle(f"phase {phase}") for phase in phases}
    parts["other"] = middle("ready") - sum(parts.values())
    parts["first token"] = middle("first_token") - middle("ready")
    return {name: max(0.0, seconds) for name, seconds in parts.items()}


def _draw_startup(canvas: Canvas, bars: dict[str, dict[str, float]]) -> Figure:
    figure = canvas.figure((1.35 if canvas.is_narrow else 1.05) + 0.36 * len(bars))
    ax = figure.subplots()
    longest = max(sum(parts.values()) for parts in bars.values())
    for y, parts in enumerate(bars.values()):
        left = 0.0
        for name, seconds in parts.items():
            (bar,) = ax.barh(
                y, seconds, left=left, height=0.66, color=light(_STARTUP.get(name, "other"))
            )
            bar.set_gid(canvas.tip(f"{name} {number(seconds)} s"))
            left += seconds
        ax.text(left + 0.012 * longest, y, f"{number(left)} s", va="center", weight="bold")
    ax.set_yticks(range(len(bars)), [name[:24] for name in bars])
    ax.set_ylim(len(bars) - 0.45, -0.55)
    ax.set_xlim(0.0, 1.18 * longest)
    ax.set_xlabel("seconds since the process was started")
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    found = dict.fromkeys(name for parts in bars.values() for name in parts)
    names = [name for name in _STARTUP if name in found] + [n for n in found if n not in _STARTUP]
    handles = [Patch(color=light(_STARTUP.get(name, "other")), label=name[:24]) for name in names]
    _legend(canvas, figure, handles)
    return figure


# --- peers


def peer_ratios(result: Result) -> dict[str, dict[str, float]]:
    """How many times as fast as each peer: by workload, then peer, of the figure both have."""
    found: dict[str, dict[str, float]] = {}
    for peer, loads in result.peers.items():
        for workload, figures in loads.items():
            modes = result.workloads.get(workload)
            if not modes:
                continue
            ours = modes[best_mode(modes)].figures
            for name in _SPEED:
                if name in ours and name in figures:
                    ratio = ratio_of(ours[name].median, figures[name].median, ours[name].better)
                    if ratio is not None:
                        found.setdefault(workload, {})[peer] = ratio
                        break
    return found


def ratio_of(ours: float, theirs: float, better: str) -> float | None:
    """Above 1: ours is better."""
    if ours <= 0.0 or theirs <= 0.0:
        return None
    return theirs / ours if better == "lower" else ours / theirs


def peers_chart(result: Result, *, name: str) -> Chart | None:
    ratios = peer_ratios(result)
    if not ratios:
        return None
    return Chart(
        name,
        "Speed as a multiple of each peer's, same requests on the same machine",
        "Output tokens a second over the peer's; right of the line graphengine is faster.",
        lambda canvas: _draw_peers(canvas, ratios),
    )


def _draw_peers(canvas: Canvas, ratios: dict[str, dict[str, float]]) -> Figure:
    peers = list(dict.fromkeys(peer for row in ratios.values() for peer in row))
    figure = canvas.figure(1.0 + len(ratios) * (0.22 + 0.24 * len(peers)))
    ax = figure.subplots()
    longest = max(ratio for row in ratios.values() for ratio in row.values())
    height = 0.8 / len(peers)
    for y, row in enumerate(ratios.values()):
        for i, peer in enumerate(peers):
            if peer not in row:
                continue
            at = y + (i - (len(peers) - 1) / 2) * height
            ax.barh(
                at, row[peer], height=0.88 * height, color=light(f"series-{_shade(i, len(peers))}")
            )
            ax.text(
                row[peer] + 0.01 * longest, at, f"{row[peer]:.2f} x", va="center", weight="bold"
            )
    ax.axvline(1.0, color=light("ink"), lw=1.2)
    ax.set_yticks(range(len(ratios)), [name[:24] for name in ratios])
    ax.set_ylim(len(ratios) - 0.5, -0.5)
    ax.set_xlim(0.0, 1.15 * max(longest, 1.0))
    ax.set_xlabel("times as fast as the peer")
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    handles = [
        Patch(color=light(f"series-{_shade(i, len(peers))}"), label=f"against {peer[:24]}")
        for i, peer in enumerate(peers)
    ]
    _legend(canvas, figure, handles)
    return figure


# --- parts of charts


def _line_and_cells(canvas: Canvas) -> tuple[Figure, Axes, Axes]:
    """Beside each other, or below on a narrow page."""
    if canvas.is_narrow:
        figure = canvas.figure(6.4)
        axes = figure.subplots(2, 1, height_ratios=(3.4, 2.6))
    else:
        figure = canvas.figure(4.2)
        axes = figure.subplots(1, 2, width_ratios=(3.2, 1.9))
    return figure, axes[0], axes[1]


def _floor_handle() -> Line2D:
    return Line2D([], [], color=light("ink"), ls=(0, (3, 2)), lw=1.1, label="bandwidth floor")


def _legend_above(ax: Axes, handles: Sequence[Artist]) -> None:
    """On the left over the axes, where no line can run through it."""
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2 if len(handles) > 3 else 4,
        columnspacing=1.2,
        fontsize=8.5,
    )


def _cells(
    canvas: Canvas,
    ax: Axes,
    texts: dict[tuple[int, int], str],
    fills: dict[tuple[int, int], float],
    all_rows: list[int],
    contexts: list[int],
) -> None:
    """A table of rows x context; fills: 0 to 1, how dense a cell is."""
    for y, rows in enumerate(all_rows):
        for x, context in enumerate(contexts):
            text = texts.get((rows, context), "–")
            fill = min(1.0, max(0.0, fills.get((rows, context), 0.0)))
            ax.add_patch(
                Rectangle(
                    (x - 0.47, y - 0.46),
                    0.94,
                    0.92,
                    facecolor=light("share"),
                    alpha=0.04 + 0.6 * fill,
                    linewidth=0.0,
                    gid=canvas.tip(f"{_rows_text(rows)} x {context:,} tokens: {text}"),
                )
            )
            ax.text(x, y, text, ha="center", va="center", weight="bold")
    ax.set_xlim(-0.5, len(contexts) - 0.5)
    ax.set_ylim(-0.5, len(all_rows) - 0.5)
    ax.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    ax.set_yticks(range(len(all_rows)), [f"{rows}" for rows in all_rows])
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("rows")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def _rows_text(rows: int) -> str:
    return f"{rows} row" if rows == 1 else f"{rows} rows"


def _shade(i: int, num: int) -> int:
    """Colours of an ordered series spread over the whole range."""
    return i % _SERIES if num > _SERIES else round(i * (_SERIES - 1) / max(1, num - 1))


def _log_axis(ax: Axes, axis: str, values: list[int]) -> None:
    """Powers of two, ticks at the measured values."""
    assert axis == "x"
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{value:,}" for value in values])
    ax.xaxis.set_minor_locator(NullLocator())


def _log_ticks(ax: Axes, values: Iterable[float]) -> None:
    """A logarithmic y axis with round numbers as ticks, also where it spans less than a decade."""
    known = [value for value in values if value > 0.0]
    ax.set_yscale("log")
    low, high = min(known), max(known)
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low < 8 else (1, 2, 5)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    ax.set_ylim(0.88 * low, 1.15 * high)
    ax.set_yticks(
        [tick for tick in ticks if 0.88 * low <= tick <= 1.15 * high],
        [f"{tick:,.10g}" for tick in ticks if 0.88 * low <= tick <= 1.15 * high],
    )
    ax.yaxis.set_minor_locator(NullLocator())


def _label_ends(ax: Axes, ends: list[tuple[float, str, str]], x: float) -> None:
    """Texts right of the last points of lines, moved apart where they would overlap."""
    figure = ax.get_figure()
    assert figure is not None
    figure.canvas.draw()  # settles the layout, which the distances below depend on
    points = 11.0  # height of a line of text
    scale = 72.0 / 100.0  # a figure's own dots, 100 an inch, to points
    last = -math.inf
    for value, text, colour in sorted(ends):
        at = float(ax.transData.transform((x, value))[1]) * scale
        place = max(at, last + points)
        ax.annotate(
            text,
            (x, value),
            xytext=(8, place - at),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            weight="bold",
            color=colour,
        )
        last = place


def _spread(sizes: Iterable[int], limit: int, least: float) -> list[int]:
    """Those of `sizes` that leave room between their labels, the last always."""
    ordered = sorted(sizes, reverse=True)
    kept = ordered[:1]
    for size in ordered[1:]:
        if kept[-1] - size >= least * limit:
            kept.append(size)
    return kept[::-1]


def _in_order(names: Iterable[str]) -> list[str]:
    known = list(names)
    return [name for name in PHASES if name in known] + [n for n in known if n not in PHASES]


def _phase_legend(canvas: Canvas, figure: Figure, phases: Iterable[str]) -> None:
    names = _in_order(dict.fromkeys(phases))
    _legend(canvas, figure, [Patch(color=light(name), label=name[:24]) for name in names[:12]])


def _legend(canvas: Canvas, figure: Figure, handles: list[Patch]) -> None:
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=4 if canvas.is_narrow else 10,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.1,
        handletextpad=0.45,
        fontsize=8.5,
    )
