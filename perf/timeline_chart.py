"""Does the device wait for the host? The steps of each mode above each other, on one time scale."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from perf.drawing import PHASES, Canvas, Chart, amount, duration, light, number, percent
from perf.recorded import Measured, Result, Span

_HOST_Y, _DEVICE_Y = 1.0, 0.0
_HEIGHT = 0.72
_LEAST_GAP_MS = 0.002


@dataclass(frozen=True, slots=True)
class _Cut:
    """What is shown of a mode: whole spans, 0 ms at the left edge, which the first may cross."""

    host: list[Span]
    device: list[Span]
    gaps: list[Span]


def timeline_chart(result: Result, workload: str, *, name: str) -> Chart | None:
    """None unless a mode has two steps to show."""
    modes = {
        mode: measured
        for mode, measured in result.workloads[workload].items()
        if len(_rows(measured)[1]) >= 2
    }
    if not modes:
        return None
    device = "GPU" if result.has_gpu else "device"
    title = f"{workload}: what host and {device} did in the last steps, by mode"
    if result.has_gpu:
        title = f"{workload}: does the GPU wait for the host?"
    note = (
        f"All rows share one time scale. Hatched: the {device} had nothing to do. Blank on the "
        "host: the code that takes the outputs. "
        + ("" if result.has_gpu else "On the CPU a launch is the computation itself. ")
        + (
            "Without graphs (eager) the gaps between a step's kernels cannot be seen: its share is "
            "about what they take as graphs or, where those did not run, an upper bound. "
            if result.has_gpu and "eager" in modes
            else ""
        )
        + "Rest the pointer on a span for its time."
    )
    return Chart(name, title, note, lambda canvas: _draw(canvas, modes, result.has_gpu))


def busy_text(mode: str, measured: Measured) -> str | None:
    """Busy share of the whole run, if it was measured."""
    estimate = measured.figures.get("gpu_busy_estimate")
    if estimate is not None:
        return f"about {percent(estimate.median)}"
    busy = measured.figures.get("gpu_busy")
    if busy is None:
        return None
    return ("≤ " if mode == "eager" else "") + percent(busy.median)


def _rows(measured: Measured) -> tuple[list[Span], list[Span]]:
    def row(name: str) -> list[Span]:
        return sorted(
            (span for span in measured.timeline if span.row == name and span.ms >= 0.0),
            key=lambda span: span.start_ms,
        )

    return row("host"), row("device")


def _width_ms(modes: dict[str, Measured], num_steps: float) -> float:
    """Time to show: some steps of the slowest mode, at most twice as many of the fastest, and
    nothing past what any mode has recorded."""
    periods, lengths = [], []
    for measured in modes.values():
        device = _rows(measured)[1]
        starts = [span.start_ms for span in device]
        periods.append(statistics.median(b - a for a, b in itertools.pairwise(starts)))
        lengths.append(device[-1].end_ms - starts[1 if len(starts) > 2 else 0])
    return max(1e-6, min(num_steps * max(periods), 2.0 * num_steps * min(periods), *lengths))


def _cut(measured: Measured, width_ms: float) -> _Cut:
    """From just before a launch on, not the first one recorded: the gap before that is not known.
    The first place with the fewest prefills, since those are rare and long."""
    host, device = _rows(measured)
    last_ms = device[-1].end_ms
    places = [span.start_ms for span in device[1:] if span.start_ms + width_ms <= last_ms + 1e-9]

    def num_prefills(start_ms: float) -> int:
        end_ms = start_ms + width_ms
        return sum(
            span.name != "decode" and span.start_ms < end_ms and span.end_ms > start_ms
            for span in device
        )

    start_ms = min(places, key=num_prefills, default=device[0].start_ms)
    start_ms = max(device[0].start_ms, start_ms - 0.02 * width_ms)
    end_ms = start_ms + width_ms

    def inside(spans: list[Span]) -> list[Span]:
        return [
            Span(span.row, span.name, span.start_ms - start_ms, span.ms)
            for span in spans
            if span.end_ms > start_ms and span.start_ms < end_ms
        ]

    gaps = [
        Span("device", "idle", before.end_ms, after.start_ms - before.end_ms)
        for before, after in itertools.pairwise(device)
        if after.start_ms - before.end_ms >= _LEAST_GAP_MS
    ]
    return _Cut(inside(host), inside(device), inside(gaps))


def _draw(canvas: Canvas, modes: dict[str, Measured], has_gpu: bool) -> Figure:
    width_ms = _width_ms(modes, 2.2 if canvas.is_narrow else 4.2)
    unit, scale = ("ms", 1.0) if width_ms >= 1.0 else ("µs", 1e3)
    cuts = {mode: _cut(measured, width_ms) for mode, measured in modes.items()}
    row_height = 1.12 if canvas.is_narrow else 0.98
    legend_height = 0.85 if canvas.is_narrow else 0.42
    height = row_height * len(modes) + legend_height + 0.5
    figure = canvas.figure(height, layout=False)
    axes = figure.subplots(len(modes), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(
        left=0.125 if canvas.is_narrow else 0.225,
        right=0.985,
        top=1.0 - (legend_height - (0.12 if canvas.is_narrow else 0.0)) / height,
        bottom=0.42 / height,
        hspace=0.36 if canvas.is_narrow else 0.22,
    )
    for ax, (mode, cut) in zip(axes, cuts.items(), strict=True):
        _draw_mode(canvas, ax, cut, width_ms, scale, unit)
        ax.set_yticks([_HOST_Y, _DEVICE_Y], ["host", "GPU" if has_gpu else "device"])
        _draw_label(canvas, ax, mode, modes[mode], cut.gaps, width_ms)
    axes[-1].set_xlabel(f"time, {unit}")
    axes[-1].xaxis.set_major_locator(MaxNLocator(5 if canvas.is_narrow else 10))
    axes[-1].tick_params(axis="x", length=3)
    _draw_legend(canvas, figure, cuts)
    return figure


def _draw_mode(
    canvas: Canvas, ax: Axes, cut: _Cut, width_ms: float, scale: float, unit: str
) -> None:
    ax.set_xlim(0.0, width_ms * scale)
    ax.set_ylim(-0.5, 1.5)
    ax.grid(visible=False, axis="y")
    ax.spines[:].set_visible(False)
    ax.spines["bottom"].set_visible(True)
    ax.spines["bottom"].set_color(light("grid"))
    ax.tick_params(length=0)
    for y, spans in ((_HOST_Y, cut.host), (_DEVICE_Y, cut.device)):
        for span in spans:
            told = f"{span.name} {number(span.ms * scale)} {unit}"
            ax.add_patch(
                Rectangle(
                    (span.start_ms * scale, y - _HEIGHT / 2),
                    span.ms * scale,
                    _HEIGHT,
                    facecolor=light(span.name),
                    linewidth=0.0,
                    gid=canvas.tip(told),
                )
            )
            if y == _DEVICE_Y:
                texts = [told, f"{number(span.ms * scale)} {unit}", span.name]
                _label_span(canvas, ax, span, width_ms, scale, texts)
    for gap in cut.gaps:
        told = f"idle {number(gap.ms * scale)} {unit}"
        is_wide = gap.ms >= 0.004 * width_ms  # else hatches would be wider than the gap
        ax.add_patch(
            Rectangle(
                (gap.start_ms * scale, _DEVICE_Y - _HEIGHT / 2),
                gap.ms * scale,
                _HEIGHT,
                facecolor="none" if is_wide else light("idle"),
                edgecolor=light("idle"),
                hatch="//////" if is_wide else None,
                linewidth=0.6 if is_wide else 0.4,
                snap=False,
                gid=canvas.tip(told),
            )
        )
        is_whole = gap.start_ms >= 0.0 and gap.end_ms <= width_ms
        if is_whole and gap.ms >= 0.09 * width_ms * (2.2 if canvas.is_narrow else 1.0):
            ax.text(
                (gap.start_ms + gap.ms / 2) * scale,
                _DEVICE_Y,
                told,
                ha="center",
                va="center",
                fontsize=8,
                color=light("idle"),
                weight="bold",
                bbox={"facecolor": light("paper"), "edgecolor": "none", "pad": 1.5},
            )


def _label_span(
    canvas: Canvas,
    ax: Axes,
    span: Span,
    width_ms: float,
    scale: float,
    texts: list[str],
) -> None:
    """The first of `texts` that fits into the bar, none if it is cut off."""
    if span.start_ms < 0.0 or span.end_ms > width_ms:
        return  # cut off: a time over it would not be that of what is seen
    room = span.ms / width_ms * canvas.width * (0.85 if canvas.is_narrow else 0.76)  # inches
    for text in texts:
        if 0.075 * len(text) + 0.1 <= room:
            ax.text(
                (span.start_ms + span.ms / 2) * scale,
                _DEVICE_Y,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color=light("on-bar"),
                clip_on=True,
            )
            return


def _draw_label(
    canvas: Canvas, ax: Axes, mode: str, measured: Measured, shown: list[Span], width_ms: float
) -> None:
    busy = busy_text(mode, measured)
    gaps = [gap.ms for gap in shown]
    idle_ms = sum(min(gap.end_ms, width_ms) - max(gap.start_ms, 0.0) for gap in shown)
    share = percent(1.0 - idle_ms / width_ms)
    lines = [f"GPU busy {busy}" if busy else f"busy {share} here"]
    if gaps and not canvas.is_narrow:
        lines.append(f"gaps of {duration(statistics.median(gaps))}")
    for name, unit in (("ms_per_step", "ms/step"), ("out_tok_per_s", "tok/s")):
        if name in measured.figures:
            lines.append(amount(measured.figures[name].median, unit))
    if canvas.is_narrow:
        ax.set_title(f"{mode[:24]}: {', '.join(lines)}", fontsize=8.2, pad=3)
        return
    left, y = -0.285, 0.98
    ax.text(left, y, mode[:18], transform=ax.transAxes, va="top", fontsize=11.5, weight="bold")
    for i, line in enumerate(lines):
        ax.text(
            left,
            y - 0.27 - 0.205 * i,
            line,
            transform=ax.transAxes,
            va="top",
            weight="bold" if i == 0 else "normal",
            color=light("ink" if i == 0 else "faint"),
        )


def _draw_legend(canvas: Canvas, figure: Figure, cuts: dict[str, _Cut]) -> None:
    device = dict.fromkeys(span.name for cut in cuts.values() for span in cut.device)
    host = dict.fromkeys(span.name for cut in cuts.values() for span in cut.host)
    names = [name for name in PHASES if name in host] + [n for n in host if n not in PHASES]
    names += [name for name in device if name not in names]
    handles = [Patch(facecolor=light(name), label=name) for name in names[:12]]
    handles.append(
        Patch(facecolor="none", edgecolor=light("idle"), hatch="//////", label="device idle")
    )
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=4 if canvas.is_narrow else 10,
        bbox_to_anchor=(0.0, 1.0),
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.1,
        handletextpad=0.45,
        fontsize=8.5,
        borderaxespad=0.1,
    )
