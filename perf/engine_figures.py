"""Do async, synchronous and eager mode agree, and what do they reach? Also capture and start-up.

Each part prints one JSON line; `--output FILE` keeps them with the machine and versions. Random
weights of real shapes, fixed lengths, greedy, EOS ignored. `graphengine perf run` measures more;
this one compares the tokens of the modes. On the CPU `--shape tiny --new 16` runs all parts.

    python -m perf.engine_figures --output FILE.json decode-8b decode-0.6b host ladder-8b startup
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perf.result_file import result_path, write_result
from perf.shapes import SHAPES, write_shape

Figures = dict[str, Any]


def environment() -> Figures:
    import torch
    import transformers

    from perf.environment import environment as whole

    found: Figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": whole()["commit"],
        "card": "cpu",
    }
    if torch.cuda.is_available():
        import flash_attn
        import triton

        found |= {
            "card": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "flash_attn": flash_attn.__version__,
        }
    return found


def prompts(num: int, length: int, vocab_size: int, *, seed: int = 0) -> list[Figures]:
    draw = random.Random(seed)
    return [
        {"prompt_token_ids": [draw.randrange(vocab_size) for _ in range(length)]}
        for _ in range(num)
    ]


def decode(
    shape: str, folder: Path, *, rows: int, prompt: int, new: int, modes: list[str], repeats: int
) -> Figures:
    """ms per step of `rows` requests of prompt + new tokens: the whole run over the tokens of one
    request, prefill and host included, and the device's share of it. `rows_that_differ` between the
    modes must be 0, and `distinct_outputs` the number of rows, or the weights make no probe."""
    from graphengine import LLM, SamplingParams

    model = write_shape(shape, folder)
    requests = prompts(rows, prompt, SHAPES[shape]["vocab_size"])
    figures: Figures = {
        "part": "decode",
        "shape": shape,
        "rows": rows,
        "prompt": prompt,
        "new": new,
    }
    tokens: dict[str, list[list[int]]] = {}
    for mode in modes:
        start = time.perf_counter()
        llm = LLM(
            str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_num_seqs=rows,
            max_model_len=math.ceil((prompt + new) / 256) * 256,
            enforce_eager=mode == "eager",
            async_scheduling=mode == "async",
        )
        init_s = time.perf_counter() - start
        # Eager is slow and only its step time is asked for.
        steps = min(new, 128) if mode == "eager" else new
        params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
        # Warms up, and gives every mode's tokens in batches of the same composition: rows end at
        # the same time in all.
        probe = SamplingParams(temperature=0.0, max_tokens=min(new, 128), ignore_eos=True)
        tokens[mode] = [output.outputs[0].token_ids for output in llm.generate(requests, probe)]
        runs: list[Figures] = []
        for _ in range(1 if mode == "eager" else repeats):
            llm.generate(requests, params)
            stats = llm.stats()
            runs.append(
                {
                    "ms_per_step": 1e3 * stats.elapsed_s / steps,
                    "total_s": stats.elapsed_s,
                    "decode_ms": stats.decode_ms,
                    "prefill_ms": stats.prefill_ms,
                    "busy": stats.gpu_busy,
                    "longest_gap_ms": stats.longest_gap_ms,
                    "num_steps": [stats.num_prefill_steps, stats.num_decode_steps],
                    "host_ms": {k: round(v, 4) for k, v in stats.host_ms.items()},
                }
            )
        runs.sort(key=lambda run: run["ms_per_step"])
        figures[mode] = runs[len(runs) // 2] | {
            "init_s": round(init_s, 2),
            "all_ms_per_step": [round(run["ms_per_step"], 4) for run in runs],
            "num_blocks": llm.num_blocks,
        }
        if llm.capture_report is not None:
            figures[mode]["capture_s"] = round(llm.capture_report.total_s, 2)
            figures[mode]["capture_mib"] = llm.capture_report.total_bytes >> 20
        llm.close()
    first = tokens[modes[0]]
    # Rows that differ from the first mode's: must be none.
    figures["rows_that_differ"] = {
        mode: sum(a != b for a, b in zip(first, other, strict=True))
        for mode, other in tokens.items()
    }
    figures["distinct_outputs"] = len({tuple(t) for t in first})
    return figures


def startup(shape: str, folder: Path) -> Figures:
    """Seconds from process start to the first decode step's token, by phase, of a checkpoint on
    disk that is in the page cache. The second of two runs counts: the first one fills caches."""
    # Imported here: torch comes with it, and the process measured imports this module.
    from perf.checkpoint import write_checkpoint

    start = time.perf_counter()
    path = write_checkpoint(shape, folder)
    written_s = time.perf_counter() - start
    runs = []
    for _ in range(2):
        command = [sys.executable, "-m", "perf.engine_figures", "--child", str(path)]
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"part": "startup", "error": done.stderr[-2000:]}
        phases = json.loads(done.stdout.splitlines()[-1])
        inside = {name: round(s, 2) for name, s in phases.pop("phases").items()}
        max_rss_mib = round(phases.pop("max_rss_mib"))
        run = {name: round(at - began, 2) for name, at in phases.items()}
        runs.append(run | {"ready_phases_s": inside, "max_rss_mib": max_rss_mib})
    return {"part": "startup", "shape": shape, "written_s": round(written_s, 1), "runs": runs}


def _startup_child(path: Path) -> None:
    times = {"python": time.time()}
    from graphengine import LLM, SamplingParams

    times["imported"] = time.time()
    llm = LLM(str(path), skip_tokenizer_init=True, max_model_len=8192)
    times["ready"] = time.time()
    phases = llm.startup_s
    llm.generate(
        {"prompt_token_ids": [1] * 32},
        SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True),
    )
    times["first_decode_step"] = time.time()
    times["max_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(times | {"phases": phases}))
    llm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--output", type=result_path)
    parser.add_argument("--shape", choices=list(SHAPES), help="run every part with this shape")
    parser.add_argument("--new", type=int, help="output tokens instead of each part's own number")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", default="async,sync,eager")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _startup_child(args.child)
        return
    modes = args.modes.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def loads(shape: str, rows: int, prompt: int, new: int) -> Callable[[], Figures]:
            return lambda: decode(
                args.shape or shape,
                folder,
                rows=rows,
                prompt=prompt,
                new=args.new or new,
                modes=modes,
                repeats=args.repeats,
            )

        parts: dict[str, Callable[[], Figures]] = {
            "decode-8b": loads("llama-8b", 32, 256, 2048),
            "decode-0.6b": loads("qwen3-0.6b", 32, 128, 1024),
            "host": loads("qwen3-0.6b", 256, 256, 512),
            "ladder-8b": loads("llama-8b", 256, 256, 64),
            "startup": lambda: startup(args.shape or "llama-8b", folder),
        }
        unknown = set(args.parts) - set(parts)
        if unknown:
            parser.error(f"unknown parts {sorted(unknown)}; choose from {', '.join(parts)}")
        results: Figures = {"environment": environment(), "parts": {}}
        for part in args.parts or parts:
            start = time.perf_counter()
            results["parts"][part] = parts[part]()
            results["parts"][part]["part_s"] = round(time.perf_counter() - start, 1)
            print(json.dumps({part: results["parts"][part]}), flush=True)
            if args.output:  # after each part: a run cut short keeps what it has
                write_result(results, args.output)


if __name__ == "__main__":
    main()
