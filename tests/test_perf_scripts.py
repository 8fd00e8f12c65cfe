"""Does a measuring script refuse what it cannot take before it measures, and end in one line?"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import perf.engine_figures
import perf.host_loop
from graphengine import LLM

# Arguments, of which OUT is where the result goes, and what is said of them.
REFUSED = {
    "repeats": ("host_loop --repeats 0", "--repeats is 0; give 1 or more"),
    "shape": ("host_loop --shape qwen3-0.6b", "--shape is qwen3-0.6b, which needs a GPU"),
    "new tokens": ("engine_figures --shape tiny --new 0", "--new is 0; give 1 or more"),
    "mode": ("engine_figures --shape tiny --modes async,x", "no mode 'x'; choose from async, sync"),
    "load": ("engine_figures --shape tiny x", "no part 'x'; choose from decode-8b, "),
    "real shapes": ("engine_figures host", "--shape is qwen3-0.6b, which needs a GPU"),
    "no rows": ("job_overhead --rows 0 OUT", "--rows is 0; give 1 or more"),
    "fewer rows": ("job_overhead --rows -3 OUT", "--rows is -3; give 1 or more"),
    "no turns": ("job_overhead --repeats 0 OUT", "--repeats is 0; give 1 or more"),
    "no prompt": ("job_overhead --prompt-tokens 0 OUT", "--prompt-tokens is 0; give 1 or more"),
    "real rows": ("job_overhead --shape llama-8b OUT", "--shape is llama-8b, which needs a GPU"),
    "rows of GPUs": ("jobs_gpus --device cpu --shape demo --rows 0 OUT", "--rows is 0; give 1 or"),
    "workers": ("jobs_gpus --workers-list 1,a OUT", "--workers-list holds 'a'; give numbers"),
    "no workers": ("jobs_gpus --workers-list 0 OUT", "--workers-list holds '0'; give numbers"),
    "kill one": ("jobs_gpus --workers-list 2,1 --kill OUT", "--kill needs a second worker"),
    "GPUs": ("jobs_gpus OUT", "no GPU: torch sees no CUDA device; give --device cpu --shape demo"),
    "rows on a CPU": ("jobs_gpus --device cpu OUT", "--shape is qwen3-0.6b, which needs a GPU"),
    "kills": ("jobs_kill --kills -1 OUT", "--kills is -1; give 1 or more"),
    "no memory": ("jobs_memory --rows 0 0 OUT", "--rows is 0; give 1 or more"),
    "chart": ("jobs_memory --chart no/c.png OUT", "--chart no/c.png: no directory no; make it"),
    "kind of chart": ("jobs_memory --chart c.x OUT", "--chart is c.x; give a name that ends in"),
    "part": ("prefill_figures check x", "no part 'x'; choose from check, chunk, attention"),
    "prefills": ("prefill_figures check", "no GPU: torch sees no CUDA device; "),
    "point": ("step_breakdown --shape tiny --point 3", "--point is '3'; give rows x context"),
    "kernels": ("step_breakdown --shape tiny --point 3x4", "no GPU: torch sees no CUDA device; "),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_scripts_say_what_they_do_not_take_before_they_measure(
    arguments: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A traceback, some after all was measured, or another shape than was asked for."""

    def measured(*arguments: Any, **options: Any) -> None:
        raise AssertionError("measured")

    name, *options = arguments.replace("OUT", f"--output {tmp_path / 'r.json'}").split()
    module = importlib.import_module(f"perf.{name}")
    monkeypatch.setattr(LLM, "__init__", measured)
    monkeypatch.setattr(subprocess, "Popen", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {words}")
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_closed_standard_output_is_no_reason_for_a_traceback() -> None:
    command = ["sh", "-c", 'exec "$0" -m perf.host_loop --repeats 0 >&-', sys.executable]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --repeats is 0; give 1 or more\n"


def test_modes_are_compared_by_their_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(perf.engine_figures, "PARTS", {"small": ("tiny", 3, 20, 5)})
    monkeypatch.setattr(sys, "argv", ["engine_figures"])
    perf.engine_figures.main()
    found = json.loads(capsys.readouterr().out)["small"]
    assert found["rows_that_differ"] == {"async": 0, "sync": 0, "eager": 0}
    assert (found["rows"], found["distinct_outputs"]) == (3, 3)
    tokens = {"async": [[1, 2], [3, 4], [3, 4]], "eager": [[1, 2], [3, 5], [4, 4]]}
    assert perf.engine_figures.compared(tokens) == {
        "rows_that_differ": {"async": 0, "eager": 2},
        "distinct_outputs": 2,
    }


def test_host_loop_says_that_it_tells_the_fastest_repeat_and_the_median_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fastest passed for what a step takes."""
    times = iter([0.3, 0.2, 0.5])

    def made_up(*arguments: Any, **options: Any) -> dict[str, float]:
        return {"host_ms_per_decode_step": next(times)}

    monkeypatch.setattr(perf.host_loop, "measure", made_up)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        perf.host_loop, "LLM", lambda *arguments, **options: SimpleNamespace(close=int)
    )
    monkeypatch.setattr(perf.host_loop, "without_model", lambda llm: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda num: None)
    monkeypatch.setattr(sys, "argv", ["host_loop", "--load", "steady"])
    perf.host_loop.main()
    found = json.loads(capsys.readouterr().out)
    assert found["reported"] == "the fastest of 3 repeats"
    assert found["host_ms_per_decode_step"] == 0.2
    assert found["median_host_ms_per_decode_step"] == 0.3
    assert found["host_ms_per_decode_step_of_repeats"] == [0.3, 0.2, 0.5]


STARTS = {
    "nothing": ([], "usage: python -m perf.startup MODEL_DIRECTORY"),
    "help": (["--help"], "perf run --workload startup"),
    "no model": (["/nonexist"], "error: no directory '/nonexist'; give a model directory"),
}


@pytest.mark.parametrize(("arguments", "words"), STARTS.values(), ids=STARTS)
def test_measured_start_says_what_it_does_not_take(arguments: list[str], words: str) -> None:
    """A traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "perf.startup", *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
