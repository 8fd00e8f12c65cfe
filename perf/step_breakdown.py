"""Where does the time of a decode step go? Profiles the engine's own steps at fixed points.

Random weights of real shape, a KV cache of noise. Of each point a table on standard error and one
JSON line; `--output FILE` keeps them with the machine and versions. Kernels that start before the
one before them has ended are counted once: see `perf.kernel_accounts`. A profiled step takes longer
than one that is not (device_ms, step_ms).

    python -m perf.step_breakdown --shape llama-8b --point 32x256 --point 256x1024
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graphengine import LLM
from graphengine.errors import ConfigError
from perf.environment import environment, read_bandwidth
from perf.kernel_accounts import KernelEvent, StepFloors, account
from perf.result_file import result_path, write_result
from perf.run import make_llm
from perf.script import check_gpu, errors_as_exit
from perf.shapes import SHAPES, write_shape
from perf.step_probe import StepProbe
from perf.workloads import GRID_STEPS, Workload

Json = dict[str, Any]
# Categories of device work in a trace of torch's profiler.
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def breakdown(llm: LLM, probe: StepProbe, rows: int, context: int, bytes_per_s: float) -> Json:
    """Figures of one point: its step, unprofiled, and the account of GRID_STEPS profiled ones."""
    measured = {name.partition("[")[0]: v[0] for name, v in probe.measure(rows, context).items()}
    floors = StepFloors(llm.model_config, rows, context, bytes_per_s)
    steps = probe.steps(rows, context)
    steps()
    found = account(profiled(steps), GRID_STEPS, floors)
    return {
        "point": f"{rows}x{context}",
        "device_ms": measured["device_ms"],
        "step_ms": measured["step_ms"],
        "floor_us": floors.step_us,
        **found.per_step(),
    }


def profiled(run: Callable[[], object]) -> list[KernelEvent]:
    """What the device did while `run` ran and until it was done."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return trace_events(json.loads(path.read_text("utf-8")))


def trace_events(trace: Json) -> list[KernelEvent]:
    """Device work in a trace of torch's profiler, whose times are microseconds."""
    return [
        KernelEvent(
            event["name"],
            int(event["args"]["stream"]),
            float(event["ts"]),
            float(event["ts"]) + float(event["dur"]),
        )
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in _DEVICE_WORK
    ]


def table(shape: str, found: Json) -> str:
    """One point as text: us of a step by kernel, those that take longest first."""
    lines = [
        f"{shape}, {found['point']}: step {1e3 * found['step_ms']:.0f} us (on the device "
        f"{1e3 * found['device_ms']:.0f}), floor {found['floor_us']:.0f}; profiled "
        f"{found['span_us']:.0f}: kernels {found['busy_us']:.0f}, gaps {found['gap_us']:.0f}",
        f"{'part':20}{'calls':>7}{'us':>9}{'each':>8}{'gaps':>8}{'floor':>9}{'share':>7}  kernel",
    ]
    for row in sorted(found["rows"], key=lambda row: -row["own_us"]):
        floor, own = row["floor_us"], row["own_us"]
        shares = f"{'-':>9}{'-':>7}"
        if floor is not None and own > 0.0:
            shares = f"{floor:9.1f}{floor / own:7.2f}"
        lines.append(
            f"{row['part']:20}{row['count']:7.4g}{own:9.1f}{own / row['count']:8.2f}"
            f"{row['gap_us']:8.1f}{shares}  {row['kernel'][:70]}"
        )
    for row in found["beside"]:
        lines.append(
            f"{row['part']:20}{row['count']:7.4g}{row['raw_us']:9.1f}"
            f"{row['raw_us'] / row['count']:8.2f}{'':8}{'':9}{'':7}  {row['kernel'][:70]}"
        )
    return "\n".join(lines)


def point(text: str) -> tuple[int, int]:
    """(32, 256) of "32x256". Raises ConfigError."""
    rows, _, context = text.partition("x")
    if not (rows.isdecimal() and context.isdecimal() and int(rows) > 0 and int(context) > 0):
        raise ConfigError(f"--point is {text!r}; give rows x context, as 32x256")
    return int(rows), int(context)


@errors_as_exit()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--point", action="append", required=True, metavar="ROWSxCONTEXT")
    parser.add_argument("--output", type=result_path)
    args = parser.parse_args()
    run(args.shape, tuple(map(point, args.point)), args.output)


def run(shape: str, points: tuple[tuple[int, int], ...], output: Path | None) -> None:
    """Raises ConfigError, before anything is measured, for a point too long for the model, without
    a CUDA device, or for a point that does not fit its memory."""
    limit = SHAPES[shape]["max_position_embeddings"] - GRID_STEPS
    for rows, context in points:
        if context > limit:
            raise ConfigError(
                f"--point {rows}x{context} is too long for {shape}; give a context of {limit} or "
                "less"
            )
    check_gpu("kernels are profiled on one")
    bytes_per_s = read_bandwidth()
    result: Json = {
        "environment": environment(),
        "shape": shape,
        "read_bandwidth_bytes_per_s": bytes_per_s,
        "points": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload("breakdown", shape, "grid", points=points)
        path = write_shape(shape, Path(folder))
        options: Json = {"load_format": "dummy"}
        llm = make_llm(str(path), workload.max_len(1.0), [workload], 1.0, options)
        probe = StepProbe(llm)
        gc.freeze()  # as the engine's loop does: a collection would stop the host in mid-profile
        for rows, context in points:
            if not probe.fits(rows, context):
                raise ConfigError(
                    f"--point {rows}x{context} does not fit the KV cache; give fewer rows or a "
                    "shorter context"
                )
        for rows, context in points:
            found = breakdown(llm, probe, rows, context, bytes_per_s)
            result["points"].append(found)
            print(table(shape, found), file=sys.stderr, flush=True)
            print(json.dumps({"shape": shape, **found}), flush=True)
            if output:  # after each point: a run cut short keeps what it has
                write_result(result, output)
        llm.close()


if __name__ == "__main__":
    main()
