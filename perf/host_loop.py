"""How long does the host take for a step? The engine's loop by phase, at 256 rows.

Loads: "steady", the requests of the workload steady-0.6b, of one length; "mixed", of mixed-0.6b;
"changing", 1,024 of mixed lengths of which 256 run at a time, so that rows come and go. On a GPU
the whole engine runs, on random weights. On the CPU the model and its sampler do nothing, so that
what is left is the host's part, with copies in memory in the place of those to and from a device;
its tokens mean nothing.

The JSON line of a load is that of the FASTEST of its repeats: the host's work undisturbed, less
than a user sees. `median_host_ms_per_decode_step` is the median of all repeats.

    python -m perf.host_loop [--shape qwen3-0.6b] [--load steady] [--profile] [--sample-memory]
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pstats
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graphengine import LLM, Request, SamplingParams
from graphengine.metrics import Lap, Laps
from perf.run import SHADOW, MemorySampler, shadow_ms
from perf.script import check_least, check_shape, errors_as_exit
from perf.shapes import SHAPES, write_shape
from perf.workloads import WORKLOADS, Lengths, mixed, shortened, token_ids

ROWS = 256
LOADS: dict[str, Callable[[], Lengths]] = {
    "steady": WORKLOADS["steady-0.6b"].draw,
    "mixed": WORKLOADS["mixed-0.6b"].draw,
    "changing": lambda: shortened(mixed(1024)(), 0.5),
}


def without_model(llm: LLM) -> None:
    """Decode steps and prefills of `llm` compute nothing from here on; all else stays. CPU only."""
    runner: Any = llm._runner
    runner._runner._step_fn = lambda inputs, outputs: None
    runner.prefill = lambda tokens, sequences, batch, out, **options: None


def measure(llm: LLM, lengths: Lengths, *, sample_memory: bool) -> dict[str, Any]:
    """Milliseconds of host work: of a decode step; by phase, mean, median and the slowest five of
    the times it ran; of the whole run, its wall time over its decode steps. sample_memory: with
    the thread beside it that `perf run` has."""
    laps: list[Lap] = []
    llm._make_laps = lambda: Laps(laps.append)  # type: ignore[method-assign]
    requests = [
        Request(
            {"prompt_token_ids": ids},
            SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True),
        )
        for ids, (_, new) in zip(
            token_ids(lengths, llm.model_config.vocab_size), lengths, strict=True
        )
    ]
    with MemorySampler() if sample_memory else contextlib.nullcontext():
        outputs = llm.generate(requests)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [new for _, new in lengths]
    stats = llm.stats()
    times_ms = {
        phase: sorted(1e3 * (lap.end_s - lap.start_s) for lap in laps if lap.phase == phase)
        for phase in SHADOW
    }
    return {
        "host_ms_per_decode_step": shadow_ms(stats.host_ms),
        "host_ms": stats.host_ms,
        "median_ms": {phase: statistics.median(times) for phase, times in times_ms.items()},
        "slowest_ms": {phase: times[-5:] for phase, times in times_ms.items()},
        "wall_ms_per_decode_step": 1e3 * stats.elapsed_s / stats.num_decode_steps,
        "num_decode_steps": stats.num_decode_steps,
        "num_prefill_steps": stats.num_prefill_steps,
    }


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run whose decode steps took the host least, and of all runs the median and each time."""
    times_ms = [float(run["host_ms_per_decode_step"]) for run in runs]
    return {
        "reported": f"the fastest of {len(runs)} repeats",
        "median_host_ms_per_decode_step": statistics.median(times_ms),
        "host_ms_per_decode_step_of_repeats": times_ms,
        **runs[times_ms.index(min(times_ms))],
    }


@errors_as_exit()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), help="on a GPU; default: qwen3-0.6b")
    parser.add_argument("--load", choices=list(LOADS), action="append")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest is told whole")
    parser.add_argument("--profile", action="store_true", help="of one more run each, by function")
    parser.add_argument("--sample-memory", action="store_true", help="beside it, as perf run does")
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    shape = args.shape or ("qwen3-0.6b" if has_gpu else "tiny")
    check_least(args, 1, "repeats")
    check_shape(shape, instead="without one no model runs: leave it out")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            str(write_shape(shape, Path(folder))),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_num_seqs=ROWS,
            max_model_len=2048,
            block_size=256,  # flash's: on the CPU there are else 16 times as many to give
        )
        if not has_gpu:
            without_model(llm)
        for load in args.load or LOADS:
            runs = [
                measure(llm, LOADS[load](), sample_memory=args.sample_memory)
                for _ in range(args.repeats)
            ]
            where = torch.cuda.get_device_name() if has_gpu else "cpu, no model"
            found = {"load": load, "device": where, "shape": shape, **fastest(runs)}
            print(json.dumps(found), flush=True)
            if args.profile:
                profile = cProfile.Profile()
                profile.runcall(measure, llm, LOADS[load](), sample_memory=False)
                pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(40)
        llm.close()


if __name__ == "__main__":
    main()
