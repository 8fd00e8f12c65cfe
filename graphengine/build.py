"""How is the device side put together? Weights, then as many KV blocks as fit, then graphs; kernels
compile while the weights are read."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from captures import BucketLadder, CaptureError, StepClock, Streams, make_streams
from graphengine.attention.flash import FlashAttention
from graphengine.errors import CapacityError
from graphengine.kernels import Kernels, kernels_for
from graphengine.kernels.ahead import compiled_ahead
from graphengine.kv_cache import KVCache
from graphengine.metrics import Laps
from graphengine.model import DecoderModel, layers_to_try
from graphengine.model_runner import ModelRunner
from graphengine.resolve import Resolved, keep_attention
from graphengine.sequence_table import SequenceTable
from graphengine.weights import check_weights, dummy_weights, load_weights

# It needs Triton.
if TYPE_CHECKING:
    from graphengine.tuning import Tuning

# Without a figure from the user the CPU's KV cache takes what could be used, at most this much.
CPU_KV_BYTES = 2**30
# The trial captures two buckets and the estimate is for all; it gets this much more.
_GRAPH_MARGIN = 1.2


def build_runner(resolved: Resolved, laps: Laps) -> tuple[StepClock, ModelRunner, int]:
    """The clock, the runner with weights loaded and graphs captured, and the number of KV blocks
    sequences can hold. Raises WeightsError and CapacityError."""
    try:
        return _build_runner(resolved, laps)
    except (torch.OutOfMemoryError, CaptureError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise CapacityError(
            f"memory ran out while the engine was made ({' '.join(str(error).split())[:200]}); "
            "free some, or lower gpu_memory_utilization, kv_cache_memory_bytes, max_model_len or "
            "max_num_batched_tokens"
        ) from error


def _is_out_of_memory(error: BaseException | None) -> bool:
    """The CPU allocator of torch says it with a plain RuntimeError."""
    if error is None:
        return False
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or "allocate memory" in str(error) or _is_out_of_memory(error.__cause__)


def _build_runner(resolved: Resolved, laps: Laps) -> tuple[StepClock, ModelRunner, int]:
    if resolved.device.type == "cuda":
        torch.cuda.synchronize(resolved.device)  # makes the context, unless there is one
    laps.end("device")
    kernels = kernels_for(resolved.device)
    tuning = _make_tuning(resolved)
    if tuning is not None:
        kernels = tuning.kernels
    laps.end("imports")  # of Triton
    # Where nothing has to be measured, too little memory is known before the weights are read.
    num_blocks = _num_blocks_if_known(resolved)
    if num_blocks is not None:
        check_one_sequence_fits(num_blocks, resolved)
    if resolved.config.load_format != "dummy":
        # Headers only: a bad checkpoint fails before anything is allocated.
        check_weights(resolved.model_path, resolved.model_config)
    streams = make_streams(resolved.device)
    with _kernels_compiling(resolved, kernels, tuning, streams, laps):
        model = _load_model(resolved, kernels)
        laps.end("weights")
    # Before products are measured: a file of products alone is older than the choice of attention.
    keep_attention(resolved)
    if tuning is not None:
        tuning.measure(model, streams)
        laps.end("tuning")
    with model.exclusive():
        return _make_ready(resolved, laps, model, kernels, streams, num_blocks)


def _make_tuning(resolved: Resolved) -> Tuning | None:
    """None where products run in one way only, or as their rule says."""
    if resolved.device.type != "cuda" or resolved.config.tuning == "off":
        return None
    if resolved.dtype == torch.float32:
        return None
    from graphengine.tuning import Tuning

    return Tuning(resolved)


@contextlib.contextmanager
def _kernels_compiling(
    resolved: Resolved, kernels: Kernels, tuning: Tuning | None, streams: Streams, laps: Laps
) -> Iterator[None]:
    """Within it the kernels that steps will launch compile, in threads."""
    if resolved.device.type != "cuda":
        yield
        return
    with compiled_ahead(resolved.device, lambda: rehearse(resolved, kernels, tuning, streams)):
        laps.end("kernels")
        yield
    laps.end("kernels")


def rehearse(resolved: Resolved, kernels: Kernels, tuning: Tuning | None, streams: Streams) -> None:
    """Runs every kind of step there is, on the null block, by a model of few layers, with weights
    nobody has set; and each way of products that are to be measured. Blocks until done."""
    model_config = resolved.model_config
    windows = model_config.sliding_windows
    windows = tuple(windows[index] for index in layers_to_try(windows))
    model_config = dataclasses.replace(
        model_config, num_layers=len(windows), sliding_windows=windows
    )
    config = dataclasses.replace(resolved.config, enforce_eager=True)
    resolved = dataclasses.replace(resolved, config=config, model_config=model_config)
    model = _empty_model(resolved, kernels)
    if tuning is not None:
        tuning.rehearse(model)
    clock = StepClock(streams)
    runner = _make_runner(resolved, model, kernels, streams, clock, 0, resolved.ladder)
    runner.run_all_kinds_of_steps(make_table(resolved), max_context=context_to_try(resolved))
    runner.close()
    del model
    if resolved.device.type == "cuda":
        torch.cuda.empty_cache()


def _make_ready(
    resolved: Resolved,
    laps: Laps,
    model: DecoderModel,
    kernels: Kernels,
    streams: Streams,
    num_blocks: int | None,
) -> tuple[StepClock, ModelRunner, int]:
    """KV cache and graphs for a model with its weights."""
    if num_blocks is None:
        num_blocks = _num_blocks_that_fit(resolved, model, kernels, streams)
        check_one_sequence_fits(num_blocks, resolved)
    laps.end("memory")
    clock = StepClock(streams, times_copies=resolved.config.trace is not None)
    runner = _make_runner(resolved, model, kernels, streams, clock, num_blocks, resolved.ladder)
    if resolved.device.type == "cuda":
        # Takes from the allocator now what the largest steps will ever need of it.
        runner.run_largest_steps(make_table(resolved), max_context=context_to_try(resolved))
        clock.reset()
    laps.end("graphs")
    return clock, runner, num_blocks


def make_table(resolved: Resolved) -> SequenceTable:
    return SequenceTable(resolved.config.max_num_seqs, resolved.max_model_len, resolved.block_size)


def context_to_try(resolved: Resolved) -> int:
    """Length of the prompt whose last chunk takes as much memory as that of any. flash-attn 2 reads
    the cache in place and allocates by queries, or little for single ones, so that a little context
    tells all, in less time. Other backends gather or copy what they read."""
    if resolved.attention.name != FlashAttention.name:
        return resolved.max_model_len
    return min(resolved.max_model_len, resolved.config.max_num_batched_tokens + resolved.block_size)


def cpu_kv_bytes(resolved: Resolved) -> int:
    """What max_num_seqs sequences of max_model_len need, null block included, at most
    CPU_KV_BYTES."""
    width = math.ceil(resolved.max_model_len / resolved.block_size)
    return min(CPU_KV_BYTES, (resolved.config.max_num_seqs * width + 1) * resolved.bytes_per_block)


def blocks_in(kv_bytes: int, resolved: Resolved) -> int:
    """KV blocks in `kv_bytes`, the null block not counted."""
    return max(0, kv_bytes // resolved.bytes_per_block - 1)


def check_one_sequence_fits(num_blocks: int, resolved: Resolved) -> None:
    """Raises CapacityError unless one sequence of max_model_len fits: only then can a sequence that
    is alone always run to its end."""
    block_size = resolved.block_size
    needed = math.ceil(resolved.max_model_len / block_size)
    if num_blocks >= needed:
        return
    config = resolved.config
    if config.num_gpu_blocks_override is not None:
        remedy = "raise num_gpu_blocks_override"
    elif config.kv_cache_memory_bytes is not None or resolved.device.type != "cuda":
        remedy = "raise kv_cache_memory_bytes"
    else:
        remedy = "raise gpu_memory_utilization"
    if num_blocks > 0:
        remedy = f"lower max_model_len to {num_blocks * block_size} or {remedy}"
    elif config.block_size is not None and block_size > resolved.max_model_len:
        remedy = f"lower block_size or {remedy}"  # which is mostly padding
    raise CapacityError(
        f"one sequence of max_model_len {resolved.max_model_len} needs {needed} KV blocks of "
        f"{block_size} tokens, the memory granted holds {num_blocks}; {remedy}"
    )


def _load_model(resolved: Resolved, kernels: Kernels) -> DecoderModel:
    model = _empty_model(resolved, kernels)
    if resolved.config.load_format == "dummy":
        dummy_weights(model, seed=resolved.config.seed)
    else:
        load_weights(model, resolved.model_path, resolved.model_config)
    return model


def _empty_model(resolved: Resolved, kernels: Kernels) -> DecoderModel:
    return DecoderModel(
        resolved.model_config,
        dtype=resolved.dtype,
        device=resolved.device,
        kernels=kernels,
        attention=resolved.attention,
        max_model_len=resolved.max_model_len,
        block_size=resolved.block_size,
    )


def _make_runner(
    resolved: Resolved,
    model: DecoderModel,
    kernels: Kernels,
    streams: Streams,
    clock: StepClock,
    num_blocks: int,
    ladder: BucketLadder,
) -> ModelRunner:
    kv = KVCache(
        resolved.model_config,
        num_blocks + 1,
        block_size=resolved.block_size,
        dtype=resolved.dtype,
        device=resolved.device,
    )
    return ModelRunner(
        model,
        kv,
        make_table(resolved),
        kernels=kernels,
        streams=streams,
        clock=clock,
        ladder=ladder,
        use_graphs=resolved.use_graphs,
        max_num_batched_tokens=resolved.config.max_num_batched_tokens,
    )


def _num_blocks_if_known(resolved: Resolved) -> int | None:
    """KV blocks beside the null block, by the user's figure or the CPU's rule; None where they
    depend on what is left of the GPU's memory."""
    config = resolved.config
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        return blocks_in(config.kv_cache_memory_bytes, resolved)
    return None if resolved.device.type == "cuda" else blocks_in(cpu_kv_bytes(resolved), resolved)


def _num_blocks_that_fit(
    resolved: Resolved, model: DecoderModel, kernels: Kernels, streams: Streams
) -> int:
    """KV blocks in the GPU's memory, under gpu_memory_utilization of the whole, others' use of it
    included."""
    working_bytes = _measure_working_bytes(resolved, model, kernels, streams)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(resolved.device)
    budget = int(resolved.config.gpu_memory_utilization * total) - (total - free) - working_bytes
    return blocks_in(budget, resolved)


def _measure_working_bytes(
    resolved: Resolved, model: DecoderModel, kernels: Kernels, streams: Streams
) -> int:
    """Bytes of buffers, of the largest steps at their peak and of all graphs: a trial with a KV
    cache of the null block alone, which captures the two largest buckets of decode steps, and of
    prefills what PrefillGraphs captures at once. The largest brings the pool all graphs share, the
    second what each further one adds."""
    ladder = BucketLadder(resolved.ladder.sizes[-2:])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(resolved.device)
    runner = _make_runner(resolved, model, kernels, streams, StepClock(streams), 0, ladder)
    torch.cuda.reset_peak_memory_stats(resolved.device)
    runner.run_largest_steps(make_table(resolved), max_context=context_to_try(resolved))
    step_bytes = torch.cuda.max_memory_allocated(resolved.device) - before
    report, graph_bytes = runner.capture_report, runner.max_prefill_graph_bytes
    runner.close()
    if report is None:
        return step_bytes
    num_others = len(resolved.ladder.sizes) - 1
    graph_bytes += report.bytes[ladder.max_rows] + num_others * report.bytes[ladder.sizes[0]]
    return step_bytes + math.ceil(_GRAPH_MARGIN * graph_bytes)
