"""Does LLM do what it promises? Order, bounds, errors, reuse, seeds."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from late_streams import LateStreams
from tiny import MAX_MODEL_LEN, World, make_world, request

import graphengine.build
import graphengine.engine
import graphengine.model_runner
from graphengine import LLM, FinishReason, Request, RequestOutput, SamplingParams
from graphengine.errors import BackendError, CapacityError, ConfigError, ModelError, RequestError
from graphengine.model_runner import Launched, ModelRunner
from graphengine.plan import plan
from graphengine.scheduler import Scheduler

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def llm(world: World) -> Iterator[LLM]:
    with world.llm(max_num_seqs=4) as llm:
        yield llm


def some_requests(count: int, **params: Any) -> list[Request]:
    """Prompts of mixed lengths, greedy and seeded ones in turn."""
    return [
        request(
            [(5 * index + 3 * place) % 29 for place in range(1 + index % 7)],
            **{
                "temperature": float(index % 2),
                "seed": 1000 + index,
                "max_tokens": 1 + 3 * index % 11,
                "ignore_eos": True,
                **params,
            },
        )
        for index in range(count)
    ]


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    by_index = sorted(outputs, key=lambda output: output.index)
    return [output.outputs[0].token_ids for output in by_index]


def assert_usable(world: World, llm: LLM) -> None:
    """It gives the right tokens, and nothing of what came before is left."""
    requests = some_requests(9)
    outputs = list(llm.stream(requests))
    assert world.wrong(requests, outputs) == []
    assert llm.stats().num_finished == 9
    assert llm.stats().kv_usage == 0.0


# --- order


def test_outputs_come_in_the_order_of_the_prompts(world: World, llm: LLM) -> None:
    requests = some_requests(14)
    outputs = llm.generate(
        [item.prompt for item in requests], [item.sampling_params for item in requests]
    )
    assert [output.index for output in outputs] == list(range(14))
    assert [output.request_id for output in outputs] == [str(index) for index in range(14)]
    assert [output.prompt_token_ids for output in outputs] == [
        item.prompt["prompt_token_ids"] for item in requests
    ]
    assert world.wrong(requests, outputs) == []


def test_one_prompt_needs_no_list(llm: LLM) -> None:
    by_text = llm.generate("ab", GREEDY)
    by_ids = llm.generate({"prompt_token_ids": llm.tokenizer.encode("ab")}, GREEDY)
    assert len(by_text) == len(by_ids) == 1
    assert by_text[0].outputs == by_ids[0].outputs
    assert (by_text[0].prompt, by_ids[0].prompt) == ("ab", None)


def test_stream_takes_one_prompt_for_one(llm: LLM) -> None:
    """A string is no list of letters."""
    for one in ("abcd", {"prompt": "abcd"}):
        (output,) = llm.stream(one, GREEDY)
        assert output.prompt == "abcd"


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert list(llm.stream(iter(()))) == []


def test_one_sampling_params_each_or_one_for_all(llm: LLM) -> None:
    two = [{"prompt_token_ids": [5]}, {"prompt_token_ids": [6]}]
    lengths = [replace(GREEDY, max_tokens=n, ignore_eos=True) for n in (2, 5)]
    assert [len(ids) for ids in token_ids(llm.generate(two, lengths))] == [2, 5]
    assert [len(ids) for ids in token_ids(llm.generate(two, lengths[1]))] == [5, 5]
    for wrong_number in (lengths[:1], [*lengths, GREEDY]):
        with pytest.raises(RequestError, match="sampling_params for 2 prompts"):
            llm.generate(two, wrong_number)


def test_short_requests_overtake_long_ones_in_a_stream(llm: LLM) -> None:
    long, short = (request([3, 4], temperature=0.0, max_tokens=n, ignore_eos=True) for n in (20, 2))
    assert [output.index for output in llm.stream([long, short])] == [1, 0]


# --- a stream is lazy and bounded


def test_stream_does_nothing_before_it_is_asked(llm: LLM) -> None:
    asked = []
    stream = llm.stream(asked.append(n) or {"prompt_token_ids": [3]} for n in range(3))
    assert asked == []
    stream.close()


def test_stream_reads_only_as_far_ahead_as_it_needs(world: World) -> None:
    max_num_seqs = 3
    num_read = 0

    def prompts() -> Iterator[dict[str, list[int]]]:
        nonlocal num_read
        for index in range(10_000):
            num_read += 1
            yield {"prompt_token_ids": [3 + index % 20]}

    most_ahead = 0
    with world.llm(max_num_seqs=max_num_seqs) as llm:
        stream = llm.stream(prompts(), replace(GREEDY, max_tokens=2))
        for num_done, _ in enumerate(itertools.islice(stream, 150), start=1):
            most_ahead = max(most_ahead, num_read - num_done)
        time.sleep(0.05)  # the reading thread has time to run away
        assert num_read - num_done <= most_ahead + max_num_seqs + 1
        stream.close()
        # Running, ended and not yielded yet, waiting, queued, and one in the reader's hand.
        assert most_ahead <= 4 * max_num_seqs + 1
        assert num_read < 200
        assert_usable(world, llm)


def test_output_comes_before_more_input_is_there(world: World, llm: LLM) -> None:
    """A caller may make the next request of the last answer."""
    asked: list[int] = [3]
    answers: list[int] = []
    ready = threading.Event()

    def prompts() -> Iterator[dict[str, list[int]]]:
        for _ in range(4):
            yield {"prompt_token_ids": list(asked)}
            assert ready.wait(10), "the engine waits for more before it answers"
            ready.clear()

    for output in llm.stream(prompts(), replace(GREEDY, max_tokens=1, ignore_eos=True)):
        answers.append(output.outputs[0].token_ids[0])
        asked.append(answers[-1])
        ready.set()
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    assert answers == world.oracle.answer([3], params).token_ids


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_next_step_is_launched_before_the_last_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
) -> None:
    """What keeps the device busy."""
    log: list[str] = []
    original = ModelRunner.launch

    def launch(self: ModelRunner, batch: Any, table: Any) -> Launched:
        log.append("launch")
        launched = original(self, batch, table)

        def wait() -> Any:
            log.append("wait")
            return launched.wait()

        return replace(launched, wait=wait)

    monkeypatch.setattr(ModelRunner, "launch", launch)
    with world.llm(max_num_seqs=2, async_scheduling=async_scheduling) as llm:
        list(llm.stream(some_requests(2, max_tokens=9)))
    expected = ["launch", "wait"] * 9  # the prefill and eight decode steps
    if async_scheduling:
        expected = ["launch", *["launch", "wait"] * 8, "wait"]
    assert log == expected


def test_idle_engine_does_not_spin(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    num_turns = 0
    original = Scheduler.schedule

    def schedule(self: Scheduler) -> Any:
        nonlocal num_turns
        num_turns += 1
        return original(self)

    def prompts() -> Iterator[dict[str, list[int]]]:
        time.sleep(0.3)
        yield {"prompt_token_ids": [3]}
        time.sleep(0.3)

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    assert len(list(llm.stream(prompts(), replace(GREEDY, max_tokens=2)))) == 1
    assert num_turns < 10


# --- reuse after whatever happened


def test_exception_of_the_callers_iterator_comes_out(world: World, llm: LLM) -> None:
    def prompts() -> Iterator[dict[str, list[int]]]:
        for _ in range(6):
            yield {"prompt_token_ids": [3]}
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(llm.stream(prompts(), GREEDY))
    assert_usable(world, llm)


def test_closing_a_stream_early_drops_the_rest(world: World, llm: LLM) -> None:
    for num_taken in (0, 1, 3):
        stream = llm.stream(some_requests(30))
        for _ in range(num_taken):
            next(stream)
        stream.close()
        assert_usable(world, llm)


def test_exception_in_the_callers_loop_drops_the_rest(world: World, llm: LLM) -> None:
    def loop() -> None:
        for output in llm.stream(some_requests(30)):
            assert output.index // 0

    with pytest.raises(ZeroDivisionError):
        loop()
    assert_usable(world, llm)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late copies"])
@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ModelRunner, "launch"),
        (ModelRunner, "decode_step"),
        (ModelRunner, "prefill"),
        (Scheduler, "schedule"),
        (Scheduler, "commit"),
        (graphengine.model_runner, "fill_decode"),
        (graphengine.engine.LLM, "_commit"),
        (graphengine.engine.LLM, "_output"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_interrupt_anywhere_leaves_the_engine_usable(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    async_scheduling: bool,
    late: bool,
) -> None:
    if late:
        monkeypatch.setattr(graphengine.build, "make_streams", lambda device: LateStreams())
    original: Callable[..., Any] = getattr(owner, name)
    calls = itertools.count(1)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) in (1, 5, 9):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    with world.llm(
        max_num_seqs=3, async_scheduling=async_scheduling, max_num_batched_tokens=5
    ) as llm:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                list(llm.stream(some_requests(20)))
            assert not any(llm._clock._pending.values()), (
                "a launch that was cut off has no end to read"
            )
            if isinstance(streams := llm._runner._streams, LateStreams):
                assert streams.is_idle, "the next stream would write under its copies"
        assert_usable(world, llm)


def test_interrupt_before_the_stream_begins_leaves_the_engine_usable(
    world: World, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: LLM) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(LLM, "_start_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("ab")
    assert_usable(world, llm)


def test_two_streams_at_once_are_refused(world: World, llm: LLM) -> None:
    first = llm.stream(some_requests(9))
    kept = [next(first)]
    with pytest.raises(RuntimeError, match="streaming already"):
        next(llm.stream(["ab"]))
    with pytest.raises(RuntimeError, match="streaming already"):
        llm.generate("ab")
    kept += first  # the refused one has not disturbed it
    assert world.wrong(some_requests(9), kept) == []
    assert_usable(world, llm)


# --- the end


def test_closing_twice_is_once(world: World) -> None:
    llm = world.llm()
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        llm.generate("ab")
    with pytest.raises(RuntimeError, match="closed"):
        next(llm.stream(["ab"]))
    assert llm.stats().num_finished == 0


def test_closing_frees_the_device_at_once(world: World) -> None:
    """Not at the next garbage collection: another engine may need the memory now."""
    llm = world.llm()
    llm.generate("ab", GREEDY)
    runner = llm._runner
    alive = [weakref.ref(part) for part in (runner, runner._model, runner._kv)]
    del runner
    gc.collect()
    gc.disable()
    try:
        llm.close()
        assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_closing_under_a_stream_ends_it(world: World) -> None:
    llm = world.llm(max_num_seqs=2)
    stream = llm.stream(some_requests(9))
    next(stream)
    llm.close()
    with pytest.raises(RuntimeError, match="closed while it streamed"):
        list(stream)
    # As after Ctrl-C in a caller's loop: the stream is dropped after the engine.
    llm = world.llm(max_num_seqs=2)
    stream = llm.stream(some_requests(9))
    next(stream)
    llm.close()
    del stream
    gc.collect()


def test_engines_can_live_side_by_side(world: World) -> None:
    requests = some_requests(8)
    with world.llm(max_num_seqs=2) as one, world.llm(max_num_seqs=3) as other:
        streams = one.stream(requests), other.stream(requests)
        outputs: tuple[list[RequestOutput], ...] = ([], [])
        for pair in itertools.zip_longest(*streams):
            for kept, output in zip(outputs, pair, strict=True):
                kept += [output] if output else []
        for kept in outputs:
            assert world.wrong(requests, kept) == []


# --- one bad request does not disturb the others


@pytest.mark.parametrize("as_list", [True, False])
def test_refused_requests_have_an_output_and_the_others_go_on(
    world: World, llm: LLM, as_list: bool
) -> None:
    good = some_requests(6)
    bad: list[Any] = [
        "",
        {"prompt_token_ids": []},
        {"prompt_token_ids": [3] * MAX_MODEL_LEN},
        {"prompt_token_ids": [world.vocab_size]},
        Request("ab", SamplingParams(stop_token_ids=[99_999])),
        "\ud800",
        object(),
    ]
    mixed = [item for pair in itertools.zip_longest(good, bad) for item in pair if item is not None]
    outputs = list(llm.stream(mixed if as_list else iter(mixed)))
    refused = [output for output in outputs if output.error]
    assert len(outputs) == len(good) + len(bad)
    assert len(refused) == len(bad) == llm.stats().num_failed
    assert all(output.outputs[0].finish_reason is FinishReason.ERROR for output in refused)
    accepted = sorted((output for output in outputs if not output.error), key=lambda o: o.index)
    for place, output in enumerate(accepted):
        output.index = place
    assert world.wrong(good, accepted) == []


def test_refused_request_is_heard_of_at_once(llm: LLM) -> None:
    gate = threading.Event()

    def prompts() -> Iterator[str]:
        yield ""
        gate.wait(10)

    stream = llm.stream(prompts())
    start = time.perf_counter()
    assert next(stream).error
    assert time.perf_counter() - start < 5
    gate.set()
    assert list(stream) == []


def test_only_refused_requests(llm: LLM) -> None:
    outputs = llm.generate(["", "", ""])
    assert [output.outputs[0].finish_reason for output in outputs] == ["error"] * 3
    assert llm.stats().num_decode_steps == 0


# --- stops that the oracle's own model cannot be made to hit at will


def test_a_full_context_ends_at_max_model_len(world: World) -> None:
    """With a block size that does not divide it: nano-vllm #190."""
    for block_size in (1, 3, 8, 32):
        with world.llm(max_num_seqs=2, block_size=block_size) as llm:
            requests = [
                request([4] * n, temperature=0.0, max_tokens=None, ignore_eos=True)
                for n in (1, 9, MAX_MODEL_LEN - 1)
            ]
            outputs = llm.generate(
                [item.prompt for item in requests], [item.sampling_params for item in requests]
            )
            assert world.wrong(requests, outputs) == []
            for output in outputs:
                total = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
                assert total == MAX_MODEL_LEN
                assert output.outputs[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_length_stops_waste_no_row_of_the_engine(
    world: World, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
) -> None:
    num_rows = 0
    original = ModelRunner.launch

    def launch(self: ModelRunner, batch: Any, table: Any) -> Any:
        nonlocal num_rows
        num_rows += int(getattr(batch, "samples", batch.rows >= 0).sum())
        return original(self, batch, table)

    monkeypatch.setattr(ModelRunner, "launch", launch)
    with world.llm(max_num_seqs=3, async_scheduling=async_scheduling) as llm:
        outputs = list(llm.stream(some_requests(20)))
        assert num_rows == sum(map(len, token_ids(outputs))) == llm.stats().output_tokens


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_a_stop_costs_one_row_at_most(
    world: World, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
) -> None:
    num_rows = 0
    original = ModelRunner.launch

    def launch(self: ModelRunner, batch: Any, table: Any) -> Any:
        nonlocal num_rows
        num_rows += int(getattr(batch, "samples", batch.rows >= 0).sum())
        return original(self, batch, table)

    monkeypatch.setattr(ModelRunner, "launch", launch)
    requests = some_requests(
        20, max_tokens=20, ignore_eos=False, stop_token_ids=[3, 7, 12], stop=["a", "b", "c"]
    )
    with world.llm(max_num_seqs=3, async_scheduling=async_scheduling) as llm:
        outputs = list(llm.stream(requests))
    assert world.wrong(requests, outputs) == []
    num_stops = sum(output.outputs[0].finish_reason is FinishReason.STOP for output in outputs)
    assert num_stops > 10
    wasted = num_rows - sum(map(len, token_ids(outputs)))
    assert 0 <= wasted <= (num_stops if async_scheduling else 0)


def test_slots_never_written_are_never_seen(world: World) -> None:
    """Memory fresh from the system may hold anything. Only the null block must be finite."""
    requests = some_requests(20)
    with world.llm(max_num_seqs=5, num_gpu_blocks_override=12, max_num_batched_tokens=6) as llm:
        for cache in (*llm._runner._kv.k, *llm._runner._kv.v):
            cache[1:] = float("nan")
        assert world.wrong(requests, list(llm.stream(requests))) == []


def test_padded_rows_stay_finite(world: World) -> None:
    """They read and write the null block; one NaN there would stay for every later step."""
    with world.llm(max_num_seqs=7) as llm:
        list(llm.stream(some_requests(20)))
        for cache in (*llm._runner._kv.k, *llm._runner._kv.v):
            assert bool(cache[0].isfinite().all())
            assert bool(cache[0, 0].any()), "no padded row has run"
            assert not bool(cache[0, 1:].any()), "a padded row left its slot"


# --- seeds


def test_seeded_request_gives_the_same_whatever_the_engine_does(world: World) -> None:
    requests = some_requests(12, temperature=1.5, max_tokens=9)
    expected: list[list[int]] | None = None
    for options in (
        {"max_num_seqs": 1},
        {"max_num_seqs": 5},
        {"max_num_seqs": 12, "async_scheduling": False},
        {"max_num_seqs": 7, "enforce_eager": True, "max_num_batched_tokens": 3},
        {"max_num_seqs": 4, "num_gpu_blocks_override": 9, "seed": 5},
    ):
        with world.llm(**options) as llm:
            forward = token_ids(list(llm.stream(requests)))
            backward = token_ids(list(llm.stream(requests[::-1])))[::-1]
            alone = token_ids(list(llm.stream(requests[5:6])))[0]
        expected = expected or forward
        assert forward == backward == expected
        assert alone == expected[5]


def test_engine_seed_decides_for_requests_that_bring_none(world: World) -> None:
    prompts = [{"prompt_token_ids": [3, 4]}] * 6
    params = SamplingParams(temperature=2.0, max_tokens=8, ignore_eos=True)

    def sample(seed: int, max_num_seqs: int) -> list[list[int]]:
        with world.llm(seed=seed, max_num_seqs=max_num_seqs) as llm:
            first = token_ids(llm.generate(prompts, params))
            assert token_ids(llm.generate(prompts, params)) == first, "a rerun gives the same"
            return first

    one = sample(1, 2)
    assert sample(1, 6) == one
    assert sample(2, 6) != one
    assert len({tuple(ids) for ids in one}) == 6, "each request has a seed of its own"


# --- options


def test_unknown_option_is_named(world: World) -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'max_seqs'; choose from .*max_num_seqs"):
        world.llm(max_seqs=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_model_len": 10**6}, ConfigError, "1000000, the model was made for 256 positions"),
        ({"device": "cuda"}, BackendError, "no CUDA GPU"),  # whatever this machine has
        ({"attention": "flash"}, BackendError, "flash"),
        ({"tokenizer": "/no/such/directory"}, ModelError, "/no/such/directory"),
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs is 0"),
        ({"block_size": 2.5}, ConfigError, "block_size is 2.5"),
        ({"seed": -1}, ConfigError, "seed is -1"),
        ({"gpu_memory_utilization": 0}, ConfigError, "gpu_memory_utilization is 0"),
        ({"gpu_memory_utilization": float("nan")}, ConfigError, "gpu_memory_utilization is nan"),
        ({"dtype": "int8"}, ConfigError, "dtype is 'int8'"),
    ],
)
def test_bad_option_is_one_line_with_its_value(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message) as caught:
        world.llm(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "has", "remedy"),
    [
        ({"num_gpu_blocks_override": 7}, 7, "num_gpu_blocks_override"),
        ({"kv_cache_memory_bytes": 5000}, None, "kv_cache_memory_bytes"),
        ({"kv_cache_memory_bytes": 1}, 0, "kv_cache_memory_bytes"),
    ],
)
def test_too_little_memory_says_how_many_blocks_it_needs_and_has(
    world: World, options: dict[str, Any], has: int | None, remedy: str
) -> None:
    needs = -(-MAX_MODEL_LEN // 4)
    holds = r"\d+" if has is None else has
    pattern = rf"needs {needs} KV blocks of 4 tokens, the memory granted holds {holds};.*{remedy}"
    with pytest.raises(CapacityError, match=pattern):
        world.llm(**options)


def test_kv_cache_fills_the_memory_it_is_granted_null_block_included(world: World) -> None:
    with world.llm() as llm:
        per_block = llm._resolved.bytes_per_block
    for granted in (12 * per_block, 12 * per_block + 5, 13 * per_block - 1):
        with world.llm(kv_cache_memory_bytes=granted) as llm:
            assert llm.num_blocks == 11
            assert granted - per_block < llm._runner._kv.num_bytes <= granted


def test_blocks_for_one_sequence_are_enough(world: World) -> None:
    with world.llm(num_gpu_blocks_override=8, max_num_seqs=3) as llm:
        assert_usable(world, llm)


def test_eos_comes_from_the_tokenizer_where_the_config_has_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = graphengine.engine.load_model_config

    def load_model_config(path: Path) -> Any:
        return replace(original(path), eos_token_ids=())

    monkeypatch.setattr(graphengine.engine, "load_model_config", load_model_config)
    with world.llm() as llm:
        assert llm._intake._eos_token_ids == (2,)
    with world.llm(skip_tokenizer_init=True) as llm:
        assert llm.tokenizer is None
        output = llm.generate({"prompt_token_ids": [3]}, GREEDY)[0]
        assert output.outputs[0].text == ""
        assert len(output.outputs[0].token_ids) == 6


@pytest.mark.parametrize("end", ["exhausted", "closed", "raised"])
def test_garbage_collector_skips_what_was_there_while_a_stream_runs(world: World, end: str) -> None:
    def requests() -> Iterator[Request]:
        yield request([3, 4], max_tokens=2)
        yield request([3, 5], max_tokens=20)
        if end == "raised":
            raise OSError("disk gone")

    with world.llm() as llm:
        before = gc.get_freeze_count()  # not 0 in Python 3.12
        assert before < 2000
        stream = llm.stream(requests())
        try:
            for _ in stream:
                assert gc.get_freeze_count() > 10_000
                assert gc.isenabled()
                if end == "closed":
                    stream.close()
        except OSError:
            assert end == "raised"
        assert gc.get_freeze_count() <= before


def test_objects_a_program_froze_itself_stay_frozen(world: World) -> None:
    with world.llm() as llm:
        gc.freeze()
        try:
            num_frozen = gc.get_freeze_count()
            llm.generate({"prompt_token_ids": [3]}, GREEDY)
            # Some may have died since; none was thawed.
            assert gc.get_freeze_count() > num_frozen // 2
        finally:
            gc.unfreeze()


def test_plan_foretells_the_engine_on_the_cpu(world: World) -> None:
    with world.llm(max_num_seqs=5) as llm:
        planned = plan(llm.config)
        assert planned.num_blocks == llm.num_blocks
        assert planned.max_model_len == llm.max_model_len
        assert planned.block_size == llm._resolved.block_size
        parameters = llm._runner._model.parameters()
        assert planned.weight_bytes == sum(tensor.nbytes for tensor in parameters)
        kv = llm._runner._kv
        assert planned.kv_bytes == kv.num_bytes


# --- figures


def test_stats_add_up(world: World, llm: LLM) -> None:
    requests = some_requests(11)
    seen: list[tuple[int, int, float]] = []
    outputs = []
    for output in llm.stream(requests):
        stats = llm.stats()
        seen.append((stats.num_running, stats.num_waiting, stats.kv_usage))
        outputs.append(output)
    stats = llm.stats()
    assert stats.num_finished == 11
    assert stats.num_failed == stats.num_preemptions == stats.num_running == stats.num_waiting == 0
    assert stats.output_tokens == sum(map(len, token_ids(outputs)))
    assert stats.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
    assert stats.num_prefill_steps >= 3  # eleven requests, four at a time
    assert stats.num_decode_steps >= 10  # the longest has eleven tokens
    assert stats.num_decode_steps * 4 >= stats.output_tokens - 11
    assert stats.decode_ms > 0
    assert stats.prefill_ms > 0
    assert stats.elapsed_s > 0
    assert stats.elapsed_s == llm.stats().elapsed_s, "the clock stops with the stream"
    assert stats.gpu_busy is None
    running, waiting, usage = zip(*seen, strict=True)
    assert max(running) <= 4
    assert max(waiting) <= 4
    assert 0 <= min(usage) <= max(usage) <= 1
    assert max(usage) > 0
    list(llm.stream(requests[:2]))
    assert llm.stats().num_finished == 2, "each stream counts for itself"


def test_stats_before_the_first_stream(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats.num_finished, stats.output_tokens, stats.kv_usage) == (0, 0, 0.0)


def test_preemptions_are_counted(world: World) -> None:
    requests = some_requests(8, max_tokens=20)
    with world.llm(max_num_seqs=6, num_gpu_blocks_override=9) as llm:
        outputs = list(llm.stream(requests))
        assert llm.stats().num_preemptions > 0
    assert world.wrong(requests, outputs) == []


def test_model_directory_may_be_given_as_its_tokenizer(world: World, tmp_path: Path) -> None:
    with world.llm(tokenizer=str(world.path)) as llm:
        assert_usable(world, llm)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        world.llm(tokenizer=str(tmp_path))
