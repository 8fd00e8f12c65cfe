"""What does the device run? Model, KV cache and token feedback; the decode step and the prefill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from captures import (
    Banks,
    BucketLadder,
    CaptureReport,
    EagerRunner,
    GraphRunner,
    Layout,
    StepClock,
    StepPipeline,
    StepRunner,
    Streams,
)
from graphengine.kernels import Kernels
from graphengine.kernels.tiles import gated_features
from graphengine.kv_cache import KVCache
from graphengine.model import DecoderModel
from graphengine.prefill_graphs import PrefillGraphs, prefill_ladder
from graphengine.sampler import sample
from graphengine.scheduler import DecodeBatch, PrefillBatch
from graphengine.sequence_table import Rows, SequenceTable
from graphengine.step_inputs import (
    OUTPUT_FIELDS,
    TOKEN_IDS,
    Filled,
    PrefillLayout,
    decode_fields,
    decode_metadata,
    fill_decode,
    fill_prefill,
    prefill_metadata,
    sampling_tensors,
)

_View = TypeVar("_View")
TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way. `wait` blocks and gives its token ids, int64 [n]; call it once."""

    batch: PrefillBatch | DecodeBatch
    wait: Callable[[], TokenIds]


class ModelRunner:
    """Launches steps on one compute stream, on which everything that touches the KV cache or
    last_token_ids runs, in launch order. Token values never leave the device to come back: the
    next step reads them from last_token_ids, int64 [max_num_seqs + 1], by seq_idx."""

    def __init__(
        self,
        model: DecoderModel,
        kv: KVCache,
        table: SequenceTable,
        *,
        kernels: Kernels,
        streams: Streams,
        clock: StepClock,
        ladder: BucketLadder,
        use_graphs: bool,
        max_num_batched_tokens: int,
    ) -> None:
        """`table` gives sizes only. With `use_graphs` every bucket of decode steps is captured
        here, and what PrefillGraphs captures at once. On the CPU no prefill is padded."""
        self._model = model
        self._kv = kv
        self._kernels = kernels
        self._streams = streams
        self._clock = clock
        device = streams.device
        self._filled: dict[int, Filled] = {}  # by bank
        self._last_token_ids = torch.zeros(table.null_idx + 1, dtype=torch.int64, device=device)

        self._prefill_layout = PrefillLayout(table)
        max_sequences = min(table.max_num_seqs, max_num_batched_tokens)
        max_tokens = min(max_num_batched_tokens, max_sequences * table.token_ids.shape[1])
        self._max_prefill = (max_tokens, max_sequences)
        largest = self._prefill_layout.layouts(*self._max_prefill)
        self._prefill_banks = Banks(
            streams,
            "prefill",
            in_bytes=sum(layout.nbytes for layout in largest),
            out_bytes=max_sequences * torch.int64.itemsize,
            clock=clock,
        )
        fields = decode_fields(table)
        self._decode_pads = {field.name: field.pad for field in fields}
        pipeline = StepPipeline(fields, OUTPUT_FIELDS, ladder, streams, name="decode", clock=clock)
        # What was built so far was launched on another stream.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._runner: StepRunner
        self.capture_report: CaptureReport | None = None
        self._prefill_graphs: PrefillGraphs | None = None
        prefills = prefill_ladder(model.config, max_tokens) if device.type == "cuda" else None
        if prefills is not None:
            self._prefill_graphs = PrefillGraphs(model, kv, streams, prefills, captures=use_graphs)
        if use_graphs:
            graph_runner = GraphRunner(pipeline, self.decode_step, streams)
            self.capture_report = graph_runner.report
            self._runner = graph_runner
        else:
            self._runner = EagerRunner(pipeline, self.decode_step)

    def launch(self, batch: PrefillBatch | DecodeBatch, table: SequenceTable) -> Launched:
        """Fills a bank from `table`, enqueues the step and returns. Blocks if the bank's last
        copy-in is still under way, and where a prefill's pieces are captured first."""
        if isinstance(batch, DecodeBatch):
            return self._launch_decode(batch, table)
        return self._launch_prefill(batch, table)

    def decode_step(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> None:
        """The StepFn: one token for each row, fed back on the device. Captured as a whole."""
        with torch.inference_mode():
            seq_indices, positions = inputs["seq_indices"], inputs["positions"]
            hidden = self._model(
                self._last_token_ids[seq_indices], positions, self._kv, decode_metadata(inputs)
            )
            self._sample(hidden, positions, seq_indices, inputs, outputs[TOKEN_IDS])

    def prefill(
        self,
        tokens: Mapping[str, torch.Tensor],
        sequences: Mapping[str, torch.Tensor],
        batch: PrefillBatch,
        out: torch.Tensor,
        *,
        trial: DecoderModel | None = None,
    ) -> None:
        """Runs a ragged prefill, its tokens padded if it has a bucket; out: int64 [S], in pinned
        memory, gets one token for each sequence. trial: the model to run instead, of which nothing
        is captured."""
        n = len(batch.rows)
        with torch.inference_mode():
            metadata = prefill_metadata(
                tokens,
                sequences,
                batch,
                block_size=self._kv.block_size,
                with_key_slots=self._model.attention.reads_key_slots,
            )
            num_tokens = _num_tokens(batch)
            if (padded := self._padded(num_tokens)) is not None:
                graphs, _ = padded
                hidden = graphs.run(dict(tokens), num_tokens, metadata, trial=trial)
            else:
                model = trial or self._model
                hidden = model(tokens["input_ids"], tokens["positions"], self._kv, metadata)
            rows = {name: view[:n] for name, view in sequences.items()}
            self._sample(hidden, rows["last_positions"], rows["seq_indices"], rows, out)

    @property
    def max_prefill_graph_bytes(self) -> int:
        """Device memory that all graphs of prefills take, those not yet captured included."""
        return self._prefill_graphs.max_bytes if self._prefill_graphs is not None else 0

    def exclusive(self) -> AbstractContextManager[None]:
        """Within it steps may be launched, and must have ended: see DecoderModel.exclusive."""
        return self._model.exclusive()

    def synchronize(self) -> None:
        """Blocks until the device is done with all that was launched."""
        self._streams.synchronize()

    def reset(self) -> None:
        """Forgets every launch not waited for. Blocks until the device is done with them."""
        self._streams.synchronize()
        self._prefill_banks.reset()
        self._runner.reset()
        self._clock.drop_pending()

    def close(self) -> None:
        """Frees graphs, KV cache, weights and buffers. Blocks until nothing runs."""
        self._streams.synchronize()
        self._runner.close()
        if self._prefill_graphs is not None:
            self._prefill_graphs.close()
        # The runner holds decode_step, which holds self: without this the memory would stay until
        # the garbage collector finds the ring.
        del self._runner, self._model, self._kv, self._prefill_banks, self._last_token_ids
        del self._prefill_graphs

    def _sample(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        seq_indices: torch.Tensor,
        params: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        # Padded rows all write the null line, in any order; nobody reads it.
        sample(
            self._kernels,
            self._model.logits(hidden),
            sampling_tensors(params),
            positions,
            out=out,
            seq_indices=seq_indices,
            last_token_ids=self._last_token_ids,
        )

    def _padded(self, num_tokens: int) -> tuple[PrefillGraphs, int] | None:
        """What runs a prefill of num_tokens in pieces, and the rows it is padded to, if it is."""
        graphs = self._prefill_graphs
        if graphs is None or num_tokens > graphs.ladder.max_rows:
            return None
        return graphs, graphs.ladder.pick(num_tokens)

    def _launch_decode(self, batch: DecodeBatch, table: SequenceTable) -> Launched:
        step = self._runner.open(len(batch.rows))
        # Taken out first: should the fill be cut off, the next one is whole.
        filled = self._filled.pop(step.bank.index, None)
        self._filled[step.bank.index] = fill_decode(step.inputs, batch, table, filled)
        self._runner.launch(step)
        return Launched(batch, lambda: cast(TokenIds, self._runner.wait(step)[TOKEN_IDS]))

    def _launch_prefill(
        self, batch: PrefillBatch, table: SequenceTable, *, trial: DecoderModel | None = None
    ) -> Launched:
        num_sequences = len(batch.rows)
        num_tokens = _num_tokens(batch)
        num_rows = num_tokens
        if (padded := self._padded(num_tokens)) is not None:
            graphs, num_rows = padded
            if trial is None:
                graphs.prepare(num_rows)
        layouts = self._prefill_layout.layouts(num_rows, num_sequences)
        bank = self._prefill_banks.open()
        tokens, sequences = _views(layouts, bank.host_in, Layout.host_views)
        fill_prefill(tokens, sequences, batch, table)
        out = bank.host_out.view(torch.int64)[:num_sequences]

        def run() -> None:
            tokens, sequences = _views(layouts, bank.device_in, Layout.views)
            self.prefill(tokens, sequences, batch, out, trial=trial)

        def wait() -> TokenIds:
            self._prefill_banks.wait(bank)
            token_ids = out.numpy().copy()
            self._prefill_banks.release(bank)
            return token_ids

        in_bytes = sum(layout.nbytes for layout in layouts)
        self._prefill_banks.launch(bank, run, in_bytes=in_bytes)
        return Launched(batch, wait)

    def run_largest_steps(self, table: SequenceTable, *, max_context: int) -> None:
        """Runs the largest steps there are, on the null block only: what memory they take is what
        any step takes at most. A prefill of many short prompts, one of the last chunk of a prompt
        of `max_context` tokens, where keys are copied one with the most of them, the largest whose
        MLP is cuBLAS's, all by few layers, and a decode step of every row. Blocks until done."""
        num_tokens, _ = self._max_prefill
        self._run_null_prefills(table, num_tokens)
        start = max(0, max_context - num_tokens)
        self._run_null_prefill(table, np.array([start]), np.array([max_context]))
        if self._model.attention.reads_key_slots:
            self._run_null_prefill(table, *self._most_keys(max_context))
        # cuBLAS leaves more between gate, up and SiLU than our own kernel.
        self._run_null_prefills(table, self._largest_prefill(is_left_to_cublas=True))
        self._run_null_decode(self._runner.ladder.max_rows)

    def run_all_kinds_of_steps(self, table: SequenceTable, *, max_context: int) -> None:
        """As run_largest_steps; then the largest prefill whose MLP is our own kernel's, the
        smallest, and a decode step, and a prefill, of each bucket."""
        self.run_largest_steps(table, max_context=max_context)
        self._run_null_prefills(table, self._largest_prefill(is_left_to_cublas=False))
        # Kernels of few tokens start early, which is another variant of each.
        self._run_null_prefills(table, 1)
        for num_rows in self._runner.ladder.sizes[:-1]:
            self._run_null_decode(num_rows)
        if self._prefill_graphs is not None:
            for num_tokens in self._prefill_graphs.ladder.sizes:
                self._run_null_prefills(table, num_tokens)

    def _run_null_decode(self, num_rows: int) -> None:
        step = self._runner.open(num_rows)
        self._filled.clear()
        for name, pad in self._decode_pads.items():
            step.inputs[name][:] = pad
        self._runner.launch(step)
        self._runner.wait(step)

    def _largest_prefill(self, *, is_left_to_cublas: bool) -> int:
        """Tokens of the largest whose gate and up are; 0 where there is none, or it is the largest
        of all."""
        config, (most, _) = self._model.config, self._max_prefill
        for num_tokens in range(most, 0, -1):
            padded = self._padded(num_tokens)
            rows = padded[1] if padded is not None else num_tokens
            features = gated_features(rows, config.intermediate_size, config.hidden_size)
            if (features is None) == is_left_to_cublas:
                return num_tokens if num_tokens < most else 0
        return 0

    def _most_keys(self, max_context: int) -> tuple[Rows, Rows]:
        """Starts and ends of the prefill that reads the most: the last token of a prompt of
        `max_context`, and whole ones."""
        num_tokens, num_sequences = self._max_prefill
        rest = num_tokens - 1
        count = min(num_sequences - 1, -(-rest // max_context))
        lengths = np.full(count, rest // max(1, count))
        lengths[: rest - int(lengths.sum())] += 1
        lengths = np.minimum(lengths, max_context)
        starts = np.array([max_context - 1, *np.zeros_like(lengths)])
        return starts, np.array([max_context, *lengths])

    def _run_null_prefills(self, table: SequenceTable, num_tokens: int) -> None:
        """Of as many prompts as may be; none of no tokens."""
        if num_tokens == 0:
            return
        ends = np.full(min(self._max_prefill[1], num_tokens), 0)
        ends += num_tokens // len(ends)
        ends[: num_tokens % len(ends)] += 1
        self._run_null_prefill(table, np.zeros_like(ends), ends)

    def _run_null_prefill(self, table: SequenceTable, starts: Rows, ends: Rows) -> None:
        null = np.full(len(ends), table.null_idx)
        samples = np.zeros(len(ends), np.bool_)
        batch = PrefillBatch(null, null, starts, ends, samples)
        # A graph has memory of its own, but not every prefill of its size will find it captured.
        self._launch_prefill(batch, table, trial=self._model.of_few_layers()).wait()


def _num_tokens(batch: PrefillBatch) -> int:
    return int((batch.ends - batch.starts).sum())


def _views(
    layouts: tuple[Layout, Layout],
    buffer: torch.Tensor,
    views: Callable[[Layout, torch.Tensor], dict[str, _View]],
) -> tuple[dict[str, _View], dict[str, _View]]:
    """The per-token and the per-sequence views of one buffer that holds both."""
    tokens, sequences = layouts
    return views(tokens, buffer), views(sequences, buffer[tokens.nbytes :])
