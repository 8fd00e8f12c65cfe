"""Do kernels compile before they are wanted, side by side, and is nothing launched for that?"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import graphengine.build
import graphengine.model_runner
from captures import BucketLadder, Called, make_streams
from graphengine import LLM
from graphengine.kernels import kernels_for
from graphengine.kernels.ahead import compiled_ahead, expendable, is_rehearsal, launch
from graphengine.layers import DecoderLayer
from graphengine.model import DecoderModel, layers_to_try
from graphengine.model_runner import ModelRunner
from graphengine.prefill_graphs import PrefillGraphs
from graphengine.resolve import Resolved
from perf.shapes import SHAPES

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

# --- which steps are rehearsed


@pytest.mark.parametrize(
    ("windows", "tried"),
    [
        ([None], [0]),
        ([None, 64], [0, 1]),
        ([None] * 32, [0, 31]),
        ([512, None] * 4, [0, 1, 7]),
        ([512] * 5 + [None], [0, 5]),
        ([512] * 5 + [None] + [512] * 2, [0, 5, 7]),
        ([None, None, 64, 128, 64], [0, 2, 3, 4]),
    ],
)
def test_layers_to_try_prefill_by_each_window_and_end_as_the_whole_model(
    windows: list[int | None], tried: list[int]
) -> None:
    assert layers_to_try(windows) == tried


def test_model_of_few_layers_shares_what_it_has_with_the_whole_one() -> None:
    with LLM("demo", device="cpu", skip_tokenizer_init=True) as llm:
        model = llm._runner._model
        first, *_, last = layers = list(model.layers)
        assert len(layers) > 2
        few = model.of_few_layers()
        assert list(few.layers) == [first, last]
        assert list(model.layers) == layers
        assert few.embed_tokens is model.embed_tokens


LADDER = BucketLadder([4, 8])


def small_llm() -> LLM:
    return LLM(
        "demo",
        device="cpu",
        skip_tokenizer_init=True,
        max_num_seqs=6,
        max_num_batched_tokens=16,
        max_model_len=64,
    )


def prefill_graphs_of(runner: ModelRunner, *, captures: bool) -> PrefillGraphs:
    """Which a CPU's engine has not."""
    model, kv, streams = runner._model, runner._kv, runner._streams
    return PrefillGraphs(model, kv, streams, LADDER, captures=captures)


def test_trials_prefill_by_few_layers_and_leave_graphs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By an 8B's 32 layers they took a start 0.4 s, twice (perf/LOG.md)."""
    used: list[int] = []
    with small_llm() as llm:
        runner, layers = llm._runner, list(llm._runner._model.layers)
        begin = DecoderLayer.begin

        def watched(self: DecoderLayer, *args: Any, **options: Any) -> Any:
            if not options["decode"]:
                used.append(layers.index(self))
            return begin(self, *args, **options)

        runner._prefill_graphs = graphs = prefill_graphs_of(runner, captures=True)
        assert set(graphs._captured) == {4, 8}
        for bucket, pieces in graphs._captured.items():
            graphs._captured[bucket] = [Called(pytest.fail) for _ in pieces]
        monkeypatch.setattr(graphs, "prepare", pytest.fail)
        monkeypatch.setattr(DecoderLayer, "begin", watched)
        runner.run_largest_steps(llm._table, max_context=20)
        runner._run_null_prefills(llm._table, 5)  # padded to a bucket
        assert len(used) == 6
        assert set(used) == {0, len(layers) - 1}


def test_rehearsal_runs_every_bucket_and_each_kind_of_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decodes: list[int] = []
    prefills: list[tuple[list[int], list[int]]] = []
    made: list[tuple[bool, int]] = []
    decode_step, prefill = ModelRunner.decode_step, ModelRunner.prefill
    make_runner = graphengine.build._make_runner

    def watched_decode(self: ModelRunner, inputs: Any, outputs: Any) -> None:
        decodes.append(len(inputs["positions"]))
        decode_step(self, inputs, outputs)

    def watched_prefill(
        self: ModelRunner, tokens: Any, sequences: Any, batch: Any, *args: Any, **options: Any
    ) -> None:
        prefills.append((batch.starts.tolist(), batch.ends.tolist()))
        prefill(self, tokens, sequences, batch, *args, **options)

    def with_graphs(resolved: Resolved, model: DecoderModel, *args: Any) -> ModelRunner:
        made.append((resolved.config.enforce_eager, len(model.layers)))
        runner = make_runner(resolved, model, *args)
        runner._prefill_graphs = prefill_graphs_of(runner, captures=False)
        return runner

    with small_llm() as llm:
        monkeypatch.setattr(ModelRunner, "decode_step", watched_decode)
        monkeypatch.setattr(ModelRunner, "prefill", watched_prefill)
        monkeypatch.setattr(graphengine.build, "_make_runner", with_graphs)
        graphengine.build.rehearse(llm._resolved, kernels_for(CPU), None, make_streams(CPU))
        assert sorted(decodes) == list(llm._resolved.ladder.sizes)
    assert made == [(True, 2)]
    # The largest, the last chunk of a prompt, the smallest, and each bucket.
    assert prefills == [
        ([0] * 6, [3] * 4 + [2] * 2),
        ([48], [64]),
        ([0], [1]),
        ([0] * 4, [1] * 4),
        ([0] * 6, [2] * 2 + [1] * 4),
    ]


@pytest.mark.parametrize(
    ("is_ours", "largest"),
    [
        ([5, 6, 7, 8, 9, 10], 10),  # of 16: all larger ones are cuBLAS's
        ([16], 0),  # the largest of all is tried as it is
        ([], 0),
    ],
)
def test_largest_prefill_of_our_own_kernel_is_rehearsed(
    monkeypatch: pytest.MonkeyPatch, is_ours: list[int], largest: int
) -> None:
    monkeypatch.setattr(
        graphengine.model_runner,
        "gated_features",
        lambda rows, *sizes: 128 if rows in is_ours else None,
    )
    seen: list[int] = []
    with small_llm() as llm:
        monkeypatch.setattr(
            llm._runner, "_run_null_prefills", lambda table, num_tokens: seen.append(num_tokens)
        )
        llm._runner.run_all_kinds_of_steps(llm._table, max_context=20)
    left_to_cublas = 15 if 16 in is_ours else 0
    assert seen == [16, left_to_cublas, largest, 1]


# --- what compiles when


class AsyncCompileMode:
    """Stands in for Triton's, as far as it is used."""

    active: ContextVar[AsyncCompileMode | None] = ContextVar("active", default=None)

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def __enter__(self) -> None:
        AsyncCompileMode.active.set(self)


class Compiled:
    """What Triton compiled. `loads` counts what has been made to launch it."""

    def __init__(self) -> None:
        self.loads = 0

    def __getitem__(self, grid: tuple[int, ...]) -> None:
        self.loads += 1


class Kernel:
    """Stands in for a Triton kernel of one variant. As from Triton 3.7 on, its cache has it from
    when it begins to compile."""

    def __init__(self, compiles: Callable[[], Compiled] = Compiled) -> None:
        self.compiles = compiles
        self.num_launches = 0
        self.cache: Any = None
        self.threads: list[threading.Thread] = []

    def _compiled(self) -> Compiled:
        self.threads.append(threading.current_thread())
        return self.compiles()

    def warmup(self, *args: object, grid: tuple[int, ...], **options: object) -> Any:
        assert (args, grid, options) == ((1, 2), (3,), {"num_warps": 4})
        mode = AsyncCompileMode.active.get()
        assert mode is not None
        if self.cache is None:
            self.cache = mode.executor.submit(self._compiled)
        return self.cache

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launched(*args: object, **options: object) -> None:
            assert (args, grid, options) == ((1, 2), (3,), {"num_warps": 4})
            if self.cache is None:
                self.cache = self._compiled()
            if hasattr(self.cache, "result"):
                self.cache = self.cache.result()
            self.num_launches += 1

        return launched

    def launch(self) -> None:
        launch(self, (3,), 1, 2, num_warps=4)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Those that threads were set to; Triton and the GPU are not there."""
    devices: list[object] = []
    triton = SimpleNamespace(AsyncCompileMode=AsyncCompileMode)
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    return devices


@pytest.mark.usefixtures("devices")
def test_kernel_is_launched_outside_a_rehearsal_only() -> None:
    kernel = Kernel()
    kernel.launch()
    assert kernel.num_launches == 1
    with compiled_ahead(CPU, kernel.launch):
        kernel.launch()
    assert kernel.num_launches == 2


def test_kernels_compile_side_by_side_and_are_loaded_when_it_is_left(
    devices: list[object],
) -> None:
    together = threading.Barrier(4)
    may_go_on = threading.Event()

    def compiles() -> Compiled:
        assert may_go_on.wait(10)
        together.wait(10)
        return Compiled()

    kernels = [Kernel(compiles) for _ in range(20)]

    def steps() -> None:
        assert is_rehearsal()
        for kernel in kernels * 2:
            kernel.launch()

    with compiled_ahead(CPU, steps):
        assert not is_rehearsal()
        assert all(kernel.num_launches == 0 for kernel in kernels)
        may_go_on.set()
    assert [kernel.cache.result().loads for kernel in kernels] == [1] * 20
    assert all(len(kernel.threads) == 1 for kernel in kernels)
    assert not any(threading.main_thread() in kernel.threads for kernel in kernels)
    assert devices
    assert set(devices) == {CPU}


@pytest.mark.usefixtures("devices")
def test_engines_of_other_threads_launch_meanwhile() -> None:
    kernel = Kernel()

    def steps() -> None:
        thread = threading.Thread(target=kernel.launch)
        thread.start()
        thread.join()

    with compiled_ahead(CPU, steps):
        pass
    assert kernel.num_launches == 1


@pytest.mark.usefixtures("devices")
def test_error_of_a_compiler_is_raised_when_it_is_left() -> None:
    def fails() -> Compiled:
        raise SyntaxError("no such kernel")

    is_inside = False
    with (
        pytest.raises(SyntaxError, match="no such kernel"),
        compiled_ahead(CPU, Kernel(fails).launch),
    ):
        is_inside = True
    assert is_inside


@pytest.mark.usefixtures("devices")
def test_expendable_kernel_may_fail_to_compile() -> None:
    """Whoever launches it sees."""

    def fails() -> Compiled:
        raise SyntaxError("no such kernel")

    failing, needed = Kernel(fails), Kernel()

    def steps() -> None:
        with expendable():
            failing.launch()
        needed.launch()

    with compiled_ahead(CPU, steps):
        pass
    with expendable():  # of no rehearsal
        needed.launch()
    assert needed.num_launches == 1
    with pytest.raises(SyntaxError):
        failing.launch()


@pytest.mark.usefixtures("devices")
def test_what_failed_once_is_compiled_again() -> None:
    """Out of memory for a moment, or a compiler that a terminal's Ctrl-C has killed."""
    errors = [OSError("killed")]

    def fails_once() -> Compiled:
        if errors:
            raise errors.pop()
        return Compiled()

    kernel = Kernel(fails_once)
    with compiled_ahead(CPU, kernel.launch):
        pass
    assert len(kernel.threads) == 2
    kernel.launch()
    assert kernel.num_launches == 1


@pytest.mark.usefixtures("devices")
def test_error_inside_ends_it_and_the_next_start_is_as_any() -> None:
    """A bad weight file, or a user's Ctrl-C. What had not begun to compile is left; Triton's cache
    has it all the same."""
    has_failed = threading.Event()

    def waits() -> Compiled:
        has_failed.wait(10)
        return Compiled()

    kernels = [Kernel(waits) for _ in range(50)]

    def steps() -> None:
        for kernel in kernels:
            kernel.launch()

    def interrupted() -> None:
        threading.Timer(0.2, has_failed.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), compiled_ahead(CPU, steps):
        interrupted()
    assert not is_rehearsal()
    assert kernels[-1].threads == []
    with compiled_ahead(CPU, steps):
        pass
    steps()
    assert all(kernel.num_launches == 1 for kernel in kernels)


@pytest.mark.usefixtures("devices")
def test_error_of_the_steps_leaves_nothing_rehearsing() -> None:
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
    environment = {
        "HOME": home,
        "TRITON_CACHE_DIR": f"{home}/triton",
        "PYTHONUSERBASE": site.getuserbase(),
    }
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
