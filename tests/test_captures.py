"""Do padded steps keep their rows, their buffers and their order? Everything in captures, on the
CPU twin; the order of the streams is read from its log."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late_streams import LateStreams
from mutation import mutated

import captures.banks
import captures.streams
from captures import (
    COMPUTE,
    Arena,
    Bank,
    Banks,
    BankState,
    BankStateError,
    BatchTooLarge,
    BucketLadder,
    CpuStreams,
    CudaStreams,
    EagerRunner,
    Field,
    Step,
    StepClock,
    StepPipeline,
    make_streams,
)

Log = list[tuple[str, str, str]]

# --- buckets


@given(st.integers(1, 3000))
@settings(max_examples=60, derandomize=True, database=None)
def test_ladder_holds_every_batch_up_to_exactly_its_maximum(max_rows: int) -> None:
    ladder = BucketLadder.up_to(max_rows)
    assert ladder.max_rows == ladder.sizes[-1] == max_rows
    assert list(ladder.sizes) == sorted(set(ladder.sizes))
    for num_rows in range(1, max_rows + 1):
        bucket = ladder.pick(num_rows)
        assert bucket >= num_rows
        assert not any(num_rows <= size < bucket for size in ladder.sizes)
    with pytest.raises(BatchTooLarge, match=f"{max_rows + 1} rows"):
        ladder.pick(max_rows + 1)


def test_padding_is_bounded() -> None:
    """Less than half a bucket always, less than a quarter above 24 rows."""
    ladder = BucketLadder.up_to(1024)
    padding = {n: (ladder.pick(n) - n) / ladder.pick(n) for n in range(1, 1025)}
    assert max(padding.values()) < 0.5
    assert max(share for n, share in padding.items() if n > 24) < 0.25


def test_ladder_stays_short() -> None:
    """Each bucket costs tens of milliseconds of capture."""
    assert len(BucketLadder.up_to(256).sizes) <= 20


@pytest.mark.parametrize("sizes", [[], [0, 1], [-1], [4, 4]])
def test_senseless_ladder_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="bucket sizes"):
        BucketLadder(sizes)


def test_sizes_may_come_in_any_order() -> None:
    assert BucketLadder([8, 1, 3]).sizes == (1, 3, 8)


# --- fields

FIELDS = st.lists(
    st.tuples(
        st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bool, torch.uint8]),
        st.lists(st.integers(1, 5), max_size=2).map(tuple),
    ),
    min_size=1,
    max_size=6,
).map(lambda kinds: [Field(f"f{i}", *kind) for i, kind in enumerate(kinds)])


@given(FIELDS, st.integers(1, 33))
@settings(max_examples=80, derandomize=True, database=None)
def test_fields_are_aligned_apart_and_inside(fields: list[Field], rows: int) -> None:
    layout = Arena(fields).layout(rows)
    buffer = torch.zeros(layout.nbytes + 16, dtype=torch.uint8)
    views = layout.views(buffer)
    for field in fields:
        view = views[field.name]
        assert (view.dtype, view.shape) == (field.dtype, (rows, *field.row_shape))
        assert view.is_contiguous()
        assert (view.data_ptr() - buffer.data_ptr()) % 16 == 0
    for number, field in enumerate(fields, start=1):
        views[field.name].view(torch.uint8).fill_(number)
    for number, field in enumerate(fields, start=1):
        assert (views[field.name].view(torch.uint8) == number).all(), "another field wrote here"
    assert not buffer[layout.nbytes :].any()


def test_host_views_are_the_same_memory() -> None:
    layout = Arena([Field("a", torch.int32, (2,)), Field("b", torch.float32)]).layout(3)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    host = layout.host_views(buffer)
    host["a"][1] = (7, 8)
    host["b"][:] = 0.5
    assert layout.views(buffer)["a"].tolist() == [[0, 0], [7, 8], [0, 0]]
    assert layout.views(buffer)["b"].tolist() == [0.5] * 3


def test_small_bucket_moves_few_bytes() -> None:
    arena = Arena([Field("a", torch.int64, (100,)), Field("b", torch.int32)])
    assert arena.layout(1).nbytes < arena.layout(2).nbytes < 2 * arena.layout(1).nbytes
    assert arena.layout(1).nbytes <= 800 + 16


def test_field_names_are_distinct() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Arena([Field("a", torch.int64), Field("a", torch.int32)])


# --- banks


def make_banks(streams: CpuStreams | None = None) -> Banks:
    return Banks(streams or CpuStreams(), "bank", in_bytes=16, out_bytes=16)


def launch(banks: Banks, bank: Bank, step: Callable[[], None] = lambda: None) -> None:
    banks.launch(bank, step, in_bytes=16)


TURNS: Mapping[BankState, list[str]] = {
    BankState.FREE: [],
    BankState.FILLING: ["open"],
    BankState.LAUNCHED: ["open", "launch"],
    BankState.READY: ["open", "launch", "wait"],
}
ALLOWED = {
    BankState.FREE: "open",
    BankState.FILLING: "launch",
    BankState.LAUNCHED: "wait",
    BankState.READY: "release",
}


@pytest.mark.parametrize("action", ["open", "launch", "wait", "release"])
@pytest.mark.parametrize("state", list(BankState))
def test_bank_takes_its_turns_in_order_only(state: BankState, action: str) -> None:
    banks = Banks(CpuStreams(), "bank", in_bytes=16, out_bytes=16, count=1)
    bank = banks.open()
    banks.reset()
    actions: dict[str, Callable[[], object]] = {
        "open": banks.open,
        "launch": lambda: launch(banks, bank),
        "wait": lambda: banks.wait(bank),
        "release": lambda: banks.release(bank),
    }
    for earlier in TURNS[state]:
        actions[earlier]()
    assert bank.state is state
    if ALLOWED[state] == action:
        actions[action]()
        assert bank.state is not state
    else:
        with pytest.raises(BankStateError, match=f"bank0 is {state.value}"):
            actions[action]()
        assert bank.state is state, "a refused action changes nothing"


def test_banks_are_used_in_turn_and_never_more_than_there_are() -> None:
    banks = make_banks()
    first, second = banks.open(), banks.open()
    assert first is not second
    with pytest.raises(BankStateError):
        banks.open()
    launch(banks, second)
    banks.wait(second)
    banks.release(second)
    with pytest.raises(BankStateError):  # the first one's turn, whatever else is free
        banks.open()


def test_failed_step_leaves_banks_usable_after_reset() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    banks = make_banks()
    with pytest.raises(KeyboardInterrupt):
        launch(banks, banks.open(), fail)
    filling = banks.open()
    banks.reset()
    with pytest.raises(BankStateError):
        launch(banks, filling)  # a step from before the reset is over
    for _ in range(5):
        bank = banks.open()
        launch(banks, bank)
        banks.wait(bank)
        banks.release(bank)


# --- the runner

INPUTS = (
    Field("numbers", torch.int64, pad=-5),
    Field("pairs", torch.float32, (2,), pad=0.25),
)
OUTPUTS = (Field("sums", torch.float32), Field("copies", torch.int64))
LADDER = BucketLadder([1, 2, 4, 8])


def add_up(inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
    outputs["sums"].copy_(inputs["numbers"] + inputs["pairs"].sum(1))
    outputs["copies"].copy_(inputs["numbers"])


def make_runner(streams: CpuStreams, step_fn: Any = add_up, **options: Any) -> EagerRunner:
    return EagerRunner(StepPipeline(INPUTS, OUTPUTS, LADDER, streams, **options), step_fn)


def fill(step: Step, value: int) -> None:
    step.inputs["numbers"][: step.num_rows] = value + np.arange(step.num_rows)
    step.inputs["pairs"][: step.num_rows] = value


@pytest.mark.parametrize("num_rows", range(1, 9))
def test_rows_no_sequence_uses_hold_the_pad_values(num_rows: int) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def look(inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        seen.append({name: view.clone() for name, view in inputs.items()})

    runner = make_runner(CpuStreams(), look)
    for rows in (8, 8, num_rows, num_rows):  # both banks held other values before
        step = runner.open(rows)
        fill(step, 100)
        runner.launch(step)
        runner.wait(step)
    for inputs in seen[2:]:
        bucket = LADDER.pick(num_rows)
        padding = bucket - num_rows
        assert inputs["numbers"].tolist() == [*range(100, 100 + num_rows), *[-5] * padding]
        assert inputs["pairs"].tolist() == [[100.0] * 2] * num_rows + [[0.25] * 2] * padding


def test_padding_for_capture_fills_every_row() -> None:
    pipeline = StepPipeline(INPUTS, OUTPUTS, LADDER, CpuStreams())
    for bank_index in range(pipeline.num_banks):
        pipeline.fill_with_padding(4, bank_index)
        inputs = pipeline.buffers[4, bank_index].inputs
        assert inputs["numbers"].tolist() == [-5] * 4
        assert inputs["pairs"].tolist() == [[0.25] * 2] * 4


def test_step_function_sees_the_same_addresses_in_every_call() -> None:
    """A captured graph has them baked in: those of a bucket and a bank."""
    seen: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    bank_index = 0

    def look(inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        views = [*inputs.values(), *outputs.values()]
        key = len(views[0]), bank_index
        seen.setdefault(key, set()).add(tuple(view.data_ptr() for view in views))

    runner = make_runner(CpuStreams(), look)
    for rows in 2 * (1, 2, 3, 4, 5, 8, 7, 3, 1):
        step = runner.open(rows)
        bank_index = step.bank.index
        runner.launch(step)
        runner.wait(step)
    assert set(seen) == {(size, index) for size in LADDER.sizes for index in (0, 1)}
    assert all(len(addresses) == 1 for addresses in seen.values())
    for size in LADDER.sizes:
        (first,), (second,) = seen[size, 0], seen[size, 1]
        assert not set(first) & set(second), "two banks share memory"


def test_outputs_are_copies_of_the_rows_in_use() -> None:
    runner = make_runner(CpuStreams())
    step = runner.open(3)
    fill(step, 10)
    runner.launch(step)
    kept = runner.wait(step)
    for _ in range(2):  # the bank is used again
        other = runner.open(4)
        fill(other, 77)
        runner.launch(other)
        runner.wait(other)
    assert kept["copies"].tolist() == [10, 11, 12]
    assert kept["sums"].tolist() == [30.0, 31.0, 32.0]


def test_outputs_are_reachable_once_and_only_after_launch() -> None:
    """vLLM PR 36013: the host read pinned output before the copy landed."""
    runner = make_runner(CpuStreams())
    step = runner.open(1)
    with pytest.raises(BankStateError):
        runner.wait(step)
    runner.launch(step)
    runner.wait(step)
    with pytest.raises(BankStateError):
        runner.wait(step)
    with pytest.raises(BankStateError):
        runner.launch(step)
    assert not hasattr(step, "outputs")


def test_batch_too_large_takes_no_bank() -> None:
    runner = make_runner(CpuStreams())
    for _ in range(3):
        with pytest.raises(BatchTooLarge):
            runner.open(9)
    for _ in range(2):
        runner.open(8)


def test_reset_forgets_steps_on_their_way() -> None:
    runner = make_runner(CpuStreams())
    launched, opened = runner.open(2), runner.open(2)
    runner.launch(launched)
    runner.reset()
    for stale in (launched, opened):
        with pytest.raises(BankStateError):
            runner.wait(stale)
    step = runner.open(2)
    fill(step, 4)
    runner.launch(step)
    assert runner.wait(step)["copies"].tolist() == [4, 5]


# --- the order of the streams


class LoggingStreams(CpuStreams):
    """As CpuStreams(log), with what the host waits for."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self.log = log
        self.numbers = itertools.count()

    def event(self, name: str, *, timed: bool = False) -> Any:
        name = f"{name}{next(self.numbers)}" if timed else name  # the clock's share a name
        event: Any = super().event(name, timed=timed)
        event.synchronize = lambda: self.log.append(("host", "sync", name))
        return event


class Order:
    """What a log promises on CUDA: a stream keeps its own order, streams and host meet at events,
    and nothing starts before the host has enqueued it."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.earlier: list[set[int]] = []
        last: dict[str, int] = {}
        recorded: dict[str, int] = {}
        for place, (stream, verb, name) in enumerate(log):
            needs = {last[where] for where in (stream, "host") if where in last}
            if verb in ("wait", "sync") and name in recorded:
                needs.add(recorded[name])
            if verb == "record":
                recorded[name] = place
            last[stream] = place
            self.earlier.append(needs.union(*(self.earlier[need] for need in needs)))

    def places(self, verb: str, name: str = "") -> list[int]:
        return [i for i, (_, v, n) in enumerate(self.log) if (v, n) == (verb, name)]

    def is_before(self, first: int, second: int) -> bool:
        return first in self.earlier[second]


def drive(
    streams: Any, log: Log, *, num_steps: int = 7, clock: StepClock | None = None
) -> list[dict[str, Any]]:
    """An asynchronous loop: launches step N+1 before it waits for N. A clock is read every turn, so
    its events come round as early as they may."""
    runner = make_runner(streams, clock=clock)
    in_flight: deque[Step] = deque()
    outputs = []
    for number in range(num_steps + 1):
        if clock is not None:
            clock.collect()
        if number < num_steps:
            step = runner.open(1 + number % 5)
            log.append(("host", "fill", step.bank.name))
            fill(step, 10 * number)
            runner.launch(step)
            in_flight.append(step)
        if len(in_flight) > 1 or number == num_steps:
            oldest = in_flight.popleft()
            outputs.append(runner.wait(oldest))
            log.append(("host", "read", oldest.bank.name))
    return outputs


def broken_orders(log: Log) -> list[str]:
    """Which readers and writers of the same buffer are not kept apart?"""
    order = Order(log)
    runs = order.places("run")
    broken = []

    def check(what: str, before: list[int], after: list[int]) -> None:
        if not all(order.is_before(*pair) for pair in zip(before, after, strict=False)):
            broken.append(what)

    for parity, bank in enumerate(("step0", "step1")):
        fills, reads = order.places("fill", bank), order.places("read", bank)
        ins, own = order.places("copy", f"{bank}.in"), runs[parity::2]
        assert len(fills) == len(ins) == len(own) == len(reads) >= 3
        check("copy-in before the step", ins, own)
        check("step before the host reads", own, reads)
        check("fill before copy-in", fills, ins)
        check("copy-in before the bank's next fill", ins, fills[1:])
        check("step before the bank's next copy-in", own, ins[1:])
        check("host read before the bank's next step", reads, own[1:])
    return broken


@pytest.mark.parametrize("is_timed", [False, True], ids=["", "timed"])
def test_streams_keep_every_reader_and_writer_apart(is_timed: bool) -> None:
    log: Log = []
    streams = LoggingStreams(log)
    drive(streams, log, clock=StepClock(streams) if is_timed else None)
    assert broken_orders(log) == []


def test_copy_in_overlaps_the_step_before() -> None:
    """What two banks are for: nothing orders step N before the copy-in of N+1."""
    log: Log = []
    drive(LoggingStreams(log), log)
    order = Order(log)
    runs = order.places("run")
    ins = sorted(order.places("copy", "step0.in") + order.places("copy", "step1.in"))
    for run, copy in zip(runs, ins[1:], strict=False):
        assert run < copy
        assert not order.is_before(run, copy)


MUTATIONS = {
    "copy-in before the step": ("launch", "streams.wait(COMPUTE, bank.copied)", "pass"),
    "step before the host reads": ("wait", "bank.ready.synchronize()", "pass"),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_missing_event_shows_in_the_order(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = MUTATIONS[what]
    monkeypatch.setattr(Banks, name, mutated(getattr(Banks, name), old, new))
    log: Log = []
    drive(LoggingStreams(log), log)
    assert what in broken_orders(log)


def test_bank_is_reopened_only_after_its_copy_has_passed() -> None:
    """mini-sglang #103, vLLM PR 54269: a pinned buffer rewritten while its copy was pending."""
    log: Log = []
    drive(LoggingStreams(log), log)
    for place, (_, verb, bank) in enumerate(log):
        if verb == "fill":
            assert log[place - 1] == ("host", "sync", f"{bank}.copied")


def test_padding_that_was_cut_off_is_not_trusted() -> None:
    """Ctrl-C between two fields, of another bucket in the same memory."""
    fields = [Field(name, torch.int64, pad=pad) for name, pad in (("a", 0), ("b", -5), ("c", -7))]
    outputs = [Field("out", torch.int64)]
    pipeline = StepPipeline(fields, outputs, BucketLadder((8, 16)), CpuStreams(), num_banks=1)
    runner = EagerRunner(pipeline, lambda _inputs, outputs: outputs["out"].zero_())
    step = runner.open(9)
    runner.launch(step)
    runner.wait(step)

    class CutOff(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            if name == "c":
                raise KeyboardInterrupt
            return super().__getitem__(name)

    buffers = pipeline.buffers[8, 0]
    pipeline.buffers[8, 0] = replace(buffers, host_inputs=CutOff(buffers.host_inputs))
    with pytest.raises(KeyboardInterrupt):
        runner.open(3)
    runner.reset()
    inputs = runner.open(9).inputs
    for field in fields:
        assert (inputs[field.name][9:] == field.pad).all()


def test_padding_is_written_once_for_steps_of_as_many_rows() -> None:
    pipeline = StepPipeline(
        [Field("a", torch.int64, pad=-5)],
        [Field("out", torch.int64)],
        BucketLadder((8,)),
        CpuStreams(),
        num_banks=1,
    )
    runner = EagerRunner(pipeline, lambda _inputs, outputs: outputs["out"].zero_())
    for num_rows, found in ((3, -5), (3, 1), (4, -5)):
        step = runner.open(num_rows)
        assert set(step.inputs["a"][num_rows:].tolist()) == {found}
        step.inputs["a"][num_rows:] = 1  # as nobody does: to see who writes
        runner.launch(step)
        runner.wait(step)


def test_event_is_recorded_once_per_use_and_waited_for_after_that() -> None:
    """SGLang PR 31072: a shared event re-recorded before its waiter was queued."""
    log: Log = []
    drive(LoggingStreams(log), log, num_steps=6)
    for bank, event in itertools.product(("step0", "step1"), ("copied", "ready")):
        name = f"{bank}.{event}"
        verbs = [verb for _, verb, n in log if n == name and verb in ("record", "wait")]
        waits = [] if event == "ready" else ["wait"]
        assert verbs == ["record", *waits] * 3


def test_copies_may_run_as_late_as_their_events_allow() -> None:
    late = drive(LateStreams(), [])
    at_once = drive(CpuStreams(), [])
    for number, (one, other) in enumerate(zip(late, at_once, strict=True)):
        assert one["copies"].tolist() == other["copies"].tolist()
        assert one["copies"].tolist() == [10 * number + i for i in range(1 + number % 5)]


@pytest.mark.parametrize("what", MUTATIONS)
def test_late_copies_show_a_missing_event(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = MUTATIONS[what]
    monkeypatch.setattr(Banks, name, mutated(getattr(Banks, name), old, new))
    right = [output["copies"].tolist() for output in drive(CpuStreams(), [])]
    assert [output["copies"].tolist() for output in drive(LateStreams(), [])] != right


def test_late_copy_of_a_bank_held_back_is_finished_before_the_next_fill() -> None:
    """Even after a reset, which frees banks without waiting for their `ready` event."""
    streams = LateStreams()
    banks = Banks(streams, "bank", in_bytes=16, out_bytes=16, count=1)
    bank = banks.open()
    bank.host_in.fill_(1)
    # Only the copy-in: a launch that was cut off.
    streams.copy(captures.streams.COPY_IN, bank.device_in, bank.host_in, "bank0.in")
    streams.record(bank.copied, captures.streams.COPY_IN)
    banks.reset()
    assert not bank.copied.query()
    banks.open().host_in.fill_(2)
    assert bank.copied.query()
    assert bank.device_in.tolist() == [1] * 16


# --- streams and clock


def test_one_stream_given_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang: torch's stream pool can hand out the same stream twice."""

    class Handle:
        def __init__(self, number: int) -> None:
            self.cuda_stream = number

    numbers = iter([1, 1, 1, 2])
    monkeypatch.setattr(captures.streams, "_cuda_stream", lambda device: Handle(next(numbers)))
    with pytest.raises(RuntimeError, match="same CUDA stream twice"):
        CudaStreams(torch.device("cuda"))
    CudaStreams(torch.device("cuda"))


def test_stream_is_left_as_torch_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's own stream and device are current again, also from inside another stream."""
    current = {0: (10, 0, 1), 1: (11, 1, 1)}
    device = [1]

    def set_stream(*, stream_id: int, device_index: int, device_type: int) -> None:
        current[device_index] = (stream_id, device_index, device_type)
        device[0] = device_index

    fakes: dict[str, Callable[..., object]] = {
        "_cuda_getDevice": lambda: device[0],
        "_cuda_getCurrentStream": lambda index: current[index],
        "_cuda_setStream": set_stream,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch._C, name, fake, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: device.__setitem__(0, index))
    numbers = itertools.count(1)

    def stream(_: torch.device) -> SimpleNamespace:
        number = next(numbers)
        return SimpleNamespace(cuda_stream=number, stream_id=number, device_index=0, device_type=1)

    monkeypatch.setattr(captures.streams, "_cuda_stream", stream)
    streams = CudaStreams(torch.device("cuda", 0))
    with streams.on(COMPUTE):
        with streams.on(captures.streams.COPY_IN):
            assert (current[0], device) == ((2, 0, 1), [0])
        assert (current[0], device) == ((1, 0, 1), [0])
    assert current == {0: (10, 0, 1), 1: (11, 1, 1)}
    assert device == [1]


def test_cpu_gets_the_cpu_twin() -> None:
    assert isinstance(make_streams(torch.device("cpu")), CpuStreams)


class FakeTime:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(captures.streams.time, "perf_counter", lambda: self.now_s)

    def launch(self, clock: StepClock, label: str, *, after_ms: float, busy_ms: float) -> None:
        self.now_s += after_ms / 1e3
        clock.begin(label)
        self.now_s += busy_ms / 1e3
        clock.end()


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return FakeTime(monkeypatch)


def test_clock_adds_up_work_and_gaps(fake_time: FakeTime) -> None:
    clock = StepClock(CpuStreams())
    assert clock.reading.busy_share is None
    fake_time.launch(clock, "prefill", after_ms=50, busy_ms=10)  # nothing before it: no gap
    fake_time.launch(clock, "decode", after_ms=2, busy_ms=3)
    clock.collect()
    fake_time.launch(clock, "decode", after_ms=5, busy_ms=7)
    clock.collect()
    clock.collect()
    reading = clock.reading
    assert reading.busy_ms == pytest.approx(20)
    assert reading.idle_ms == pytest.approx(7)
    assert reading.longest_gap_ms == pytest.approx(5)
    assert reading.busy_share == pytest.approx(20 / 27)
    assert reading.num_launches == {"prefill": 1, "decode": 2}
    assert reading.launch_ms == pytest.approx({"prefill": 10, "decode": 10})


def test_clock_reset_counts_the_gap_to_neither_side(fake_time: FakeTime) -> None:
    clock = StepClock(CpuStreams())
    fake_time.launch(clock, "decode", after_ms=0, busy_ms=1)
    clock.collect()
    clock.reset()
    fake_time.launch(clock, "decode", after_ms=1000, busy_ms=4)
    clock.collect()
    assert clock.reading.busy_ms == pytest.approx(4)
    assert clock.reading.idle_ms == 0


def test_clock_drops_a_launch_that_was_cut_off(fake_time: FakeTime) -> None:
    clock = StepClock(CpuStreams())
    fake_time.launch(clock, "decode", after_ms=0, busy_ms=1)
    clock.begin("decode")
    clock.drop_pending()
    clock.reset()
    fake_time.launch(clock, "decode", after_ms=9, busy_ms=2)
    clock.collect()
    assert clock.reading.num_launches == {"decode": 1}
    assert clock.reading.busy_ms == pytest.approx(2)


def test_clock_recycles_its_events() -> None:
    class Counting(CpuStreams):
        num_events = 0

        def event(self, name: str, *, timed: bool = False) -> Any:
            self.num_events += 1
            return super().event(name, timed=timed)

    streams = Counting()
    clock = StepClock(streams)
    for _ in range(500):
        clock.begin("decode")
        clock.end()
        clock.collect()
    assert streams.num_events <= 8


def test_clock_reads_many_at_once_where_it_is_told_to() -> None:
    clock = StepClock(CpuStreams())
    seen = []
    for _ in range(7):
        clock.begin("decode")
        clock.end()
        seen.append(len(clock.collect(least=3)))
    assert seen == [0, 0, 3, 0, 0, 3, 0]
    assert len(clock.collect()) == 1


def test_clock_leaves_a_launch_that_was_cut_off() -> None:
    """Its end was recorded never, or for an earlier launch."""
    clock = StepClock(CpuStreams())
    for _ in range(3):
        clock.begin("decode")
        clock.end()
        clock.collect()
    clock.begin("decode")
    assert clock.collect() == []
    clock.end()
    assert len(clock.collect()) == 1


def test_clock_of_a_launch_on_its_way_is_not_read(fake_time: FakeTime) -> None:
    streams = LateStreams()
    clock = StepClock(streams)
    clock.begin("decode")
    clock.end()
    ends = clock._pending[COMPUTE][-1].end
    streams.copy(captures.streams.COPY_IN, torch.zeros(1), torch.zeros(1), "held")
    streams.record(ends, captures.streams.COPY_IN)
    clock.collect()
    assert clock.reading.num_launches == {}
    streams.synchronize()
    clock.collect()
    assert clock.reading.num_launches == {"decode": 1}


def test_pipeline_times_each_step() -> None:
    streams = CpuStreams()
    clock = StepClock(streams)
    runner = make_runner(streams, clock=clock)
    for _ in range(3):
        step = runner.open(1)
        runner.launch(step)
        runner.wait(step)
    clock.collect()
    assert clock.reading.num_launches == {"step": 3}
    assert clock.reading.busy_ms > 0
