"""Which parts do several charts share? Axes, labels, legends, tables of cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullLocator

from perf.drawing import (
    PHASES,
    Canvas,
    light,
)

_SERIES = 6


def line_and_cells(canvas: Canvas) -> tuple[Figure, Axes, Axes]:
    """Beside each other, or below on a narrow page."""
    if canvas.is_narrow:
        figure = canvas.figure(6.4)
        axes = figure.subplots(2, 1, height_ratios=(3.4, 2.6))
    else:
        figure = canvas.figure(4.2)
        axes = figure.subplots(1, 2, width_ratios=(3.2, 1.9))
    return figure, axes[0], axes[1]


def floor_handle() -> Line2D:
    return Line2D([], [], color=light("ink"), ls=(0, (3, 2)), lw=1.1, label="bandwidth floor")


def legend_above(ax: Axes, handles: Sequence[Artist]) -> None:
    """On the left over the axes, where no line can run through it."""
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=2 if len(handles) > 3 else 4,
        columnspacing=1.2,
        fontsize=8.5,
    )


def draw_cells(
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
                    gid=canvas.tip(f"{rows_text(rows)} x {context:,} tokens: {text}"),
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


def rows_text(rows: int) -> str:
    return f"{rows} row" if rows == 1 else f"{rows} rows"


def shade(i: int, num: int) -> int:
    """Colours of an ordered series spread over the whole range."""
    return i % _SERIES if num > _SERIES else round(i * (_SERIES - 1) / max(1, num - 1))


def log_axis(ax: Axes, values: list[int]) -> None:
    """An x axis in powers of two, ticks at the measured values."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [f"{value:,}" for value in values])
    ax.xaxis.set_minor_locator(NullLocator())


def log_ticks(ax: Axes, values: Iterable[float]) -> None:
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


def label_ends(ax: Axes, ends: list[tuple[float, str, str]], x: float) -> None:
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


def spread(sizes: Iterable[int], limit: int, least: float) -> list[int]:
    """Those of `sizes` that leave room between their labels, the last always."""
    ordered = sorted(sizes, reverse=True)
    kept = ordered[:1]
    for size in ordered[1:]:
        if kept[-1] - size >= least * limit:
            kept.append(size)
    return kept[::-1]


def in_order(names: Iterable[str]) -> list[str]:
    known = list(names)
    return [name for name in PHASES if name in known] + [n for n in known if n not in PHASES]


def phase_legend(canvas: Canvas, figure: Figure, phases: Iterable[str]) -> None:
    names = in_order(dict.fromkeys(phases))
    draw_legend(canvas, figure, [Patch(color=light(name), label=name[:24]) for name in names[:12]])


def draw_legend(canvas: Canvas, figure: Figure, handles: list[Patch]) -> None:
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
