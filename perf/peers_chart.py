"""How many times as fast as its peers is graphengine?"""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from perf.chart_parts import (
    draw_legend,
    shade,
)
from perf.drawing import (
    Canvas,
    Chart,
    light,
)
from perf.recorded import Result, best_mode

# Which figure says how fast a run was, best first; the two after it are better when lower.
_SPEED = ("out_tok_per_s", "ms_per_step", "total_s")


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
                at, row[peer], height=0.88 * height, color=light(f"series-{shade(i, len(peers))}")
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
        Patch(color=light(f"series-{shade(i, len(peers))}"), label=f"against {peer[:24]}")
        for i, peer in enumerate(peers)
    ]
    draw_legend(canvas, figure, handles)
    return figure
