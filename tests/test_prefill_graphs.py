"""Are captured prefills the prefills they stand for, and captured where that pays?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import World, make_world, request

from captures import BucketLadder, CaptureError
from graphengine import LLM, Request, prefill_graphs
from graphengine.model_config import ModelConfig
from graphengine.prefill_graphs import PrefillGraphs, prefill_ladder
from graphengine.rope_config import RopeConfig

LADDER = BucketLadder([8, 16, 24, 32])
QWEN3_0_6B = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope=RopeConfig("default", 1e6),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=True,
    tie_word_embeddings=True,
    sliding_windows=(None,) * 28,
    max_position_embeddings=40960,
    dtype="bfloat16",
    eos_token_ids=(151645,),
    bos_token_id=None,
)
LLAMA_8B = replace(
    QWEN3_0_6B, hidden_size=4096, intermediate_size=14336, num_heads=32, num_layers=32
)
LLAMA_405B = replace(QWEN3_0_6B, hidden_size=16384, intermediate_size=53248, num_heads=128)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("tiny"))


def graphs_of(llm: LLM, ladder: BucketLadder, *, captures: bool = True) -> PrefillGraphs:
    runner = llm._runner
    return PrefillGraphs(runner._model, runner._kv, runner._streams, ladder, captures=captures)


@contextmanager
def llm_with_graphs(world: World, **options: Any) -> Iterator[tuple[LLM, list[int]]]:
    """An engine on the CPU whose prefills run in pieces, and the bucket of each."""
    with world.llm(max_num_seqs=4, max_num_batched_tokens=32, **options) as llm:
        runner = llm._runner
        runner._prefill_graphs = graphs = graphs_of(llm, LADDER)
        buckets: list[int] = []
        prepare = graphs.prepare

        def noted(bucket: int) -> None:
            buckets.append(bucket)
            prepare(bucket)

        graphs.prepare = noted  # type: ignore[method-assign]
        yield llm, buckets


def requests(world: World, count: int) -> list[Request]:
    rng = random.Random(7)
    return [
        request(
            [rng.randrange(world.vocab_size) for _ in range(rng.randint(1, 20))],
            temperature=rng.choice([0.0, 1.5]),
            seed=index,
            max_tokens=rng.randint(1, 8),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_gpu_blocks_override": 9},  # preempted and prefilled again
        {"async_scheduling": False},
    ],
    ids=["many blocks", "few blocks", "in turns"],
)
def test_engine_gives_what_the_oracle_says(world: World, options: dict[str, Any]) -> None:
    some = requests(world, 60)
    with llm_with_graphs(world, **options) as (llm, buckets):
        assert world.wrong(some, llm.generate(some)) == []
    assert {8, 16, 24, 32} <= set(buckets)


def test_prompts_longer_than_a_chunk(world: World) -> None:
    """A chunk's keys lie in the cache when the next one runs."""
    some = [request([3 + i % 40 for i in range(n)], temperature=0.0) for n in (28, 27, 20, 25)]
    with world.llm(max_num_seqs=4, max_num_batched_tokens=10) as llm:
        llm._runner._prefill_graphs = graphs_of(llm, BucketLadder([6, 10]), captures=False)
        assert world.wrong(some, llm.generate(some)) == []


def test_bucket_is_captured_when_it_has_been_wanted_a_few_times(world: World) -> None:
    with world.llm(max_num_seqs=4, max_num_batched_tokens=32) as llm:
        graphs = graphs_of(llm, LADDER)
        # The largest that our own kernel leaves to cuBLAS is the largest here.
        assert list(graphs._captured) == [32, 8]
        for bucket in (8, 16, 24, 16, 32, 16):
            graphs.prepare(bucket)
        assert list(graphs._captured) == [32, 8]
        graphs.prepare(16)
        assert list(graphs._captured) == [32, 8, 16]
        without = graphs_of(llm, LADDER, captures=False)
        for _ in range(9):
            without.prepare(16)
        assert not without._captured


def test_bucket_that_memory_runs_out_for_is_called(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    some = requests(world, 40)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("none")

    with llm_with_graphs(world) as (llm, buckets):
        monkeypatch.setattr(prefill_graphs, "capture", no_memory)
        assert world.wrong(some, llm.generate(some)) == []
        assert buckets.count(24) > 4
        graphs = llm._runner._prefill_graphs
        assert graphs is not None
        assert list(graphs._captured) == [32, 8]
    assert caplog.text.count("no memory is left to capture prefills of 24 tokens") == 1


def test_another_error_of_a_capture_names_its_bucket(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("bad kernel")

    with world.llm(max_num_seqs=4, max_num_batched_tokens=32) as llm:
        graphs = graphs_of(llm, LADDER)
        monkeypatch.setattr(prefill_graphs, "capture", broken)
        for _ in range(3):
            graphs.prepare(24)
        with pytest.raises(CaptureError, match="24 tokens' prefill failed: bad kernel"):
            graphs.prepare(24)


def test_small_models_prefills_are_captured_to_where_arithmetic_takes_longer() -> None:
    def sizes(config: ModelConfig, max_tokens: int = 8192) -> tuple[int, ...]:
        ladder = prefill_ladder(config, max_tokens)
        return ladder.sizes if ladder is not None else ()

    assert sizes(LLAMA_8B) == (128, 192, 256, 384, 512)
    assert sizes(QWEN3_0_6B)[-3:] == (4096, 6144, 8192)
    assert sizes(QWEN3_0_6B, 1000) == (128, 192, 256, 384, 512, 768)
    assert sizes(QWEN3_0_6B, 100) == ()
    assert sizes(LLAMA_405B) == ()
