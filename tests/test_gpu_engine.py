"""Does a captured step give what a called one gives, and does nothing race? All of it on CUDA.

Two kinds of worlds. float32 with plain attention: rounding is far below the distance of two logits,
so tokens must be the oracle's whatever the batch. bfloat16 with flash-attn, as in use: rounding
depends on the shapes of a step, so tokens are compared between runs that take the same steps, and
there they must be equal to the last bit.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import hf_config, write_checkpoint
from launches import record_launches
from paged import skip_without_flash4
from tiny import World, make_world, request

import graphengine.build
from captures import (
    COMPUTE,
    Banks,
    BucketLadder,
    CaptureError,
    CudaStreams,
    EagerRunner,
    Field,
    GraphRunner,
    Step,
    StepClock,
    StepPipeline,
)
from captures.streams import COPY_IN, STREAMS
from graphengine import LLM, Request, RequestOutput
from graphengine.block_manager import BlockManager
from graphengine.errors import BackendError
from graphengine.model_runner import ModelRunner
from graphengine.prefill_graphs import PrefillGraphs

pytestmark = pytest.mark.gpu

# torch.cuda._sleep counts clock cycles; a card of 2 GHz sleeps a fifth of a second.
LONG_SLEEP = 400_000_000
SHORT_SLEEP = 2_000_000
VOCAB_SIZE = 1000
MAX_MODEL_LEN = 512
MAX_NUM_SEQS = 40


@pytest.fixture(autouse=True)
def default_sync_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("tiny"))


def exact_llm(world: World, **options: Any) -> LLM:
    """float32 and plain attention, for comparison with the oracle."""
    defaults: dict[str, Any] = {
        "device": "cuda",
        "attention": "reference",
        "dtype": "float32",
        "max_num_seqs": 7,
        "num_gpu_blocks_override": 64,
    }
    return world.llm(**{**defaults, **options})


def mixed_requests(count: int, vocab_size: int = 32) -> list[Request]:
    rng = random.Random(5)
    return [
        request(
            [rng.randrange(vocab_size) for _ in range(1 + index % 13)],
            temperature=(0.0, 1.3)[index % 2],
            top_p=(1.0, 0.9)[index % 3 == 0],
            top_k=(0, 8)[index % 5 == 0],
            seed=index,
            max_tokens=1 + 5 * index % 15,
            min_tokens=index % 2,
            stop_token_ids=[index % 30, 11],
            ignore_eos=index % 4 == 0,
            stop=["ab", "d"] if index % 6 == 0 else [],
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module", params=[64, 128], ids=["head_dim 64", "head_dim 128"])
def flash_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Small, with logits that every weight and every token before shows in."""
    return write_checkpoint(
        tmp_path_factory.mktemp("flash"),
        "llama_gqa_llama3",
        dtype=torch.bfloat16,
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=512 // request.param,
        num_key_value_heads=2,
        head_dim=request.param,
        max_position_embeddings=MAX_MODEL_LEN,
    )


def flash_llm(path: Path, **options: Any) -> LLM:
    defaults: dict[str, Any] = {
        "device": "cuda",
        "attention": "flash",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
        "num_gpu_blocks_override": 2 * MAX_NUM_SEQS,
    }
    return LLM(str(path), **{**defaults, **options})


def long_requests(count: int, **params: Any) -> list[Request]:
    """Prompts and outputs on both sides of a block's border at 256."""
    rng = random.Random(7)
    lengths = [1 + 53 * index % 290 if index % 2 else 230 + index % 26 for index in range(count)]
    return [
        request(
            [rng.randrange(VOCAB_SIZE) for _ in range(lengths[index])],
            **{
                "temperature": (0.0, 0.8)[index % 2],
                "seed": index,
                "max_tokens": 1 + 17 * index % 61,
                "ignore_eos": True,
                **params,
            },
        )
        for index in range(count)
    ]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    assert not any(output.error for output in outputs)
    return [output.outputs[0].token_ids for output in sorted(outputs, key=lambda o: o.index)]


def run(llm: LLM, requests: list[Request]) -> list[list[int]]:
    """A list is batched by its contents alone, so two runs take the same steps."""
    return tokens(list(llm.stream(requests)))


# --- graph and eager


def test_graph_gives_what_eager_gives_in_every_bucket(
    flash_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers PR 45323: a number frozen at capture; GSM8K fell from 0.45 to 0.23."""
    used: set[int] = set()
    original = StepPipeline.launch

    def launch(self: StepPipeline, step: Step, execute: Any) -> None:
        used.add(step.bucket)
        original(self, step, execute)

    monkeypatch.setattr(StepPipeline, "launch", launch)
    sizes = BucketLadder.up_to(MAX_NUM_SEQS).sizes
    counts = sorted({*sizes, *(size - 1 for size in sizes if size > 1)})
    results = []
    for enforce_eager in (False, True):
        used.clear()
        with flash_llm(flash_checkpoint, enforce_eager=enforce_eager) as llm:
            results.append([run(llm, long_requests(count, max_tokens=6)) for count in counts])
        assert used == set(sizes)
    for count, graph, eager in zip(counts, *results, strict=True):
        assert graph == eager, f"{count} rows"


# Two layers as wide as a Qwen3-0.6B's, a Llama-3.2-1B's (heads of 64) and a Llama-3.1-8B's.
WIDE = {
    "0.6B": ("qwen3", 1024, 3072, 16, 128),
    "1B": ("llama_gqa_llama3", 2048, 8192, 32, 64),
    "8B": ("llama_gqa_llama3", 4096, 14336, 32, 128),
}


@pytest.fixture(scope="module", params=WIDE)
def wide_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    variant, hidden_size, intermediate_size, num_heads, head_dim = WIDE[request.param]
    return write_checkpoint(
        tmp_path_factory.mktemp(request.param),
        variant,
        dtype=torch.bfloat16,
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        max_position_embeddings=MAX_MODEL_LEN,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"tuning": "off"}, {"attention": "flash4"}, {"async_scheduling": False}],
    ids=str,
)
def test_graph_gives_what_eager_gives_by_the_kernels_of_wide_models(
    wide_checkpoint: Path,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "attention" in options:
        skip_without_flash4()
        monkeypatch.setattr("graphengine.attention.flash4.MIN_MEAN_LENGTH", 100)
    monkeypatch.setattr("graphengine.tuning.CACHE", tmp_path / "products")
    launched = record_launches(monkeypatch)
    counts = (1, 7, 16, 32, 48, 64, 70, 130, 256)
    settings = {"max_num_seqs": 256, "num_gpu_blocks_override": 512, **options}
    results = []
    for enforce_eager in (False, True):
        launched.clear()
        with flash_llm(wide_checkpoint, enforce_eager=enforce_eager, **settings) as llm:
            results.append([run(llm, long_requests(count, max_tokens=6)) for count in counts])
        if torch.cuda.get_device_capability()[0] == 9:
            # Of up to 32 rows, of up to 64, and of more.
            assert {"decode_chain", "decode_attention", "row_attention"} <= launched
    for count, graph, eager in zip(counts, *results, strict=True):
        assert graph == eager, f"{count} rows"


@pytest.mark.parametrize(("num_blocks", "async_scheduling"), [(60, True), (24, True), (24, False)])
def test_graph_gives_what_eager_gives_across_buckets(
    flash_checkpoint: Path, num_blocks: int, async_scheduling: bool
) -> None:
    """Mixed lengths: rows come and go, prompts are chunked, and few blocks force preemption."""
    requests = long_requests(90)
    results = []
    for enforce_eager in (False, True):
        with flash_llm(
            flash_checkpoint,
            enforce_eager=enforce_eager,
            async_scheduling=async_scheduling,
            num_gpu_blocks_override=num_blocks,
            max_num_batched_tokens=700,
        ) as llm:
            results.append(run(llm, requests))
            assert (llm.stats().num_preemptions > 0) == (num_blocks == 24)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"async_scheduling": False},
        {"max_num_seqs": 1},
        {"max_num_seqs": 16, "num_gpu_blocks_override": 9, "max_num_batched_tokens": 5},
        {"block_size": 1, "num_gpu_blocks_override": 40, "max_num_batched_tokens": 3},
        {"block_size": 16, "num_gpu_blocks_override": 4, "async_scheduling": False},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
def test_every_request_gives_what_it_gives_alone(world: World, options: dict[str, Any]) -> None:
    requests = mixed_requests(60)
    with exact_llm(world, **options) as llm:
        assert world.wrong(requests, list(llm.stream(requests))) == []
        # An iterator: batches then depend on what is there in time, tokens do not.
        assert world.wrong(requests, list(llm.stream(iter(requests)))) == []
        assert llm._blocks.num_free == llm.num_blocks


def test_seeds_do_not_depend_on_the_batch(world: World) -> None:
    """The sampler on CUDA: the same tokens alone, in any order, and in any bucket."""
    requests = [
        request([3 + n, 7], temperature=1.5, top_p=0.95, seed=n, max_tokens=12, ignore_eos=True)
        for n in range(16)
    ]
    with exact_llm(world, max_num_seqs=16) as llm:
        together = run(llm, requests)
        assert run(llm, requests[::-1])[::-1] == together
        assert [run(llm, [item])[0] for item in requests[:4]] == together[:4]
    with exact_llm(world, max_num_seqs=3, enforce_eager=True) as llm:
        assert run(llm, requests) == together
    assert len({tuple(ids) for ids in together}) == 16


# --- what is in the cache


def shuffle_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BlockManager.__init__

    def init(self: BlockManager, num_blocks: int, block_size: int) -> None:
        original(self, num_blocks, block_size)
        random.Random(num_blocks).shuffle(self._free)

    monkeypatch.setattr(BlockManager, "__init__", init)


def test_block_ids_do_not_matter(flash_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = long_requests(60)
    with flash_llm(flash_checkpoint) as llm:
        in_order = run(llm, requests)
        with monkeypatch.context() as context:
            shuffle_blocks(context)
            assert run(llm, requests) == in_order


def test_block_ids_do_not_matter_to_the_oracle(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffle_blocks(monkeypatch)
    requests = mixed_requests(60)
    with exact_llm(world, block_size=2, num_gpu_blocks_override=30) as llm:
        assert world.wrong(requests, list(llm.stream(requests))) == []


def poison(llm: LLM) -> None:
    """Slots never written hold NaN, as memory fresh from the driver may. Not the null block."""
    for cache in (*llm._runner._kv.k, *llm._runner._kv.v):
        cache[1:] = float("nan")
    torch.cuda.synchronize()


def test_slots_never_written_are_never_seen(world: World) -> None:
    requests = mixed_requests(40)
    with exact_llm(world) as llm:
        poison(llm)
        assert world.wrong(requests, list(llm.stream(requests))) == []


@pytest.mark.parametrize("attention", ["flash", "flash4"])
def test_flash_sees_no_slot_never_written(
    flash_checkpoint: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "flash4":
        skip_without_flash4()
        monkeypatch.setattr("graphengine.attention.flash4.MIN_MEAN_LENGTH", 1)
    requests = long_requests(50)
    with flash_llm(flash_checkpoint, max_num_batched_tokens=300, attention=attention) as llm:
        assert llm.attention == attention
        clean = run(llm, requests)
        poison(llm)
        assert run(llm, requests) == clean


def test_auto_prefills_by_flash4_as_if_it_were_named(
    flash_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a folder of tuning goes on with what began with it."""
    skip_without_flash4()
    monkeypatch.setattr("graphengine.attention.flash4.MIN_MEAN_LENGTH", 1)
    requests = long_requests(50)
    results = []
    for attention in ("auto", "flash4"):
        with flash_llm(flash_checkpoint, attention=attention, tuning=str(tmp_path)) as llm:
            assert llm.attention == "flash4"
            results.append(run(llm, requests))
    assert results[0] == results[1]
    begun = json.loads(next(tmp_path.glob("*.json")).read_text())["ways"]
    assert begun["attention"] == "flash4"
    monkeypatch.setattr("graphengine.attention.flash4_kernels.VERSION", "4.0.0")
    with pytest.raises(BackendError, match="begin anew"):
        flash_llm(flash_checkpoint, attention="auto", tuning=str(tmp_path))


# --- no hidden stop


def test_sync_debug_mode_sees_a_sync() -> None:
    """Otherwise the next test shows nothing."""
    values = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        values.sum().item()


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graph", "eager"])
def test_hot_loop_never_syncs(
    flash_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
) -> None:
    """SGLang #34782, #28491. From one launch to a later one: schedule, fill, launch, wait, commit;
    the events the host waits for are no syncs of the device."""
    first, last = 12, 60
    launches = itertools.count()
    original = ModelRunner.launch

    def launch(self: ModelRunner, batch: Any, table: Any) -> Any:
        number = next(launches)
        if number == first:
            torch.cuda.set_sync_debug_mode("error")
        if number == last:
            torch.cuda.set_sync_debug_mode("default")
        return original(self, batch, table)

    requests = long_requests(8, max_tokens=80)
    with flash_llm(flash_checkpoint, enforce_eager=enforce_eager) as llm:
        run(llm, requests)  # warm-up
        monkeypatch.setattr(ModelRunner, "launch", launch)
        outputs = run(llm, requests)
    assert next(launches) > last
    assert all(len(token_ids) == 80 for token_ids in outputs)


# --- copies that are held back

INPUTS = (Field("numbers", torch.int64, pad=-5), Field("pairs", torch.float32, (2,)))
OUTPUTS = (Field("sums", torch.float32), Field("copies", torch.int64))
LADDER = BucketLadder([1, 2, 4, 8])


def add_up(inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
    # Pinned memory: a copy that waits could not be captured.
    outputs["sums"].copy_(inputs["numbers"] + inputs["pairs"].sum(1), non_blocking=True)
    outputs["copies"].copy_(inputs["numbers"], non_blocking=True)


def make_runner(streams: CudaStreams, *, use_graphs: bool) -> GraphRunner | EagerRunner:
    pipeline = StepPipeline(INPUTS, OUTPUTS, LADDER, streams)
    torch.cuda.synchronize()
    return GraphRunner(pipeline, add_up, streams) if use_graphs else EagerRunner(pipeline, add_up)


def hold(streams: CudaStreams, stream: str, cycles: int) -> None:
    with streams.on(stream):
        torch.cuda._sleep(cycles)


@pytest.mark.parametrize("use_graphs", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("held", [*STREAMS, "all in turn"])
def test_data_arrive_right_whichever_stream_is_held(held: str, use_graphs: bool) -> None:
    streams = CudaStreams(torch.device("cuda", 0))
    runner = make_runner(streams, use_graphs=use_graphs)
    turns = itertools.cycle(STREAMS if held == "all in turn" else [held])
    in_flight: deque[tuple[int, Step]] = deque()

    def check(number: int, step: Step) -> None:
        outputs = runner.wait(step)
        expected = [10 * number + row for row in range(step.num_rows)]
        assert outputs["copies"].tolist() == expected
        assert outputs["sums"].tolist() == [value + 2.0 * number for value in expected]

    for number in range(24):
        hold(streams, next(turns), SHORT_SLEEP)
        rows = 1 + number % 8
        step = runner.open(rows)
        step.inputs["numbers"][:rows] = [10 * number + row for row in range(rows)]
        step.inputs["pairs"][:rows] = number
        runner.launch(step)
        in_flight.append((number, step))
        if len(in_flight) > 1:
            check(*in_flight.popleft())
    check(*in_flight.popleft())
    runner.close()


def test_bank_is_not_reopened_while_its_copy_is_held() -> None:
    """mini-sglang #103, vLLM PR 54269 and #31841: a pinned buffer rewritten under its copy."""
    streams = CudaStreams(torch.device("cuda", 0))
    banks = Banks(streams, "bank", in_bytes=1 << 20, out_bytes=16, count=1)
    torch.cuda.synchronize()
    bank = banks.open()
    bank.host_in.fill_(1)
    hold(streams, COPY_IN, LONG_SLEEP)
    streams.copy(COPY_IN, bank.device_in, bank.host_in, "held")
    streams.record(bank.copied, COPY_IN)
    banks.reset()  # free by its state, but not by its copy
    assert not bank.copied.query(), "the copy was not held"
    again = banks.open()
    assert again is bank
    assert bank.copied.query(), "reopened under its copy"
    bank.host_in.fill_(2)
    streams.synchronize()
    assert bool((bank.device_in == 1).all())


@pytest.mark.parametrize("held", STREAMS)
def test_wait_blocks_until_the_outputs_are_there(held: str) -> None:
    """vLLM PR 36013: the host read pinned output before the copy landed."""
    streams = CudaStreams(torch.device("cuda", 0))
    runner = make_runner(streams, use_graphs=True)
    hold(streams, held, LONG_SLEEP)
    step = runner.open(2)
    step.inputs["numbers"][:2] = (41, 42)
    step.inputs["pairs"][:2] = 0.5
    runner.launch(step)
    assert not step.bank.ready.query(), "launch waited for the device"
    outputs = runner.wait(step)
    assert step.bank.ready.query()
    assert outputs["copies"].tolist() == [41, 42]
    assert outputs["sums"].tolist() == [42.0, 43.0]
    runner.close()


class SlowCopies(CudaStreams):
    """Every copy comes late, by another time each."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rng = random.Random(3)

    def copy(self, stream: str, dst: torch.Tensor, src: torch.Tensor, what: str) -> None:
        hold(self, stream, self.rng.randrange(SHORT_SLEEP))
        super().copy(stream, dst, src, what)


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graph", "eager"])
def test_slow_copies_change_no_token(
    world: World, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
) -> None:
    monkeypatch.setattr(graphengine.build, "make_streams", SlowCopies)
    requests = mixed_requests(40)
    with exact_llm(world, enforce_eager=enforce_eager, num_gpu_blocks_override=12) as llm:
        assert world.wrong(requests, list(llm.stream(requests))) == []


def test_streams_are_two() -> None:
    streams = CudaStreams(torch.device("cuda", 0))
    handles = set()
    for name in STREAMS:
        with streams.on(name):
            handles.add(torch.cuda.current_stream().cuda_stream)
            with streams.on(STREAMS[0]):
                assert torch.cuda.current_stream() == streams._streams[STREAMS[0]]
            assert torch.cuda.current_stream() == streams._streams[name]
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert len(handles) == len(STREAMS)
    assert torch.cuda.default_stream().cuda_stream not in handles


# --- capture


def test_capture_report_names_every_bucket(flash_checkpoint: Path) -> None:
    with flash_llm(flash_checkpoint) as llm:
        report = llm.capture_report
    assert report is not None
    sizes = set(BucketLadder.up_to(MAX_NUM_SEQS).sizes)
    assert set(report.seconds) == set(report.bytes) == sizes
    assert report.num_graphs == 2 * len(sizes)  # two banks
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert all(num_bytes >= 0 for num_bytes in report.bytes.values())
    assert 0 < report.total_s < 60
    assert report.total_bytes < 2**30
    with flash_llm(flash_checkpoint, enforce_eager=True) as llm:
        assert llm.capture_report is None


def test_capture_of_a_prefill_leaves_one_on_its_way_alone(world: World) -> None:
    """Its inputs are read by every layer, while the host may capture a bucket for the next one."""
    with exact_llm(world) as llm:
        runner: Any = llm._runner
        streams = runner._streams
        ladder = BucketLadder([8, 16, 24])
        graphs = PrefillGraphs(runner._model, runner._kv, streams, ladder, captures=True)
        positions = graphs._largest.inputs["positions"]
        with streams.on(COMPUTE):
            positions.fill_(7)
            torch.cuda._sleep(LONG_SLEEP)
            seen = positions.clone()
        for _ in range(4):
            graphs.prepare(16)
        assert 16 in graphs._captured
        streams.synchronize()
        assert bool((seen == 7).all())
        graphs.close()


def test_failed_capture_names_its_bucket() -> None:
    streams = CudaStreams(torch.device("cuda", 0))
    calls: dict[int, int] = {}

    def fails_in_bucket_2(
        inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> None:
        rows = len(outputs["sums"])
        calls[rows] = calls.get(rows, 0) + 1
        if rows == 2 and calls[rows] == 2:  # the warm-up passes
            raise ValueError("not today")
        add_up(inputs, outputs)

    pipeline = StepPipeline(INPUTS, OUTPUTS, LADDER, streams)
    torch.cuda.synchronize()
    with pytest.raises(CaptureError, match="2-row bucket failed: not today"):
        GraphRunner(pipeline, fails_in_bucket_2, streams)
    # The stream captures no longer.
    make_runner(streams, use_graphs=True).close()


def test_clock_measures_the_device(flash_checkpoint: Path) -> None:
    with flash_llm(flash_checkpoint) as llm:
        run(llm, long_requests(20, max_tokens=40))
        stats = llm.stats()
    assert stats.gpu_busy is not None
    assert 0.0 < stats.gpu_busy <= 1.0
    assert 0.0 < stats.decode_ms < 1000.0
    assert 0.0 < stats.prefill_ms < 1000.0
    assert stats.decode_ms * stats.num_decode_steps < 1000.0 * stats.elapsed_s


def test_clock_counts_a_held_stream_as_work() -> None:
    streams = CudaStreams(torch.device("cuda", 0))
    clock = StepClock(streams)
    for _ in range(3):
        clock.begin("step")
        hold(streams, COMPUTE, LONG_SLEEP // 10)
        clock.end()
    clock.collect()
    assert clock.reading.num_launches.get("step", 0) < 3, "collect waited"
    streams.synchronize()
    clock.collect()
    assert clock.reading.num_launches == {"step": 3}
    assert clock.reading.busy_share is not None
    assert clock.reading.busy_share > 0.9


# --- memory and the end


def used_bytes() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graph", "eager"])
def test_memory_stays_within_what_was_granted(tmp_path: Path, enforce_eager: bool) -> None:
    """Half of the card, then the largest prefills there are, and every bucket: nothing is taken
    that was not planned for. A wide MLP and a large vocabulary, so that a prefill takes much."""
    gc.collect()
    torch.cuda.empty_cache()
    config = hf_config(
        "llama_gqa_llama3",
        architectures=["LlamaForCausalLM"],
        vocab_size=64_000,
        hidden_size=1024,
        intermediate_size=16_384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=16_384,
    )
    config.save_pretrained(tmp_path)
    share, budget = 0.5, 8192
    total = torch.cuda.mem_get_info()[1]
    slack = 256 * 2**20  # lazily loaded kernels and library workspaces
    with LLM(
        str(tmp_path),
        device="cuda",
        dtype="bfloat16",
        load_format="dummy",
        skip_tokenizer_init=True,
        gpu_memory_utilization=share,
        max_num_seqs=64,
        max_num_batched_tokens=budget,
        enforce_eager=enforce_eager,
    ) as llm:
        assert used_bytes() <= share * total + slack
        assert used_bytes() >= 0.8 * share * total, "memory was granted and not used"
        reserved = torch.cuda.memory_reserved()
        params = {"temperature": 1.0, "max_tokens": 5, "ignore_eos": True}
        for requests in (
            [request([3] * (budget // 64), **params) for _ in range(64)],  # most sequences
            [request([3] * (budget - 1), **params) for _ in range(3)],  # longest sequence
            [request([3] * 16_000, **params) for _ in range(3)],  # chunks with context
            [request([3], **{**params, "max_tokens": 1 + n}) for n in range(64)],  # every bucket
        ):
            run(llm, requests)
            assert used_bytes() <= share * total + slack
        assert torch.cuda.memory_reserved() - reserved <= slack


def test_closing_gives_the_memory_back(flash_checkpoint: Path) -> None:
    def open_and_close() -> None:
        with flash_llm(flash_checkpoint) as llm:
            run(llm, long_requests(4, max_tokens=4))

    open_and_close()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        open_and_close()
        left = torch.cuda.memory_allocated() - before
    finally:
        gc.enable()
    assert left < 2**20, "something keeps the weights or the cache"


def test_engine_outlives_the_end_of_another(flash_checkpoint: Path) -> None:
    """Its graphs hold cuBLAS's workspaces, which the other's end gives back if they are unused."""
    some = [request([1, 2, 3 + i], temperature=0.0, max_tokens=20) for i in range(40)]
    with flash_llm(flash_checkpoint) as llm:
        before = [output.outputs[0].token_ids for output in llm.generate(some)]
        with flash_llm(flash_checkpoint) as other:
            other.generate(some)
        assert [output.outputs[0].token_ids for output in llm.generate(some)] == before


def test_two_engines_after_each_other_get_the_same_memory(flash_checkpoint: Path) -> None:
    options = {"num_gpu_blocks_override": None, "gpu_memory_utilization": 0.5}
    blocks = []
    for _ in range(2):
        with flash_llm(flash_checkpoint, **options) as llm:
            blocks.append(llm.num_blocks)
    assert blocks[1] >= 0.98 * blocks[0]


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graph", "eager"])
def test_interrupt_leaves_the_engine_usable(
    world: World, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
) -> None:
    requests = mixed_requests(20)
    with exact_llm(world, enforce_eager=enforce_eager) as llm:
        for name in ("launch", "_launch_decode", "_launch_prefill"):
            calls = itertools.count()
            original = getattr(ModelRunner, name)

            def interrupted(
                *args: Any, _calls: Iterator[int] = calls, _original: Any = original
            ) -> Any:
                if next(_calls) == 2:
                    raise KeyboardInterrupt
                return _original(*args)

            with monkeypatch.context() as context:
                context.setattr(ModelRunner, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    list(llm.stream(requests))
            assert world.wrong(requests, list(llm.stream(requests))) == []
        stream = llm.stream(requests)
        next(stream)
        stream.close()
        assert world.wrong(requests, list(llm.stream(requests))) == []
