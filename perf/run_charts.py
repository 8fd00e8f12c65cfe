"""What else did runs take? Charts of host time by phase, memory and start-up; None without data."""

from __future__ import annotations

import math
import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from perf.chart_parts import (
    draw_legend,
    in_order,
    phase_legend,
)
from perf.drawing import (
    HOST_WORK,
    Canvas,
    Chart,
    duration,
    light,
    number,
)
from perf.recorded import Measured, Result

_GIB = 2.0**30


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
    phase_legend(canvas, figure, used)
    return figure


def _stack(
    canvas: Canvas, ax: Axes, bars: dict[str, dict[str, float]], title: str, longest: float
) -> None:
    """One horizontal bar each, of parts in the order of PHASES, its sum at the end."""
    for y, parts in enumerate(bars.values()):
        left = 0.0
        for phase in in_order(parts):
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
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=4,
        fontsize=8.5,
    )
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
    draw_legend(canvas, figure, handles)
    return figure
