"""Does every request give what it gives alone, whatever runs beside it? The engine against the
oracle, on random schedules: arrivals, stops, sampling, few blocks, small budgets, late copies."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from accounting import check_blocks
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from late_streams import LateStreams
from tiny import MAX_MODEL_LEN, World, make_world, request

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


# Drawn from few prompts and seeds, so that the oracle meets most prefixes again.
def prompt_of(number: int, vocab_size: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(vocab_size) for _ in range(1 + number % 17)]


SAMPLING = st.one_of(
    st.just({"temperature": 0.0}),
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.7, 1.3]),
            "top_k": st.sampled_from([0, -1, 1, 6]),
            "top_p": st.sampled_from([1.0, 0.8]),
            "min_p": st.sampled_from([0.0, 0.1]),
            "seed": st.sampled_from([0, 1, 2**40 + 5, 2**63 - 1]),
        }
    ),
)
STOPS = st.one_of(
    st.just(()),
    st.lists(
        st.sampled_from(["a", "b", "d", "ab", "ba", "cd", " a", " ", "é", "€", "éa", "\n", "abc"]),
        max_size=3,
    ).map(tuple),
)


@dataclass(frozen=True)
class Arrival:
    prompt: int
    after_ticks: int
    params: dict[str, Any]


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    max_tokens = draw(st.one_of(st.none(), st.integers(1, 14)))
    params = {
        **draw(SAMPLING),
        "max_tokens": max_tokens,
        "min_tokens": min(draw(st.sampled_from([0, 0, 2, 5])), max_tokens or 5),
        "stop": draw(STOPS),
        "stop_token_ids": draw(st.lists(st.integers(0, 31), max_size=3)),
        "ignore_eos": draw(st.booleans()),
        "skip_special_tokens": draw(st.booleans()),
    }
    after_ticks = draw(st.sampled_from([0, 0, 0, 1, 4]))
    return Arrival(draw(st.integers(0, 30)), after_ticks, params)


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


@given(SHAPES, st.lists(arrivals(), min_size=1, max_size=10))
@settings(
    max_examples=120,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_every_request_gives_what_it_gives_alone(
    world: World, shape: Shape, plan: list[Arrival]
) -> None:
    requests = [
        request(prompt_of(arrival.prompt, world.vocab_size), **arrival.params) for arrival in plan
    ]
    with pytest.MonkeyPatch.context() as monkeypatch, shape.llm(world, monkeypatch) as llm:
        ticks = Ticks(monkeypatch)

        def arrive() -> Iterator[Request]:
            for arrival, item in zip(plan, requests, strict=True):
                ticks.wait(arrival.after_ticks)
                yield item

        outputs = list(llm.stream(arrive()))
        check_idle(llm, outputs)
        event(f"preempted {min(3, llm.stats().num_preemptions)}")
        assert world.wrong(requests, outputs) == []
        # The same engine again, all at once and in another order.
        again = llm.generate(
            [item.prompt for item in reversed(requests)],
            [item.sampling_params for item in reversed(requests)],
        )
        check_idle(llm, again)
        assert world.wrong(requests[::-1], again) == []


def check_idle(llm: LLM, outputs: list[RequestOutput]) -> None:
    stats = llm.stats()
    assert llm._blocks.num_free == llm.num_blocks
    assert llm._table.num_free == llm.config.max_num_seqs
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
    assert llm._stop_strings == {}
    assert stats.num_finished == len(outputs)
    assert stats.output_tokens == sum(len(output.outputs[0].token_ids) for output in outputs)
    assert stats.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
