"""How does it all run? LLM, and the loop: schedule, launch, commit one step late."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sized
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from graphengine.block_manager import BlockManager
from graphengine.config import EngineConfig, engine_config
from graphengine.cuda_context import EarlyContext
from graphengine.errors import RequestError
from graphengine.hub import resolve_model
from graphengine.intake import Feeder, Intake, Prompt
from graphengine.metrics import EngineStats, Lap, Laps, RunCounters
from graphengine.model_config import load_model_config
from graphengine.request import (
    CompletionOutput,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    Sequence,
)
from graphengine.scheduler import DecodeBatch, Scheduler
from graphengine.sequence_table import SequenceTable
from graphengine.tokenizer import StopStrings, Tokenizer
from graphengine.trace import TraceFile

# What needs torch is imported where an engine is made: that takes seconds, in which the context of
# the GPU comes up, and a bad config.json is told before.
if TYPE_CHECKING:
    from captures import CaptureReport
    from graphengine.model_runner import Launched
    from graphengine.resolve import Resolved

# Launches that are accounted for together while there are more to come.
_SPANS_AT_ONCE = 16
# How long an idle engine waits for more requests before it starts with those it has.
_GATHER_S = 0.01
# LLMs of this process that are not closed.
_open: weakref.WeakSet[LLM] = weakref.WeakSet()


class LLM:
    """A model ready to generate. Options are EngineConfig's fields.

    Raises GraphEngineError, as one of its kinds, for whatever a user can fix. Not thread-safe: one
    generate or stream at a time; of all the LLMs of a process on one GPU too, where the model
    decodes by kernels that need the GPU for themselves (see kernels.exclusive). Close it, or use it
    as a context manager, to free the device.
    """

    def __init__(self, model: str, **options: object) -> None:
        config = engine_config(model, **options)
        self._trace = None
        if config.trace is not None:
            self._trace = TraceFile(Path(config.trace), start_s=time.perf_counter())
        laps = self._make_laps()
        model_path = resolve_model(config.model, with_weights=config.load_format != "dummy")
        self.model_config = load_model_config(model_path)
        laps.end("config")
        context = None if config.device == "cpu" else EarlyContext()
        try:
            from graphengine.build import build_runner
            from graphengine.resolve import resolve

            laps.end("imports")
            resolved = resolve(config, model_path, self.model_config, laps=laps)
            self._resolved = resolved
            self.tokenizer = _make_tokenizer(resolved)
            laps.end("tokenizer")
            self._clock, self._runner, self.num_blocks = build_runner(resolved, laps)
        finally:
            if context is not None:
                context.release()
        self.startup_s = laps.seconds
        # What capturing the graphs cost; None in eager mode.
        self.capture_report: CaptureReport | None = self._runner.capture_report
        eos_token_ids = resolved.model_config.eos_token_ids
        if not eos_token_ids and self.tokenizer and self.tokenizer.eos_token_id is not None:
            eos_token_ids = (self.tokenizer.eos_token_id,)
        self._intake = Intake(
            self.tokenizer,
            eos_token_ids=eos_token_ids,
            vocab_size=resolved.model_config.vocab_size,
            max_model_len=resolved.max_model_len,
            seed=config.seed,
        )
        self._is_streaming = False
        self._is_closed = False
        self._exclusive = contextlib.ExitStack()  # the device, while this LLM streams
        self._start_run()
        _open.add(self)

    # --- what a caller uses

    @property
    def config(self) -> EngineConfig:
        return self._resolved.config

    @property
    def max_model_len(self) -> int:
        return self._resolved.max_model_len

    @property
    def block_size(self) -> int:
        return self._resolved.block_size

    @property
    def attention(self) -> str:
        """The attention backend: "flash", "flash4" or "reference"."""
        return self._resolved.attention.name

    @property
    def dtype_bytes(self) -> int:
        """Of one weight, and of one element of the KV cache."""
        return self._resolved.dtype.itemsize

    def generate(
        self,
        prompts: Prompt | Request | SequenceOf[Prompt | Request],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Outputs in the order of the prompts. One SamplingParams serves all; a list gives each
        prompt its own. A refused prompt has an output that says why; the others go on."""
        batch: list[Prompt | Request]
        if isinstance(prompts, (str, Mapping, Request)):
            batch = [prompts]
        else:
            batch = list(prompts)
        requests = batch
        default = None
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            default = sampling_params
        elif not isinstance(sampling_params, (list, tuple)):
            raise RequestError(
                f"sampling_params is a {type(sampling_params).__name__}; give SamplingParams, or a "
                "list with one for each prompt"
            )
        elif len(sampling_params) != len(batch):
            raise RequestError(
                f"{len(sampling_params)} sampling_params for {len(batch)} prompts; give one for "
                "all or one each"
            )
        else:
            requests = [
                dataclasses.replace(
                    item if isinstance(item, Request) else Request(item), sampling_params=params
                )
                for item, params in zip(batch, sampling_params, strict=True)
            ]
        return sorted(self.stream(requests, default), key=lambda output: output.index)

    def stream(
        self,
        requests: Iterable[Prompt | Request],
        sampling_params: SamplingParams | None = None,
    ) -> Generator[RequestOutput]:
        """Outputs as they finish. Reads `requests` in a thread, only as far ahead as the engine
        needs, so neither has to fit in memory. Leaving the iterator early, by an exception or
        close(), drops what is unfinished; the LLM can be used again.

        A list (anything with a length) is batched by its contents alone, so that a rerun batches
        alike; of an iterator the engine takes what is there, since the next item may be far off."""
        if self._is_closed:
            raise RuntimeError("this LLM is closed; make a new one")
        if self._is_streaming:
            raise RuntimeError("this LLM is streaming already; finish or close that stream first")
        if isinstance(requests, (str, Mapping, Request)):
            requests = [requests]  # one prompt, not its letters or keys
        # Entered before anything is launched, left when the device is done with all.
        with self._exclusive:
            self._exclusive.enter_context(self._runner.exclusive())
            yield from self._stream(requests, sampling_params or SamplingParams())

    def _stream(
        self, requests: Iterable[Prompt | Request], default: SamplingParams
    ) -> Generator[RequestOutput]:
        self._is_streaming = True
        feeder: Feeder | None = None
        try:
            self._start_run()
            sequences = self._intake.sequences(requests, default)
            feeder = Feeder(sequences, depth=self.config.max_num_seqs)
            with _frozen_garbage():
                yield from self._loop(feeder, is_patient=isinstance(requests, Sized))
        finally:
            self._is_streaming = False
            if feeder is not None:
                feeder.close()
            self._counters.ended_s = time.perf_counter()
            if not self._is_closed:
                self._runner.synchronize()
                self._take_spans(least=1)
                self._runner.reset()

    def stats(self) -> EngineStats:
        """A snapshot of the stream that runs, or of the last one. Cheap; any thread may ask."""
        counters, reading = self._counters, self._clock.reading
        launches, launch_ms = reading.num_launches, reading.launch_ms
        num_decode, num_prefill = launches.get("decode", 0), launches.get("prefill", 0)
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_finished=counters.num_finished,
            num_failed=counters.num_failed,
            num_preemptions=self._scheduler.num_preemptions,
            prompt_tokens=counters.prompt_tokens,
            output_tokens=counters.output_tokens,
            kv_usage=1.0 - self._blocks.num_free / self._blocks.num_blocks,
            elapsed_s=counters.elapsed_s,
            num_decode_steps=num_decode,
            num_prefill_steps=num_prefill,
            decode_ms=launch_ms.get("decode", 0.0) / max(1, num_decode),
            prefill_ms=launch_ms.get("prefill", 0.0) / max(1, num_prefill),
            gpu_busy=reading.busy_share if self._resolved.device.type == "cuda" else None,
            longest_gap_ms=reading.longest_gap_ms,
            host_ms=counters.laps.mean_ms(),
            idle_host_ms=dict(counters.idle.host_ms),
            longest_gaps=counters.idle.longest,
        )

    def timeline(self) -> tuple[list[Lap], list[tuple[str, float, float]]]:
        """The last few steps of the stream: the host's phases, and the device's launches as (label,
        start, end); seconds of perf_counter."""
        return list(self._counters.laps.recent), list(self._counters.idle.recent)

    def close(self) -> None:
        """Frees graphs, KV cache and weights. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        _open.discard(self)
        if self._trace is not None:
            self._trace.close()
        self._runner.close()
        del self._runner
        self._exclusive.close()  # a stream that nobody ends holds the device no longer
        if self._resolved.device.type == "cuda":
            import torch

            # One cuBLAS workspace a stream, which torch would keep for a stream nobody uses again.
            # The graphs of another LLM use theirs.
            if not _open:
                torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- the loop

    def _start_run(self) -> None:
        """Fresh host state. Whatever an earlier stream left half done cannot reach this one."""
        self._table = SequenceTable(self.config.max_num_seqs, self.max_model_len, self.block_size)
        self._blocks = BlockManager(self.num_blocks, self.block_size)
        self._scheduler = Scheduler(
            self._table,
            self._blocks,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
        )
        self._stop_strings: dict[int, StopStrings] = {}
        self._clock.reset()
        self._counters = RunCounters(laps=self._make_laps())

    def _loop(self, feeder: Feeder, *, is_patient: bool) -> Iterator[RequestOutput]:
        """One turn launches step N+1 while N runs, then waits for N. What ended in N - 1 is turned
        into text after the launch, in the shadow of the device."""
        depth = 1 if self.config.async_scheduling else 0
        laps, scheduler = self._counters.laps, self._scheduler
        in_flight: deque[Launched] = deque()
        ended: list[tuple[Sequence, str | None]] = []
        while True:
            laps.start()
            is_idle = not in_flight and not ended and not scheduler.has_work
            outputs = self._take_requests(feeder, is_idle=is_idle, is_patient=is_patient)
            laps.end("intake")
            batch = scheduler.schedule()
            laps.end("schedule")
            if batch is not None:
                in_flight.append(self._runner.launch(batch, self._table))
                laps.end("launch" if isinstance(batch, DecodeBatch) else "prefill")
            outputs += [self._output(sequence, text) for sequence, text in ended]
            ended = []
            self._take_spans(least=1 if batch is None else _SPANS_AT_ONCE)
            laps.end("output")
            yield from outputs
            if self._is_closed:
                raise RuntimeError("this LLM was closed while it streamed")
            if in_flight and (batch is None or len(in_flight) > depth):
                ended = self._commit(in_flight.popleft())
            elif batch is None:
                assert not scheduler.has_work, "nothing runs and nothing can start"
                assert self._blocks.num_free == self._blocks.num_blocks, "blocks leaked"
                if feeder.exhausted:
                    return

    def _take_requests(
        self, feeder: Feeder, *, is_idle: bool, is_patient: bool
    ) -> list[RequestOutput]:
        """Tops up the waiting queue with what was read ahead; gives the outputs of refused
        requests. Waits for more when there is nothing else to do, or when `is_patient`."""
        outputs: list[RequestOutput] = []
        most = self.config.max_num_seqs
        timeout_s = None if is_idle or is_patient else 0.0
        gather_until_s = math.inf
        while self._scheduler.num_waiting < most and len(outputs) < most:
            if not is_patient and gather_until_s < math.inf:
                timeout_s = max(0.0, gather_until_s - time.perf_counter())
            item = feeder.get(timeout_s)
            if item is None:
                break
            if isinstance(item, RequestOutput):
                self._counters.num_finished += 1
                self._counters.num_failed += 1
                outputs.append(item)
                if not is_patient:
                    break  # the caller hears of it before more is waited for
                continue
            self._scheduler.add(item)
            if is_idle and gather_until_s == math.inf:
                gather_until_s = time.perf_counter() + _GATHER_S
        return outputs

    def _take_spans(self, *, least: int) -> None:
        """Accounts for what the device has finished, if `least` launches wait for it."""
        spans = self._clock.collect(least=least)
        if not spans:
            return
        from captures import COMPUTE

        counters = self._counters
        for span in spans:
            if span.stream == COMPUTE:
                counters.idle.add(span.label, span.start_s, span.end_s, counters.laps.recent)
            if self._trace is not None:
                self._trace.add_span(span)

    def _make_laps(self) -> Laps:
        return Laps(None if self._trace is None else self._trace.add_lap)

    def _commit(self, launched: Launched) -> list[tuple[Sequence, str | None]]:
        """Waits for a step and takes up its results: the sequences that ended, and their text where
        a stop string ended them."""
        laps = self._counters.laps
        laps.start()
        token_ids = launched.wait()
        laps.end("wait")
        rows, finished = self._scheduler.commit(launched.batch, token_ids)
        self._counters.output_tokens += len(rows) + len(finished)
        ended = [(sequence, self._text_if_stopped(sequence)) for sequence in finished]
        watched = rows[self._table.has_stop_strings[rows]] if self._table.any_stop_strings else ()
        for idx in map(int, watched):
            running = self._table.sequences[idx]
            assert running is not None
            match = self._match(running, self._table.last_token_id(idx))
            if match is not None:
                stop_reason, text = match
                self._scheduler.finish(idx, FinishReason.STOP, stop_reason=stop_reason)
                ended.append((running, text))
        laps.end("commit")
        return ended

    def _match(self, sequence: Sequence, token_id: int) -> tuple[str, str] | None:
        """The stop string that `token_id` completes and the text before it, if any."""
        assert self.tokenizer is not None
        matcher = self._stop_strings.get(sequence.index)
        if matcher is None:
            matcher = self._stop_strings[sequence.index] = StopStrings(
                self.tokenizer,
                sequence.params.stop,
                min_tokens=sequence.params.min_tokens,
                skip_special_tokens=sequence.params.skip_special_tokens,
            )
        return matcher.push(token_id)

    def _text_if_stopped(self, sequence: Sequence) -> str | None:
        """For a sequence that ended at its length: the text before a stop string, where its last
        token completed one at the same time. The stop string is then its reason."""
        if not sequence.params.stop or sequence.finish_reason is not FinishReason.LENGTH:
            return None
        match = self._match(sequence, sequence.output_token_ids[-1])
        if match is None:
            return None
        sequence.finish_reason = FinishReason.STOP
        sequence.stop_reason, text = match
        return text

    def _output(self, sequence: Sequence, text: str | None) -> RequestOutput:
        token_ids = sequence.output_token_ids
        assert sequence.finish_reason is not None
        self._stop_strings.pop(sequence.index, None)
        if text is None:
            text = self._decode(sequence)
        self._counters.num_finished += 1
        self._counters.prompt_tokens += len(sequence.prompt_token_ids)
        completion = CompletionOutput(
            0, text, token_ids, sequence.finish_reason, sequence.stop_reason
        )
        return RequestOutput(
            sequence.request_id,
            sequence.index,
            sequence.prompt,
            sequence.prompt_token_ids,
            [completion],
        )

    def _decode(self, sequence: Sequence) -> str:
        """The output's text, without the stop token that ended it."""
        if self.tokenizer is None:
            return ""
        token_ids = sequence.output_token_ids
        if sequence.finish_reason is FinishReason.STOP:
            token_ids = token_ids[:-1]
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=sequence.params.skip_special_tokens
        )


# Python 3.12 freezes a few hundred objects itself before a program begins; thawing them is no harm.
_FROZEN_BY_PYTHON = 2000


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Takes what exists out of the garbage collector's sight, torch's modules above all: walking it
    stops the loop for 50 ms and more, again and again. What is made inside is collected as ever.
    A program that froze objects of its own is left alone, since they would be thawed too."""
    if gc.get_freeze_count() > _FROZEN_BY_PYTHON:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _make_tokenizer(resolved: Resolved) -> Tokenizer | None:
    if resolved.config.skip_tokenizer_init:
        return None
    name = resolved.config.tokenizer
    return Tokenizer(
        resolved.model_path if name is None else resolve_model(name, with_weights=False)
    )
