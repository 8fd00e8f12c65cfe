"""Does an engine start with no more than it needs, in an order that wastes no time?"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graphengine import LLM, SamplingParams, cuda_context
from graphengine.build import context_to_try
from graphengine.config import EngineConfig
from graphengine.cuda_context import EarlyContext
from graphengine.model_runner import Launched
from graphengine.scheduler import PrefillBatch
from graphengine.sequence_table import SequenceTable

ROOT = Path(__file__).parents[1]


def run_fresh(code: str) -> str:
    """What a process of its own prints, in which nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_engine_for_token_ids_imports_no_transformers() -> None:
    """Nor what torch loads for torch.compile: each takes as long as the rest together."""
    printed = run_fresh(
        """
        import sys
        from graphengine import LLM, SamplingParams
        with LLM("demo", device="cpu", skip_tokenizer_init=True) as llm:
            llm.generate({"prompt_token_ids": [1, 5]}, SamplingParams(max_tokens=3))
        print({"transformers", "torch._dynamo", "sympy"} & set(sys.modules))
        """
    )
    assert printed == "set()"


def test_bad_model_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    printed = run_fresh(
        f"""
        import sys
        from graphengine import LLM, GraphEngineError
        try:
            LLM({str(tmp_path)!r})
        except GraphEngineError as error:
            print("GPT2LMHeadModel" in str(error), "torch" in sys.modules)
        """
    )
    assert printed == "True False"


def test_context_of_the_gpu_is_begun_before_torch_is_imported() -> None:
    printed = run_fresh(
        """
        import sys
        import graphengine.engine

        class Context:
            def __init__(self): print("begun", "torch" in sys.modules)
            def release(self): print("released", "torch" in sys.modules)

        graphengine.engine.EarlyContext = Context
        graphengine.engine.LLM("demo", skip_tokenizer_init=True).close()
        graphengine.engine.LLM("demo", skip_tokenizer_init=True, device="cpu").close()
        try:
            graphengine.engine.LLM("demo", tokenizer="/nowhere")
        except graphengine.errors.ModelError:
            print("failed")
        """
    )
    assert printed.split("\n") == [
        "begun False",
        "released True",
        "begun True",
        "released True",
        "failed",
    ]


def test_phases_of_a_start_tell_imports_apart() -> None:
    printed = run_fresh(
        """
        from graphengine import LLM
        with LLM("demo", device="cpu", skip_tokenizer_init=True) as llm:
            phases = llm.startup_s
            print(*phases)
            print(phases["imports"] > 0.5 * sum(phases.values()))
        """
    )
    assert printed.split("\n") == [
        "config imports device tokenizer weights memory graphs",
        "True",
    ]


# --- the early context


class Driver:
    """Stands in for libcuda: device 0 has the handle 7. fails: the function that gives an error."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: object) -> int:
            if name == "cuDeviceGet":
                target = args[0]._obj  # type: ignore[attr-defined]
                target.value = 7
            handles = [str(arg.value) for arg in args if isinstance(arg, ctypes.c_int)]
            self.calls.append(" ".join([name, *handles]))
            return int(name == self.fails)

        return call


MADE = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain 7"]


@pytest.mark.parametrize(
    ("fails", "calls"),
    [
        ("", [*MADE, "cuDevicePrimaryCtxRelease_v2 7"]),
        ("cuInit", MADE[:1]),
        ("cuDeviceGet", MADE[:2]),
        ("cuDevicePrimaryCtxRetain", MADE),
    ],
)
def test_context_is_held_once_and_given_up_if_it_was_made(
    monkeypatch: pytest.MonkeyPatch, fails: str, calls: list[str]
) -> None:
    driver = Driver(fails)
    monkeypatch.setattr(cuda_context.ctypes, "CDLL", lambda name: driver)
    context = EarlyContext()
    context.release()
    context.release()
    assert driver.calls == calls


def test_machine_without_a_driver_has_no_early_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_context, "_DRIVER", "libno-such-driver.so")
    EarlyContext().release()


@pytest.mark.gpu
def test_driver_makes_the_context_that_torch_uses() -> None:
    printed = run_fresh(
        """
        import ctypes
        from graphengine.cuda_context import EarlyContext

        def is_active():
            active, flags = ctypes.c_int(), ctypes.c_uint()
            driver = ctypes.CDLL("libcuda.so.1")
            assert driver.cuDevicePrimaryCtxGetState(
                0, ctypes.byref(flags), ctypes.byref(active)) == 0
            return bool(active.value)

        unused = EarlyContext()
        unused._thread.join()
        print(is_active())
        unused.release()
        print(is_active())
        used = EarlyContext()
        import torch
        x = torch.ones(3, device="cuda")
        used.release()
        print(is_active(), x.sum().item())
        """
    )
    assert printed.split("\n") == ["True", "False", "True 3.0"]


def test_two_engines_of_one_process_start_and_close() -> None:
    """The second finds torch imported, and a context where there is a GPU."""
    for _ in range(2):
        with LLM("demo", skip_tokenizer_init=True) as llm:
            assert set(llm.startup_s) >= {"imports", "device"}


def test_measured_process_imports_torch_when_a_users_would() -> None:
    """It took torch's import to come before the engine, and the context of the GPU after it."""
    assert run_fresh("import sys, perf.startup; print('torch' in sys.modules)") == "False"


# --- the largest steps


@pytest.mark.parametrize(
    ("name", "max_model_len", "tried"),
    [
        ("flash", 131072, 8192 + 256),
        ("flash", 4096, 4096),
        ("reference", 131072, 131072),
        ("another", 131072, 131072),
    ],
)
def test_context_is_tried_whole_unless_attention_reads_it_in_place(
    name: str, max_model_len: int, tried: int
) -> None:
    resolved = SimpleNamespace(
        attention=SimpleNamespace(name=name),
        max_model_len=max_model_len,
        block_size=256,
        config=EngineConfig("demo"),
    )
    assert context_to_try(resolved) == tried  # type: ignore[arg-type]


def test_largest_steps_hold_a_chunk_with_context_and_leave_no_trace() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8)
    with LLM(
        "demo", device="cpu", max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64
    ) as llm:
        runner = llm._runner
        before = llm.generate("12+34=", params)[0].outputs[0].token_ids
        seen: list[tuple[list[int], list[int]]] = []
        launch = runner._launch_prefill

        def watched(batch: PrefillBatch, table: SequenceTable, **options: Any) -> Launched:
            seen.append((batch.starts.tolist(), batch.ends.tolist()))
            return launch(batch, table, **options)

        runner._launch_prefill = watched  # type: ignore[method-assign]
        runner.run_largest_steps(llm._table, max_context=20)
        runner._launch_prefill = launch  # type: ignore[method-assign]
        assert seen == [([0] * 4, [4] * 4), ([4], [20])]
        assert llm.generate("12+34=", params)[0].outputs[0].token_ids == before
