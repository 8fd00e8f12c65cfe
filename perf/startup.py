"""How long until the first token? Whole processes, by phase, with cold and warm kernel caches."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from graphengine.errors import GraphEngineError
from graphengine.hub import resolve_model
from perf.figures import Figure, merge


def measure_startup(model: str | None, shape: str, folder: Path, *, repeats: int) -> dict[str, Any]:
    """Figures of `repeats` processes each with empty and filled caches of kernels. Without `model`
    a checkpoint of `shape` is written first, so its pages are in memory, as a second start finds
    them."""
    # Imported here: torch comes with it, and the processes measured import this module.
    from perf.checkpoint import write_checkpoint

    # A hub's cache is where HOME says; so the processes are given a directory.
    path = resolve_model(model) if model else write_checkpoint(shape, folder)
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as warm:
        _start(path, warm)  # fills the warm cache, and the pages of the checkpoint and of torch
        for name in ("cold", "warm"):
            values, phases = [], []
            for _ in range(repeats):
                if name == "warm":
                    times = _start(path, warm)
                else:
                    with tempfile.TemporaryDirectory() as cold:
                        times = _start(path, cold)
                values.append(
                    {
                        f"to_ready_s[{name}]": (times["ready"], "s", "lower"),
                        f"to_first_token_s[{name}]": (times["first_token"], "s", "lower"),
                    }
                )
                phases.append(times)
            figures |= merge(values)
            detail[name] = phases
    return {"figures": figures, "detail": {"phases": detail}}


def _start(path: Path, caches: str) -> dict[str, Any]:
    """Seconds since the process was started, by milestone, and its own phases. caches: folder for
    the kernels that Triton compiles, and those that the engine does."""
    environment = {
        "HOME": caches,
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "PYTHONUSERBASE": site.getuserbase(),  # by itself it would follow HOME
    }
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "perf.startup", str(path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise GraphEngineError(f"start-up of {path} failed: {done.stderr.strip()[-300:]}")
    times: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    phases = times.pop("phases_s")
    return {name: at - began for name, at in times.items()} | {"phases_s": phases}


def _child(path: str) -> None:
    times: dict[str, Any] = {"python": time.time()}
    from graphengine import LLM, SamplingParams

    times["imported"] = time.time()
    llm = LLM(path, skip_tokenizer_init=True)
    times["ready"] = time.time()
    llm.generate(
        {"prompt_token_ids": [1] * 8},
        SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True),
    )
    times["first_token"] = time.time()
    print(json.dumps(times | {"phases_s": llm.startup_s}))
    llm.close()


if __name__ == "__main__":
    # No argparse: what it takes to import would count.
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m perf.startup MODEL_DIRECTORY", file=sys.stderr)
        print("one process of `graphengine perf run --workload startup`", file=sys.stderr)
        sys.exit(2)
    try:
        _child(sys.argv[1])
    except GraphEngineError as error:
        from graphengine.exit_codes import BAD_INPUT, tell  # nor these
        from graphengine.standard_streams import open_closed_streams

        open_closed_streams()
        tell(error)
        sys.exit(BAD_INPUT)
