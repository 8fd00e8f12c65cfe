"""Does every request give what it gives alone, whatever runs beside it? The engine against the
oracle, on random schedules: arrivals, stops, sampling, few blocks, small budgets, late copies."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from accounting import check_blocks
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from late_streams import LateStreams
from tiny import MAX_MODEL_LEN, World, make_world, request, token_ids_of

import graphengine.build
from graphengine import LLM, Request, RequestOutput
from graphengine.scheduler import Scheduler


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("tiny"))


class Ticks:
    """Counts schedule() calls, for arrivals in the middle of a run; scans the blocks at each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.changed = threading.Condition()
        original = Scheduler.schedule

        def schedule(scheduler: Scheduler) -> Any:
            batch = original(scheduler)
            check_blocks(scheduler._table, scheduler._blocks)
            with self.changed:
                self.count += 1
                self.changed.notify_all()
            return batch

        monkeypatch.setattr(Scheduler, "schedule", schedule)

    def wait(self, num_ticks: int) -> None:
        """For so many calls, or until there are none: an idle engine waits for more requests."""
        with self.changed:
            target = self.count + num_ticks
            while self.count < target:
                if not self.changed.wait(timeout=0.02):
                    return


STOPS = ("a", "b", "d", "ab", "ba", "cd", " a", " ", "é", "€", "éa", "\n", "abc")


@dataclass(frozen=True)
class Arrival:
    request: Request
    after_ticks: int


def random_plan(seed: int, count: int, vocab_size: int) -> list[Arrival]:
    """The first `count` arrivals of an endless plan, so that a shorter plan is a part of a longer
    one. Drawn from few prompts and seeds, so that the oracle meets most prefixes again."""
    rng = random.Random(seed)
    return [
        Arrival(random_request(rng, vocab_size), rng.choice([0, 0, 0, 1, 4])) for _ in range(count)
    ]


def random_request(rng: random.Random, vocab_size: int) -> Request:
    max_tokens = rng.choice([None, *range(1, 15)])
    params: dict[str, Any] = {"temperature": 0.0}
    if rng.random() < 0.5:
        params = {
            "temperature": rng.choice([0.7, 1.3]),
            "top_k": rng.choice([0, -1, 1, 6]),
            "top_p": rng.choice([1.0, 0.8]),
            "min_p": rng.choice([0.0, 0.1]),
            "seed": rng.choice([0, 1, 2**40 + 5, 2**63 - 1]),
        }
    prompt = random.Random(rng.randrange(30))
    return request(
        [prompt.randrange(vocab_size) for _ in range(prompt.randint(1, 17))],
        max_tokens=max_tokens,
        min_tokens=min(rng.choice([0, 0, 2, 5]), max_tokens or 5),
        stop=rng.sample(STOPS, rng.choice([0, 0, 1, 3])),
        stop_token_ids=rng.sample(range(vocab_size), rng.choice([0, 0, 1, 3])),
        ignore_eos=rng.random() < 0.5,
        skip_special_tokens=rng.random() < 0.5,
        **params,
    )


@dataclass(frozen=True)
class Shape:
    """An engine's options, and how its copies run."""

    max_num_seqs: int
    block_size: int
    num_spare_blocks: int
    max_num_batched_tokens: int
    async_scheduling: bool
    copies_are_late: bool

    @property
    def num_blocks(self) -> int:
        return -(-MAX_MODEL_LEN // self.block_size) + self.num_spare_blocks

    def llm(self, world: World, monkeypatch: pytest.MonkeyPatch) -> LLM:
        if self.copies_are_late:
            monkeypatch.setattr(graphengine.build, "make_streams", lambda device: LateStreams())
        return world.llm(
            max_num_seqs=self.max_num_seqs,
            block_size=self.block_size,
            num_gpu_blocks_override=self.num_blocks,
            max_num_batched_tokens=self.max_num_batched_tokens,
            async_scheduling=self.async_scheduling,
        )


SHAPES = st.builds(
    Shape,
    max_num_seqs=st.integers(1, 6),
    block_size=st.sampled_from([1, 2, 3, 4, 8]),
    num_spare_blocks=st.integers(0, 8),
    max_num_batched_tokens=st.sampled_from([1, 2, 5, 9, 16, 64]),
    async_scheduling=st.sampled_from([True, True, False]),
    copies_are_late=st.booleans(),
)


@given(SHAPES, st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(
    max_examples=90,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_every_request_gives_what_it_gives_alone(
    world: World, shape: Shape, seed: int, count: int
) -> None:
    plan = random_plan(seed, count, world.vocab_size)
    requests = [arrival.request for arrival in plan]
    with pytest.MonkeyPatch.context() as monkeypatch, shape.llm(world, monkeypatch) as llm:
        ticks = Ticks(monkeypatch)

        def arrive() -> Iterator[Request]:
            for arrival in plan:
                ticks.wait(arrival.after_ticks)
                yield arrival.request

        outputs = list(llm.stream(arrive()))
        check_idle(llm, outputs)
        event(f"preempted {min(3, llm.stats().num_preemptions)}")
        assert world.wrong(requests, outputs) == []
        # The same engine again, all at once and in another order.
        again = list(llm.stream(requests[::-1]))
        check_idle(llm, again)
        assert world.wrong(requests[::-1], again) == []


def test_random_plans_reach_every_kind_of_end(world: World) -> None:
    """The test above shows nothing of what never happens in it."""
    ends: Counter[str] = Counter()
    for seed in range(12):
        for arrival in random_plan(seed, 12, world.vocab_size):
            item = arrival.request
            assert item.sampling_params is not None
            end = world.oracle.answer(token_ids_of(item), item.sampling_params)
            is_last = len(end.token_ids) == item.sampling_params.max_tokens
            kind = type(end.stop_reason).__name__
            ends[f"{end.finish_reason} {kind}{' at the last token' if is_last else ''}"] += 1
    assert {
        "stop NoneType",  # EOS
        "stop int",
        "stop str",
        "stop str at the last token",
        "length NoneType",  # max_model_len
        "length NoneType at the last token",
    } <= set(ends), ends


def check_idle(llm: LLM, outputs: list[RequestOutput]) -> None:
    stats = llm.stats()
    assert llm._blocks.num_free == llm.num_blocks
    assert llm._table.num_free == llm.config.max_num_seqs
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
    assert llm._stop_strings == {}
    assert stats.num_finished == len(outputs)
    assert stats.output_tokens == sum(len(output.outputs[0].token_ids) for output in outputs)
    assert stats.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
