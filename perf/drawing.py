"""How does a chart look? Colours, sizes, and a figure as SVG for the page or PNG for a file."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# name -> colour on light and on dark ground. Charts are drawn in the light ones, which differ from
# each other; in an SVG each becomes a CSS variable. Phases, after Okabe and Ito's palette for
# colour-blind readers, keep their colour in every chart.
COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e8eaed"),
    "faint": ("#5f6873", "#9aa4b0"),
    "grid": ("#dde1e6", "#353b44"),
    "paper": ("#ffffff", "#14171c"),
    "on-bar": ("#fffffe", "#fffffe"),
    "decode": ("#0072b2", "#2b86c5"),
    "prefill": ("#d55e00", "#dd6a14"),
    "idle": ("#c01530", "#ff5c6c"),
    "launch": ("#e69f00", "#e8a71c"),
    "schedule": ("#56b4e9", "#6bc0f0"),
    "commit": ("#009e73", "#17ac83"),
    "output": ("#cc79a7", "#d68ab5"),
    "intake": ("#c8b400", "#efe048"),
    "wait": ("#d3d7dc", "#444b55"),
    "outside": ("#6b5b4d", "#a08c7a"),
    "other": ("#8b929b", "#7d8691"),
    "async": ("#332288", "#9f92f5"),
    "sync": ("#aa4499", "#e07fd0"),
    "eager": ("#7a7a1e", "#c9c95c"),
    "share": ("#2a7f9e", "#46b1d6"),
    "series-0": ("#d98e04", "#ffd166"),
    "series-1": ("#d8562f", "#ff9f5a"),
    "series-2": ("#b5305f", "#f4729a"),
    "series-3": ("#82308d", "#c77ddb"),
    "series-4": ("#4b3da3", "#a39ff5"),
    "series-5": ("#1a2f6e", "#8fb8ff"),
}
MARKERS = "os^DvP"
# Phases in the order of the loop.
HOST_WORK = ("intake", "schedule", "launch", "output", "commit")
PHASES = ("intake", "schedule", "launch", "prefill", "output", "wait", "commit", "outside")

_STYLE = {
    "font.family": "sans-serif",
    # Those after the first are as wide or narrower, so nothing overlaps where it is missing.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.0,
    "text.parse_math": False,  # names in a file may hold dollar signs
    "svg.fonttype": "none",
    "hatch.linewidth": 0.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
}
_IDS = re.compile(r' id="[\w.]+_\d+"')
_PAINT = re.compile(r'((?:fill|stroke): ?|(?:fill|stroke)=")(#[0-9a-f]{6})')
_TIP = re.compile(r'<g id="tip-(\d+)">')
_WIDTH, _NARROW_WIDTH = 10.0, 4.3


def light(name: str) -> str:
    return COLOURS.get(name, COLOURS["other"])[0]


@dataclass(slots=True)
class Canvas:
    """Where a chart is drawn. tips: what is told when the pointer rests on `tip`'s artists."""

    is_narrow: bool
    tips: list[str] = field(default_factory=list)

    @property
    def width(self) -> float:
        return _NARROW_WIDTH if self.is_narrow else _WIDTH

    def figure(self, height: float, *, layout: bool = True) -> Figure:
        """Inches."""
        return Figure(figsize=(self.width, height), layout="constrained" if layout else None)

    def tip(self, text: str) -> str:
        """The `gid` of an artist that tells `text`."""
        self.tips.append(text)
        return f"tip-{len(self.tips) - 1}"


@dataclass(frozen=True, slots=True)
class Chart:
    """name: of the PNG. draw: makes the figure, anew for each width."""

    name: str
    title: str
    note: str
    draw: Callable[[Canvas], Figure]


def chart_svg(chart: Chart, *, page: str, is_narrow: bool) -> str:
    """An <svg> element to be put into HTML: colours are variables, nothing is loaded. page: differs
    where charts of one name stand in one page, so that their ids do."""
    canvas = Canvas(is_narrow)
    buffer = io.StringIO()
    # The salt makes the ids of clip paths and hatches unique in a page and the same in every run.
    with _style({"svg.hashsalt": f"{page} {chart.name} {is_narrow}"}):
        figure = chart.draw(canvas)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = _IDS.sub("", text)
    text = _TIP.sub(lambda m: f"<g><title>{escape(canvas.tips[int(m[1])])}</title>", text)
    names = {pair[0]: name for name, pair in COLOURS.items()}
    text = _PAINT.sub(lambda m: m[1] + (f"var(--{names[m[2]]})" if m[2] in names else m[2]), text)
    label = escape(chart.title, quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def chart_png(chart: Chart, path: Path) -> None:
    """With its title, on white."""
    with _style({}):
        figure = chart.draw(Canvas(is_narrow=False))
        # Laid out before the title comes, which would else be laid over a legend above the axes.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for legend in figure.legends:  # else they follow the frame, which the title moves
            legend.set_bbox_to_anchor((0.0, 1.0), figure.transFigure)
        title = "\n".join(textwrap.wrap(chart.title, 96))
        figure.text(
            0.008, 1.01, title, ha="left", va="bottom", fontsize=12, weight="bold", wrap=False
        )
        figure.savefig(
            path, format="png", dpi=140, bbox_inches="tight", pad_inches=0.12, facecolor="#ffffff"
        )


@contextmanager
def _style(more: dict[str, str]) -> Iterator[None]:
    ink, faint = light("ink"), light("faint")
    colours = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.edgecolor": faint,
        "xtick.color": faint,
        "ytick.color": faint,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "grid.color": light("grid"),
        "legend.labelcolor": ink,
    }
    style: Any = {**_STYLE, **colours, **more}
    with mpl.rc_context(style), warnings.catch_warnings():
        # A name in letters that the font lacks shows boxes in a PNG; that is all.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def number(value: float) -> str:
    """Three figures that count: 0.0213, 5.39, 133,966."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size == 0.0:
        return "0"
    if size < 1e-4:
        return f"{value:.2g}"
    for digits, limit in ((1, 10.0), (2, 1.0), (3, 0.1)):
        if size >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.4f}"


def duration(ms: float) -> str:
    return f"{number(ms)} ms" if ms >= 0.1 else f"{number(1e3 * ms)} µs"


def bandwidth(bytes_per_s: float) -> str:
    if bytes_per_s >= 1e12:
        return f"{1e-12 * bytes_per_s:.2f} TB/s"
    return f"{1e-9 * bytes_per_s:.1f} GB/s"


def percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"


def amount(value: float, unit: str) -> str:
    """A figure with its unit; shares as percentages."""
    if unit == "of 1":
        return percent(value)
    return f"{number(value)} {unit}"
