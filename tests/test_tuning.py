"""Is each product's fastest way found, kept and found again? Trials by a model on the CPU."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import graphengine.jobs.job
import graphengine.tuning_file
import graphengine.tuning_trial
from captures import BucketLadder, CpuStreams
from graphengine import LLM, SamplingParams
from graphengine.config import EngineConfig
from graphengine.errors import ConfigError
from graphengine.jobs.config import JobConfig
from graphengine.jobs.job import run_job
from graphengine.jobs.output import Place
from graphengine.kernels import reference
from graphengine.kernels.tiles import Tiles, WideTiles
from graphengine.kernels.ways import MAX_TUNED_ROWS, GatedTiles, Means, Product, Way, rule, ways
from graphengine.model import DecoderModel
from graphengine.tuning_file import Choices, file_in, locked, read, write
from graphengine.tuning_trial import choose, products_to_tune, run_product, try_all, tune
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
        assert found["rule"] == rule(product, means)
        assert len(set(found.values())) == len(found), "a way twice"
        assert None in found.values(), "cuBLAS is always one"
        for way in found.values():
            if isinstance(way, (Tiles, WideTiles)):
                assert product.num_features % way.block_f == 0
                assert product.depth % (way.splits * way.block_c) == 0
                assert way.splits == 1 or not product.silu
            if isinstance(way, WideTiles):
                assert means.tma
                both = 2 if product.silu else 1
                stage = 2 * way.block_c * (way.block_n + both * way.block_f)
                assert way.num_stages * stage <= 220 << 10, "more shared memory than there is"
            if isinstance(way, GatedTiles):
                assert product.silu
        seen += len(found)
    assert seen > 400


def test_products_of_no_dtype_for_triton_have_cublas_alone() -> None:
    product = Product(64, 4096, 4096, silu=False)
    assert ways(product, Means(triton=False, tma=False, gated=False)) == {"rule": None}


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
NAMED: dict[str, Way] = {"rule": None, "slow": SLOW, "fast": FAST, "wrong": WRONG}
SECONDS: dict[Way, float] = {None: 0.004, SLOW: 0.008, FAST: 0.0, WRONG: 0.0}


def tried(llm: LLM, kernels: Table) -> DecoderModel:
    model = llm._runner._model
    for layer in model.layers:
        layer._kernels = kernels
    return model


def test_fastest_right_way_is_found_for_each_product(tmp_path: Path) -> None:
    kernels = Table(SECONDS, wrong=(WRONG,))
    with small_llm(tmp_path) as llm:
        model = tried(llm, kernels)
        products = products_to_tune(model.config, BucketLadder([2, 4]), num_chained=0)
        assert len(products) == 2 * len({str(p).partition("x")[2] for p in products})
        named = dict.fromkeys(products, NAMED)
        named[products[-1]] = {"rule": FAST, "slow": SLOW}
        found = tune(model, kernels, named, CpuStreams())  # type: ignore[arg-type]
    assert found == {**dict.fromkeys(products, "fast"), products[-1]: "rule"}
    assert kernels.ways == {}, "a trial's ways are its own"


@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_wrong_way_is_noticed_in_every_product(bias: bool, tmp_path: Path) -> None:
    with small_llm(tmp_path, bias=bias) as llm:
        for wrong in ((), (WRONG,)):
            kernels = Table({}, wrong=wrong)
            model = tried(llm, kernels)
            for product in products_to_tune(model.config, BucketLadder([4]), num_chained=0):
                kernels.ways[product] = WRONG
                actual, expected = run_product(model, kernels, product)  # type: ignore[arg-type]
                error = float((actual - expected).norm() / expected.norm())
                assert (error > 0.02) == bool(wrong)


def test_every_way_is_rehearsed_once(tmp_path: Path) -> None:
    kernels = Table({})
    with small_llm(tmp_path) as llm:
        model = tried(llm, kernels)
        products = products_to_tune(model.config, BucketLadder([2]), num_chained=0)
        try_all(model, kernels, dict.fromkeys(products, NAMED))  # type: ignore[arg-type]
    assert kernels.calls == [(product, way) for product in products for way in NAMED.values()]
    assert kernels.ways == {}


def test_what_gains_little_leaves_the_rule() -> None:
    assert choose({"rule": 1.0, "a": 0.995, "b": 1.2}) == "rule"
    assert choose({"rule": 1.0, "a": 0.98, "b": 0.97}) == "b"
    assert choose({"rule": 1.0}) == "rule"


# --- files

A, B = Product(8, 64, 32, silu=False), Product(8, 64, 32, silu=True)
ALL: dict[Product, Mapping[str, Way]] = {A: NAMED, B: NAMED}
MADE_FOR = {"card": "none"}


def test_what_was_found_is_found_again(tmp_path: Path) -> None:
    path = file_in(tmp_path / "new", MADE_FOR)
    choices = Choices(ALL, [path], MADE_FOR)
    assert choices.missing == ALL
    choices.complete(lambda missing: {A: "fast", B: "rule"})
    assert choices.chosen == {A: FAST, B: None}
    assert json.loads(path.read_text())["made_for"] == MADE_FOR
    again = Choices(ALL, [path], MADE_FOR)
    assert again.missing == {}
    assert again.chosen == choices.chosen

    def never(missing: object) -> Mapping[Product, str]:
        raise AssertionError("measured twice")

    again.complete(never)


def test_own_folder_goes_before_the_cache_and_gets_what_it_lacks(tmp_path: Path) -> None:
    own, cache = tmp_path / "own.json", tmp_path / "cache.json"
    write(own, {}, {str(A): "slow", "1x2x3": "kept"})
    write(cache, {}, {str(A): "fast", str(B): "fast"})
    choices = Choices(ALL, [own, cache], MADE_FOR)
    choices.complete(lambda missing: {})
    assert choices.chosen == {A: SLOW, B: FAST}
    assert read(own) == {str(A): "slow", str(B): "fast", "1x2x3": "kept"}
    assert read(cache) == {str(A): "fast", str(B): "fast"}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"ways": 3}', '{"ways": {"8x64x32": "no such way"}}', "\xff"]
)
def test_damaged_file_is_as_good_as_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("latin-1"))
    choices = Choices(ALL, [path], MADE_FOR)
    assert choices.missing == ALL
    choices.complete(lambda missing: dict.fromkeys(missing, "fast"))
    assert Choices(ALL, [path], MADE_FOR).chosen == {A: FAST, B: FAST}


def test_folder_that_cannot_be_written_costs_no_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    choices = Choices(ALL, [tmp_path / "file" / "a.json"], MADE_FOR)
    choices.complete(lambda missing: dict.fromkeys(missing, "fast"))
    assert choices.chosen == {A: FAST, B: FAST}
    assert "cannot be written" in caplog.text


def _complete(path: Path, name: str, results: Any) -> None:
    choices = Choices(ALL, [path], MADE_FOR)
    choices.complete(lambda missing: (time.sleep(0.5), dict.fromkeys(missing, name))[1])
    results.put((name, [str(way) for way in choices.chosen.values()]))


def test_processes_that_start_together_choose_alike(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    path = tmp_path / "a.json"
    processes = [
        context.Process(target=_complete, args=(path, name, results)) for name in ("fast", "slow")
    ]
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert seen[0][1] == seen[1][1] == [str(NAMED[seen[0][0]])] * 2


def test_lock_that_cannot_be_had_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with locked(tmp_path / "file" / "a.json"):
        pass


def test_files_of_two_cards_are_two(tmp_path: Path) -> None:
    assert file_in(tmp_path, {"a": 1, "b": 2}) == file_in(tmp_path, {"b": 2, "a": 1})
    assert file_in(tmp_path, {"a": 1, "b": 2}) != file_in(tmp_path, {"a": 1, "b": 3})


# --- options


@pytest.mark.parametrize("value", ["", 3, None])
def test_senseless_tuning_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"tuning is .*; give auto, off or a folder"):
        LLM("demo", tuning=value)


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
    assert "engine.tuning" not in config.meaning(), "it would forbid to go on without"
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
    assert {"rule", "cublas"} < names


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
    assert read(cache) == read(kept)
    with gpu_llm(tmp_path, "off") as llm:
        assert "tuning" not in llm.startup_s
