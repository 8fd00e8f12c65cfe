"""Is each product's fastest way found, kept and found again? Trials by a model on the CPU."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

import graphengine.build
import graphengine.jobs.job
import graphengine.tuning_file
import graphengine.tuning_trial
from captures import BucketLadder, CpuStreams
from cli import app
from graphengine import LLM, SamplingParams
from graphengine.config import EngineConfig
from graphengine.errors import ConfigError
from graphengine.jobs.config import JobConfig
from graphengine.jobs.job import run_job
from graphengine.jobs.output import Place
from graphengine.kernels import reference
from graphengine.kernels.tiles import Tiles, WideTiles
from graphengine.kernels.ways import (
    MAX_TUNED_ROWS,
    GatedTiles,
    Means,
    Product,
    Way,
    name_of,
    rule,
    ways,
)
from graphengine.model import DecoderModel
from graphengine.tuning_file import Choices, file_in, locked, read, write
from graphengine.tuning_trial import choose, error_of, products_to_tune, try_all, tune
from perf.shapes import SHAPES


def small_llm(folder: Path, *, bias: bool = False) -> LLM:
    shape = SHAPES["tiny"] | {"attention_bias": bias, "mlp_bias": bias}
    path = folder / f"model-{bias}"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(shape))
    return LLM(
        str(path),
        device="cpu",
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=6,
        max_model_len=64,
    )


HOPPER = Means(triton=True, tma=True, gated=True)
AMPERE = Means(triton=True, tma=False, gated=False)
# (E, I, H, K, D) of Llama 3.2 1B and 3B, 3.1 8B; Qwen3 0.6B, 1.7B, 4B, 14B; Qwen2.5 7B.
MODELS = (
    (2048, 8192, 32, 8, 64),
    (3072, 8192, 24, 8, 128),
    (4096, 14336, 32, 8, 128),
    (1024, 3072, 16, 8, 128),
    (2048, 6144, 16, 8, 128),
    (2560, 9728, 32, 8, 128),
    (5120, 17408, 40, 8, 128),
    (3584, 18944, 28, 4, 128),
)


def products_of_shapes(rows: tuple[int, ...]) -> Iterator[Product]:
    for e, i, h, k, d in MODELS:
        for num_rows in rows:
            yield Product(num_rows, (h + 2 * k) * d, e, silu=False)
            yield Product(num_rows, e, h * d, silu=False)
            yield Product(num_rows, e, i, silu=False)
            yield Product(num_rows, i, e, silu=True)


# --- ways


@pytest.mark.parametrize("means", [HOPPER, AMPERE], ids=["hopper", "ampere"])
def test_ways_divide_their_product_and_are_told_apart(means: Means) -> None:
    seen = 0
    for product in products_of_shapes((1, 16, 40, 64, 80, 128, 192, 256)):
        found = ways(product, means)
        assert next(iter(found.values())) == rule(product, means)
        assert len(set(found.values())) == len(found), "a way twice"
        assert {name_of(way): way for way in found.values()} == found
        assert None in found.values(), "cuBLAS is always one"
        for way in found.values():
            if way == rule(product, means):
                continue
            if isinstance(way, (Tiles, WideTiles)):
                assert product.depth // way.splits >= 512
                assert product.num_features % way.block_f == 0
                assert product.depth % (way.splits * way.block_c) == 0
                assert way.splits == 1 or not product.silu
            if isinstance(way, WideTiles):
                assert means.tma
                row_tiles = math.ceil(product.num_rows / way.block_n)
                programs = product.num_features // way.block_f * way.splits * row_tiles
                assert 88 <= programs <= 132, "one wave"
                assert way.num_stages >= 4
                both = 2 if product.silu else 1
                stage = 2 * way.block_c * (way.block_n + both * way.block_f)
                assert way.num_stages * stage <= 220 << 10, "more shared memory than there is"
            if isinstance(way, GatedTiles):
                assert product.silu
                assert product.num_rows > 64
        seen += len(found)
    assert seen > 400


def test_products_of_no_dtype_for_triton_have_cublas_alone() -> None:
    product = Product(64, 4096, 4096, silu=False)
    assert ways(product, Means(triton=False, tma=False, gated=False)) == {"cublas": None}


def test_products_are_those_of_steps_that_run_without_the_chain(tmp_path: Path) -> None:
    with small_llm(tmp_path) as llm:
        config = llm._resolved.model_config
        ladder = BucketLadder([1, 8, 32, 40, 256, 512])
        products = products_to_tune(config, ladder, num_chained=32)
        assert {product.num_rows for product in products} == {40, MAX_TUNED_ROWS}
        assert sum(product.silu for product in products) == 2
        every = products_to_tune(config, ladder, num_chained=0)
        assert {product.num_rows for product in every} == {1, 8, 32, 40, 256}


# --- trials


class Table:
    """TunedKernels on the CPU, whose ways are what the tests make them."""

    def __init__(self, seconds: Mapping[Way, float], wrong: tuple[Way, ...] = ()) -> None:
        self.ways: dict[Product, Way] = {}
        self.seconds, self.wrong = seconds, wrong
        self.calls: list[tuple[Product, Way]] = []
        for name in ("rms_norm", "add_rms_norm", "rope_and_cache", "add_linear", "decode_chain"):
            setattr(self, name, getattr(reference, name))

    def _run(self, out: Tensor, product: Product) -> Tensor:
        way = self.ways.get(product, "none")
        if way == "none":
            return out
        if way == FAILING:
            raise RuntimeError("out of resource: shared memory")
        self.calls.append((product, way))  # type: ignore[arg-type]
        time.sleep(self.seconds.get(way, 0.0))  # type: ignore[call-overload]
        return out * 1.1 if way in self.wrong else out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        product = Product(x.shape[0], *weight.shape, silu=False)  # type: ignore[misc]
        return self._run(reference.linear(x, weight, bias, **options), product)

    def linear_silu_mul(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, decode: bool = False
    ) -> Tensor:
        product = Product(x.shape[0], weight.shape[0] // 2, weight.shape[1], silu=True)
        return self._run(reference.linear_silu_mul(x, weight, bias, decode=decode), product)


SLOW, FAST, WRONG = Tiles(1, 1, 1, 1), Tiles(2, 2, 1, 1), Tiles(3, 3, 1, 1)
FAILING = Tiles(4, 4, 1, 1)
NAMED: dict[str, Way] = {
    "rule": None,
    "slow": SLOW,
    "failing": FAILING,
    "fast": FAST,
    "wrong": WRONG,
}
SECONDS: dict[Way, float] = {None: 0.004, SLOW: 0.008, FAST: 0.0, WRONG: 0.0}


def tried(llm: LLM, kernels: Table) -> DecoderModel:
    model = llm._runner._model
    for layer in model.layers:
        layer._kernels = kernels
    return model


def test_fastest_right_way_is_found_for_each_product(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = Table(SECONDS, wrong=(WRONG,))
    with small_llm(tmp_path) as llm:
        model = tried(llm, kernels)
        products = products_to_tune(model.config, BucketLadder([2, 4]), num_chained=0)
        assert len(products) == 2 * len({str(p).partition("x")[2] for p in products})
        named = dict.fromkeys(products, NAMED)
        named[products[-1]] = {"first": FAST, "slow": SLOW}
        found = tune(model, kernels, named, CpuStreams())  # type: ignore[arg-type]
    assert found == {**dict.fromkeys(products, "fast"), products[-1]: "first"}
    assert kernels.ways == {}, "a trial's ways are its own"
    for what in ("wrong", "failing"):
        told = [line for line in caplog.messages if line.startswith(f"{what} of ")]
        assert len(told) == len(products) - 1


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_wrong_way_is_noticed_in_every_product(bias: bool, tmp_path: Path) -> None:
    with small_llm(tmp_path, bias=bias) as llm:
        for wrong in ((), (WRONG,)):
            kernels = Table({}, wrong=wrong)
            model = tried(llm, kernels)
            for product in products_to_tune(model.config, BucketLadder([4]), num_chained=0):
                kernels.ways[product] = WRONG
                error = error_of(model, kernels, product)  # type: ignore[arg-type]
                assert (error > 0.02) == bool(wrong)


def test_every_way_is_rehearsed_once(tmp_path: Path) -> None:
    kernels = Table({})
    with small_llm(tmp_path) as llm:
        model = tried(llm, kernels)
        products = products_to_tune(model.config, BucketLadder([2]), num_chained=0)
        try_all(model, kernels, dict.fromkeys(products, NAMED))  # type: ignore[arg-type]
    run = [way for way in NAMED.values() if way != FAILING]
    # In two layers, so that a product's sums meet the norm of the next.
    assert kernels.calls == [(p, way) for p in products for way in run for _ in range(2)]
    assert kernels.ways == {}


def test_product_of_one_way_is_not_timed(tmp_path: Path) -> None:
    kernels = Table({})
    with small_llm(tmp_path) as llm:
        model = tried(llm, kernels)
        products = products_to_tune(model.config, BucketLadder([2]), num_chained=0)
        named: dict[Product, Mapping[str, Way]] = {key: {"only": None} for key in products}
        found = tune(model, kernels, named, CpuStreams())  # type: ignore[arg-type]
    assert found == dict.fromkeys(products, "only")
    assert kernels.calls == []


def test_rule_that_fails_ends_the_start(tmp_path: Path) -> None:
    kernels = Table({})
    with small_llm(tmp_path) as llm:
        model = tried(llm, kernels)
        products = products_to_tune(model.config, BucketLadder([2]), num_chained=0)
        named: dict[Product, Mapping[str, Way]] = {products[0]: {"rule": FAILING, "fast": FAST}}
        with pytest.raises(RuntimeError, match="shared memory"):
            tune(model, kernels, named, CpuStreams())  # type: ignore[arg-type]
    assert kernels.ways == {}


def test_memory_that_runs_out_leaves_the_rest_to_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Table({})
    made = graphengine.tuning_trial._Trial

    def trial(model: DecoderModel, kernels: Any, num_rows: int) -> Any:
        if num_rows == 4:
            raise torch.OutOfMemoryError
        return made(model, kernels, num_rows)

    monkeypatch.setattr(graphengine.tuning_trial, "_Trial", trial)
    with small_llm(tmp_path) as llm:
        model = tried(llm, kernels)
        products = products_to_tune(model.config, BucketLadder([2, 4]), num_chained=0)
        named: dict[Product, Mapping[str, Way]] = {key: {"rule": None} for key in products}
        found = tune(model, kernels, named, CpuStreams())  # type: ignore[arg-type]
        try_all(model, kernels, named)  # type: ignore[arg-type]
    assert {product.num_rows for product in found} == {2}


def test_trial_is_two_layers_from_the_same_start_with_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Table({})
    plans: list[int] = []
    monkeypatch.setattr(
        DecoderModel, "plan", lambda self, data: plans.append(len(data.context_lens))
    )
    with small_llm(tmp_path) as llm:
        model = tried(llm, kernels)
        trial = graphengine.tuning_trial._Trial(model, kernels, 3)  # type: ignore[arg-type]
        product = products_to_tune(model.config, BucketLadder([3]), num_chained=0)[0]
        kernels.ways[product] = None
        results = []
        for _ in range(2):
            trial.step()
            results.append(trial._residual.clone())
    assert torch.equal(*results)
    assert plans == [3, 3]
    assert len(kernels.calls) == 2 * 2


def test_cache_of_a_trial_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_llm(tmp_path) as llm:
        model = llm._runner._model
        monkeypatch.setattr(graphengine.tuning_trial, "_MOST_CACHE_BYTES", 2**17)
        trial = graphengine.tuning_trial._Trial(model, Table({}), 64)  # type: ignore[arg-type]
        assert trial._k_cache.nbytes + trial._v_cache.nbytes <= 2**17
        assert int(trial._metadata.block_tables.max()) < len(trial._k_cache)
        trial.step()


def test_what_gains_little_leaves_the_rule() -> None:
    assert choose({"rule": 1.0, "a": 0.995, "b": 1.2}) == "rule"
    assert choose({"rule": 1.0, "a": 0.98, "b": 0.97}) == "b"
    assert choose({"rule": 1.0}) == "rule"


# --- files

A, B = Product(8, 64, 32, silu=False), Product(8, 64, 32, silu=True)
ALL: dict[Product, Mapping[str, Way]] = {A: NAMED, B: NAMED}
MADE_FOR = {"card": "none"}


def choices_of(own: Path | None = None, cache: Path | None = None) -> Choices:
    return Choices(ALL, MADE_FOR, own=own, cache=cache)


def never(missing: object) -> Mapping[Product, str]:
    raise AssertionError("measured twice")


def test_what_was_found_is_found_again(tmp_path: Path) -> None:
    path = file_in(tmp_path / "new", MADE_FOR)
    choices = choices_of(cache=path)
    assert choices.missing == ALL
    choices.complete(lambda missing: {A: "fast", B: "rule"})
    assert choices.chosen == {A: FAST, B: None}
    assert json.loads(path.read_text())["made_for"] == MADE_FOR
    again = choices_of(cache=path)
    assert again.missing == {}
    assert again.chosen == choices.chosen
    again.complete(never)


def test_own_folder_goes_before_the_cache_and_gets_what_it_lacks(tmp_path: Path) -> None:
    own, cache = tmp_path / "own.json", tmp_path / "cache.json"
    write(own, {}, {str(A): "slow", "1x2x3": "kept"})
    write(cache, {}, {str(A): "fast", str(B): "fast"})
    choices = choices_of(own, cache)
    choices.complete(never)
    assert choices.chosen == {A: SLOW, B: FAST}
    assert read(own) == {str(A): "slow", str(B): "fast", "1x2x3": "kept"}
    assert read(cache) == {str(A): "fast", str(B): "fast"}


def test_cache_gets_what_was_measured_here_alone(tmp_path: Path) -> None:
    """Not what a folder brings from another card."""
    own, cache = tmp_path / "own.json", tmp_path / "cache.json"
    write(own, {}, {str(A): "slow"})
    choices_of(own, cache).complete(lambda missing: dict.fromkeys(missing, "fast"))
    assert read(cache) == {str(B): "fast"}
    assert read(own) == {str(A): "slow", str(B): "fast"}


def test_what_another_has_written_meanwhile_goes_before_what_was_found(tmp_path: Path) -> None:
    own = tmp_path / "own.json"

    def find(missing: Mapping[Product, object]) -> Mapping[Product, str]:
        write(own, {}, {str(A): "slow"})
        return dict.fromkeys(missing, "fast")

    choices = choices_of(own, tmp_path / "cache.json")
    choices.complete(find)
    assert choices.chosen == {A: SLOW, B: FAST}
    assert read(own) == {str(A): "slow", str(B): "fast"}


def test_own_file_that_came_meanwhile_goes_before_the_cache(tmp_path: Path) -> None:
    """Another machine, whose cache says otherwise, began with the same folder."""
    own = tmp_path / "own.json"
    for name in ("fast", "slow"):
        write(tmp_path / f"{name}.json", {}, {str(A): name, str(B): name})
    one, other = (choices_of(own, tmp_path / f"{name}.json") for name in ("fast", "slow"))
    for choices in (one, other):
        choices.complete(never)
        assert choices.chosen == {A: FAST, B: FAST}
    assert read(own) == {str(A): "fast", str(B): "fast"}


def test_two_that_complete_one_file_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, lock = tmp_path / "own.json", filelock.FileLock(tmp_path / "own.json.lock")
    write(tmp_path / "cache.json", {}, {str(A): "fast", str(B): "fast"})
    held: list[bool] = []
    write_ = graphengine.tuning_file.write

    def watched(path: Path, *arguments: Any) -> None:
        with pytest.raises(filelock.Timeout):
            lock.acquire(timeout=0)
        held.append(True)
        write_(path, *arguments)

    monkeypatch.setattr(graphengine.tuning_file, "write", watched)
    choices_of(own, tmp_path / "cache.json").complete(never)
    assert held == [True]
    assert read(own) == {str(A): "fast", str(B): "fast"}


def test_what_is_not_found_has_no_way_and_is_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    choices = choices_of(cache=path)
    choices.complete(lambda missing: {A: "fast"})
    assert choices.chosen == {A: FAST}
    asked: list[Product] = []
    choices_of(cache=path).complete(lambda missing: (asked.extend(missing), {})[1])
    assert asked == [B]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"ways": 3}', '{"ways": {"8x64x32": "no such way"}}', "\xff"),
        *("[" * 200_000, '{"ways": {"8x64x32": "slow"}}' + " " * 2**20),
    ],
    ids=str.__len__,
)
def test_damaged_file_is_as_good_as_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("latin-1"))
    choices = choices_of(cache=path)
    assert choices.missing == ALL
    choices.complete(lambda missing: dict.fromkeys(missing, "fast"))
    assert choices_of(cache=path).chosen == {A: FAST, B: FAST}


def test_folder_that_cannot_be_written_costs_no_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    own = tmp_path / "own.json"
    for _ in range(2):
        choices = choices_of(own, tmp_path / "file" / "a.json")
        choices.complete(lambda missing: dict.fromkeys(missing, "fast"))
        assert choices.chosen == {A: FAST, B: FAST}
    assert len(caplog.messages) == 1, "told where something was lost"
    assert "cannot be written" in caplog.text


def test_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write(path, {}, {"a": "b"})
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def full(self: Path, *_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write(path, {}, {"a": "c"})
    assert read(path) == {"a": "b"}
    assert list(tmp_path.iterdir()) == [path]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _complete(own: Path, cache: Path, name: str, results: Any) -> None:
    choices = choices_of(own, cache)
    choices.complete(lambda missing: (time.sleep(0.5), dict.fromkeys(missing, name))[1])
    results.put([str(way) for way in choices.chosen.values()])


def test_processes_that_start_together_choose_alike(tmp_path: Path) -> None:
    """Also on two kinds of cards, whose caches are two."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    own = tmp_path / "own.json"
    processes = [
        context.Process(target=_complete, args=(own, tmp_path / cache, name, results))
        for cache, name in (("1.json", "fast"), ("1.json", "slow"), ("2.json", "wrong"))
    ]
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    (name,) = set(read(own).values())
    assert seen == [[str(NAMED[name])] * 2] * 3


def test_lock_that_cannot_be_had_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with locked(tmp_path / "file" / "a.json"):
        pass
    monkeypatch.setattr(graphengine.tuning_file, "_LOCK_TIMEOUT_S", 0.1)
    with filelock.FileLock(tmp_path / "b.json.lock"), locked(tmp_path / "b.json"):
        pass

    def none(self: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "__enter__", none)
    with locked(tmp_path / "c.json"):
        pass


def test_files_of_two_cards_are_two(tmp_path: Path) -> None:
    assert file_in(tmp_path, {"a": 1, "b": 2}) == file_in(tmp_path, {"b": 2, "a": 1})
    assert file_in(tmp_path, {"a": 1, "b": 2}) != file_in(tmp_path, {"a": 1, "b": 3})


# --- options


@pytest.mark.parametrize("value", ["", 3, None, "Off", "AUTO ", "none", "on", "true"])
def test_senseless_tuning_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"tuning is .*; give auto, off or a folder"):
        LLM("demo", tuning=value)


@pytest.mark.parametrize("value", ["~nosuchuser/x", "x" * 300, "a\0b", f"{__file__}/x"])
def test_tuning_that_can_be_no_folder_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"which is no folder .*; give auto, off or a folder"):
        EngineConfig("demo", tuning=value)


@pytest.mark.parametrize("command", ["generate", "run"])
def test_commands_hand_it_on(command: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text('{"prompt": "1+1="}\n')
    arguments = {"generate": ["demo", "1+1="], "run": ["demo", str(file), "--output", "o.jsonl"]}
    result = CliRunner().invoke(app, [command, *arguments[command], "--tuning", str(file)])
    assert result.exit_code == 2
    assert "which is a file; give auto, off or a folder" in result.output


def test_folder_among_a_jobs_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written there would be input when the job goes on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text('{"prompt": "1+1="}\n')
    for source, folder in (("in", "in"), ("in", "in/ways"), ("in/*.json", "in")):
        arguments = ["run", "demo", source, "--output", "o.jsonl", "--tuning", folder]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert "--tuning in" in result.output
        assert "is within the input or the output of the job" in result.output


def test_off_measures_nothing() -> None:
    config = EngineConfig("demo", tuning="off")
    resolved: Any = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, config=config
    )
    assert graphengine.build._make_tuning(resolved) is None


def test_cpu_has_nothing_to_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphengine.tuning_file, "CACHE", tmp_path)
    with LLM("demo", tuning=str(tmp_path / "own")) as llm:
        assert "tuning" not in llm.startup_s
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "told"), [("auto", None), ("off", "off"), ("else", "else")])
def test_job_keeps_what_its_workers_measure(
    given: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[EngineConfig] = []

    def pool(devices: object, *, engine: EngineConfig, **options: object) -> object:
        engines.append(engine)
        raise KeyboardInterrupt

    monkeypatch.setattr(graphengine.jobs.job, "WorkerPool", pool)
    (tmp_path / "in.jsonl").write_text('{"prompt": "1+1="}\n')
    output = tmp_path / "out.jsonl"
    config = JobConfig(
        engine=EngineConfig("demo", device="cpu", tuning=given),
        sampling=SamplingParams(),
        input=str(tmp_path / "in.jsonl"),
        output=str(output),
        prompt_column="prompt",
    )
    # With None a job goes on that was begun without the key.
    assert config.meaning()["engine.tuning"] == ("off" if given == "off" else None)
    with pytest.raises(KeyboardInterrupt):
        run_job(config, environment={}, console=Console(), say=print)
    (engine,) = engines
    assert engine.tuning == (told or str(Place.of(config).state / "products"))


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [40, 64, 80, 128, 200, 256])
@torch.inference_mode()
def test_every_way_computes_its_product(num_rows: int) -> None:
    from graphengine.kernels.fused_linear import linear_by, linear_silu_mul_by, means_on

    cuda = torch.device("cuda", 0)
    means = means_on(cuda, torch.bfloat16, has_bias=False)
    names: set[str] = set()
    for product in products_of_shapes((num_rows,)):
        generator = torch.Generator(cuda).manual_seed(num_rows)
        num_features = product.num_features * (2 if product.silu else 1)
        x, weight = (
            torch.randn(shape, device=cuda, generator=generator).bfloat16()
            for shape in ((num_rows, product.depth), (num_features, product.depth))
        )
        expected = torch.nn.functional.linear(x.float(), weight.float())
        if product.silu:
            gate, up = expected.chunk(2, dim=1)
            expected = torch.nn.functional.silu(gate) * up
        for name, way in ways(product, means).items():
            names.add(name)
            run = linear_silu_mul_by if product.silu else linear_by
            out = run(way, x, weight, None)
            out = (out.sum(dim=0) if out.dim() == 3 else out).float()
            # By row and by feature: a tile that is wrong cannot hide in the whole.
            for dim in (0, 1):
                errors = (out - expected).norm(dim=dim) / expected.norm(dim=dim)
                assert float(errors.max()) < 2e-2, (product, name)
    assert len(names) > 3
    assert "cublas" in names


def gpu_llm(folder: Path, tuning: str, **options: Any) -> LLM:
    """Two layers of a 1B's shape."""
    shape = SHAPES["llama-8b"] | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "head_dim": 64,
        "num_hidden_layers": 2,
        "vocab_size": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(shape))
    return LLM(
        str(folder / "model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=128,
        max_model_len=512,
        kv_cache_memory_bytes=2**30,
        tuning=tuning,
        **options,
    )


@pytest.mark.gpu
def test_first_start_measures_and_the_second_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphengine.tuning.CACHE", tmp_path / "cache")
    prompts = [{"prompt_token_ids": [3 + i, 5, 7]} for i in range(100)]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    own = tmp_path / "own"
    measured: list[int] = []
    tune_ = graphengine.tuning_trial.tune

    def watched(model: Any, kernels: Any, products: Any, streams: Any) -> Any:
        measured.append(len(products))
        return tune_(model, kernels, products, streams)

    monkeypatch.setattr("graphengine.tuning.tune", watched)
    outputs = []
    for folder, options in (
        (str(own), {}),
        (str(own), {"enforce_eager": True}),
        ("auto", {}),
        (str(tmp_path / "other"), {}),
    ):
        with gpu_llm(tmp_path, folder, **options) as llm:
            assert llm.startup_s["tuning"] > 0.0
            results = llm.generate(prompts, params)
            outputs.append([result.outputs[0].token_ids for result in results])
            kernels = llm._runner._kernels
            assert {product.num_rows for product in kernels.ways} == {
                40,
                48,
                56,
                64,
                80,
                96,
                112,
                128,
            }
    assert measured == [32], "once, and for each bucket beyond the chain"
    assert outputs == [outputs[0]] * 4
    (cache,), (kept,) = ((tmp_path / "cache").glob("*.json"), own.glob("*.json"))
    ways_kept = read(kept)
    del ways_kept["attention"]  # what a folder goes on with, not what a card does best
    assert read(cache) == ways_kept
    with gpu_llm(tmp_path, "off") as llm:
        assert "tuning" not in llm.startup_s
