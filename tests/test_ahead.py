"""Do kernels compile before they are wanted, side by side, and is nothing launched for that?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import graphengine.build
from captures import make_streams
from graphengine import LLM
from graphengine.kernels.ahead import compiled_ahead, is_rehearsal, want
from graphengine.model import layers_to_try
from graphengine.model_runner import ModelRunner
from perf.shapes import SHAPES

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

# --- which steps are rehearsed


@pytest.mark.parametrize(
    ("windows", "tried"),
    [
        ([None], [0]),
        ([None] * 32, [0, 1]),
        ([512, None] * 4, [0, 1]),
        ([512] * 5 + [None], [0, 1, 5]),
        ([None, None, 64, 128, 64], [0, 1, 2, 3]),
    ],
)
def test_layers_to_try_hold_each_window_and_two(
    windows: list[int | None], tried: list[int]
) -> None:
    assert layers_to_try(windows) == tried


def test_model_of_few_layers_shares_what_it_has_with_the_whole_one() -> None:
    with LLM("demo", device="cpu", skip_tokenizer_init=True) as llm:
        model = llm._runner._model
        num_layers = len(model.layers)
        assert num_layers > 2
        few = model.of_few_layers()
        assert list(few.layers) == list(model.layers)[:2]
        assert len(model.layers) == num_layers
        assert few.embed_tokens is model.embed_tokens


def test_rehearsal_runs_every_bucket_and_each_kind_of_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decodes: list[int] = []
    prefills: list[tuple[list[int], list[int], int]] = []
    decode_step, prefill = ModelRunner.decode_step, ModelRunner.prefill

    def watched_decode(self: ModelRunner, inputs: Any, outputs: Any) -> None:
        decodes.append(len(inputs["positions"]))
        decode_step(self, inputs, outputs)

    def watched_prefill(
        self: ModelRunner, tokens: Any, sequences: Any, batch: Any, out: Any, *, trial: Any = None
    ) -> None:
        prefills.append((batch.starts.tolist(), batch.ends.tolist(), len(trial.layers)))
        prefill(self, tokens, sequences, batch, out, trial=trial)

    with LLM(
        "demo", device="cpu", max_num_seqs=6, max_num_batched_tokens=16, max_model_len=64
    ) as llm:
        monkeypatch.setattr(ModelRunner, "decode_step", watched_decode)
        monkeypatch.setattr(ModelRunner, "prefill", watched_prefill)
        graphengine.build.rehearse(llm._resolved, make_streams(CPU))
        assert set(decodes) == set(llm._resolved.ladder.sizes)
    assert prefills == [
        ([0] * 6, [3] * 4 + [2] * 2, 2),
        ([48], [64], 2),
        ([0], [1], 2),
    ]


# --- what compiles when


class AsyncCompileMode:
    """Stands in for Triton's, as far as it is used."""

    active: AsyncCompileMode | None = None

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def __enter__(self) -> None:
        AsyncCompileMode.active = self


class Compiled:
    """A kernel of Triton's; `loads` counts what has been made to launch it."""

    def __init__(self) -> None:
        self.loads = 0

    def __getitem__(self, grid: tuple[int, ...]) -> None:
        self.loads += 1


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], Future[Any]]]:
    """Has a kernel compiled as Triton's warmup does in that mode, by a function given."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(AsyncCompileMode=AsyncCompileMode))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def begin(compiles: Callable[[], Any]) -> Future[Any]:
        assert AsyncCompileMode.active is not None
        future = AsyncCompileMode.active.executor.submit(compiles)
        want(future)
        return future

    yield begin
    AsyncCompileMode.active = None


def test_kernels_compile_in_threads_and_are_loaded_when_it_is_left(begin: Any) -> None:
    kernels = [Compiled() for _ in range(20)]
    threads: set[threading.Thread] = set()
    may_go_on = threading.Event()

    def compiles(kernel: Compiled) -> Callable[[], Compiled]:
        def run() -> Compiled:
            may_go_on.wait(10)
            threads.add(threading.current_thread())
            return kernel

        return run

    def steps() -> None:
        assert is_rehearsal()
        for kernel in kernels:
            begin(compiles(kernel))

    with compiled_ahead(CPU, steps):
        assert not is_rehearsal()
        assert [kernel.loads for kernel in kernels] == [0] * 20
        may_go_on.set()
    assert [kernel.loads for kernel in kernels] == [1] * 20
    assert threading.current_thread() not in threads


def test_engines_of_other_threads_launch_meanwhile(begin: Any) -> None:
    seen: list[bool] = []

    def steps() -> None:
        thread = threading.Thread(target=lambda: seen.append(is_rehearsal()))
        thread.start()
        thread.join()

    with compiled_ahead(CPU, steps):
        pass
    assert seen == [False]


def test_error_of_a_compiler_is_raised_when_it_is_left(begin: Any) -> None:
    def fails() -> None:
        raise SyntaxError("no such kernel")

    is_inside = False
    with (
        pytest.raises(SyntaxError, match="no such kernel"),
        compiled_ahead(CPU, lambda: begin(fails)),
    ):
        is_inside = True
    assert is_inside


def test_error_inside_ends_it_without_compiling_what_has_not_begun(begin: Any) -> None:
    """A bad weight file, or a user's Ctrl-C, is told at once; and the next start is as any."""
    futures: list[Future[Any]] = []
    has_failed = threading.Event()

    def waits() -> Compiled:
        has_failed.wait(10)
        return Compiled()

    def interrupted() -> None:
        threading.Timer(0.2, has_failed.set).start()
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        compiled_ahead(CPU, lambda: futures.extend(begin(waits) for _ in range(50))),
    ):
        interrupted()
    assert futures[-1].cancelled()
    assert not is_rehearsal()


def test_error_of_the_steps_leaves_nothing_rehearsing(begin: Any) -> None:
    def steps() -> None:
        raise MemoryError("too large")

    with pytest.raises(MemoryError, match="too large"), compiled_ahead(CPU, steps):
        pytest.fail("went on")
    assert not is_rehearsal()


# --- on a GPU

# Prints which threads compiled, and what compiled after the start.
FIRST_START = """
    import json, sys, threading
    import graphengine.kernels.nvrtc as nvrtc
    import triton
    from graphengine import LLM, SamplingParams

    compiled = []
    def note(name):
        compiled.append((name, threading.current_thread() is threading.main_thread()))
    def listener(*, src, **rest):
        note(src.name)
    triton.knobs.compilation.listener = listener
    compile_source = nvrtc.compile_source
    def watched(source, name, *rest):
        note(name)
        return compile_source(source, name, *rest)
    nvrtc.compile_source = watched
    prompts = [
        {"prompt_token_ids": [(7 * i + j) % 500 + 3 for j in range(1 + 37 * i % 900)]}
        for i in range(300)
    ]
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=3, max_tokens=30, ignore_eos=True)
    with LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, max_num_seqs=256,
             max_model_len=2048, gpu_memory_utilization=0.5) as llm:
        at_start = len(compiled)
        outputs = llm.generate(prompts, params) + llm.generate(prompts[:3], params)
    print(json.dumps({"compiled": compiled, "late": compiled[at_start:]}))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["qwen3-0.6b", "llama-8b"])
def test_first_start_compiles_all_there_is_to_launch_and_in_threads(
    tmp_path: Path, shape: str
) -> None:
    path = tmp_path / shape
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPES[shape] | {"num_hidden_layers": 3}))
    home = str(tmp_path)
    environment = {"HOME": home, "TRITON_CACHE_DIR": f"{home}/triton"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FIRST_START), str(path)],
        cwd=ROOT,
        env=dict(os.environ) | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found["compiled"]) > 15
    assert found["late"] == []
    assert [name for name, is_main in found["compiled"] if is_main] == []
