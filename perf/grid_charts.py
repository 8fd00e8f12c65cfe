"""How fast is a decode step at each batch and context? Charts of decode grids and of buckets."""

from __future__ import annotations

import statistics

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from captures import BucketLadder
from perf.chart_parts import (
    draw_cells,
    floor_handle,
    label_ends,
    legend_above,
    line_and_cells,
    log_axis,
    log_ticks,
    rows_text,
    shade,
    spread,
)
from perf.drawing import (
    MARKERS,
    Canvas,
    Chart,
    bandwidth,
    light,
    percent,
)
from perf.recorded import Result, best_mode


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
    figure, ax, heat = line_and_cells(canvas)
    all_rows = sorted({rows for rows, _ in times})
    contexts = sorted({context for _, context in times})
    ends: list[tuple[float, str, str]] = []
    for i, rows in enumerate(all_rows):
        line = [(c, times[rows, c]) for c in contexts if (rows, c) in times]
        colour = light(f"series-{shade(i, len(all_rows))}")
        marker = MARKERS[i % len(MARKERS)]
        ax.plot(*zip(*line, strict=True), color=colour, marker=marker)
        floor = [(c, ms * shares[rows, c]) for c, ms in line if (rows, c) in shares]
        if floor:
            ax.plot(*zip(*floor, strict=True), color=colour, ls=(0, (3, 2)), lw=1.1)
        if line[-1][0] == contexts[-1]:
            ends.append((line[-1][1], rows_text(rows), colour))
        else:
            ax.annotate(
                rows_text(rows),
                line[-1],
                xytext=(6, 0),
                textcoords="offset points",
                color=colour,
                weight="bold",
                va="center",
                fontsize=8.5,
            )
    log_axis(ax, contexts)
    log_ticks(ax, [*times.values(), *(ms * shares[at] for at, ms in times.items() if at in shares)])
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("device time of a step, ms")
    label_ends(ax, ends, contexts[-1])
    handles = [Line2D([], [], color=light("ink"), marker="o", label="measured")]
    if shares:
        handles.append(floor_handle())
    legend_above(ax, handles)
    texts = {at: f"{100 * share:.0f} %" for at, share in shares.items()}
    heat.set_title("share of read bandwidth reached", pad=8)
    draw_cells(canvas, heat, texts, shares, all_rows, contexts)
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
    figure, ax, heat = line_and_cells(canvas)
    all_rows = sorted({rows for rows, _ in times})
    contexts = sorted({context for _, context in times})
    for i, context in enumerate(contexts):
        line = [(r, 1e3 * r / times[r, context]) for r in all_rows if (r, context) in times]
        colour = light(f"series-{shade(i, len(contexts))}")
        ax.plot(
            *zip(*line, strict=True),
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            label=f"context {context:,}",
        )
        floor = [(r, 1e3 * r / floors[r, context]) for r, _ in line if floors.get((r, context))]
        if floor:
            ax.plot(*zip(*floor, strict=True), color=colour, ls=(0, (3, 2)), lw=1.1)
    log_axis(ax, all_rows)
    rates = {at: 1e3 * at[0] / ms for at, ms in times.items()}
    top = max(rates.values())
    log_ticks(ax, [*rates.values(), *(1e3 * at[0] / ms for at, ms in floors.items() if ms)])
    ax.set_xlabel("rows decoding at once")
    ax.set_ylabel("tok/s")
    handles = list(ax.get_legend_handles_labels()[0])
    legend_above(ax, [*handles, floor_handle()] if floors else handles)
    heat.set_title("tok/s", pad=8)
    texts = {at: f"{rate:,.0f}" for at, rate in rates.items()}
    draw_cells(
        canvas, heat, texts, {at: rate / top for at, rate in rates.items()}, all_rows, contexts
    )
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
    ax.set_xticks(spread(ladder.sizes, len(rows), 0.05 if not canvas.is_narrow else 0.1))
    ax.set_xlabel("rows decoding")
    ax.set_ylabel("empty rows, %")
    return figure
