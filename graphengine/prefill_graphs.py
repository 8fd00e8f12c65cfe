"""How does a prefill of few tokens run without the host in its way? In graphs, but for attention.

What lies between two attentions depends on the number of tokens alone: it is captured, a graph for
each, for numbers of tokens in steps; a prefill is padded to the next one. Attention, and what
follows the last one, is launched as it is: how many sequences there are, and of which lengths, is
every prefill's own.

Letters: T tokens of a bucket, L layers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from captures import (
    COMPUTE,
    BucketLadder,
    Called,
    CaptureError,
    Replayable,
    Streams,
    capture,
)
from graphengine.attention.base import PrefillMetadata
from graphengine.kernels.tiles import gated_features
from graphengine.kv_cache import KVCache
from graphengine.model import DecoderModel, PrefillBuffers
from graphengine.model_config import ModelConfig

_log = logging.getLogger(__name__)
# A layer's launches take the host 0.4 ms (perf/LOG.md): as long as the GPU's arithmetic
# takes for this many multiplications of a token's by a layer's weights.
_MULTIPLICATIONS_OF_LAUNCHES = 1.4e11
_MIN_TOKENS = 128
# Capturing launches all of it twice, and loses once if it is not wanted again.
_USES_BEFORE_CAPTURE = 4
_LEAST_BYTES_OF_A_LAYER = 2**18


def prefill_ladder(config: ModelConfig, max_tokens: int) -> BucketLadder | None:
    """Numbers of tokens to capture, each a third or a half above the last: those whose launches
    take the host longer than their arithmetic the GPU. None where there are none."""
    sizes = []
    size = _MIN_TOKENS
    most = min(max_tokens, int(_MULTIPLICATIONS_OF_LAUNCHES / _layer_elements(config)))
    while size <= most:
        sizes.append(size)
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return BucketLadder(sizes) if sizes else None


def _layer_elements(config: ModelConfig) -> int:
    """Of a layer's weights."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


class PrefillGraphs:
    """Prefills of up to ladder.max_rows tokens, in pieces. Of a few buckets the pieces are captured
    at once, so that the memory of all is known, of the others when they have been wanted a few
    times; until then they are called, padded alike, so that a prefill's logits do not depend on
    what ran before it."""

    def __init__(
        self,
        model: DecoderModel,
        kv: KVCache,
        streams: Streams,
        ladder: BucketLadder,
        *,
        captures: bool,
    ) -> None:
        """captures: else the pieces are always called, as without graphs."""
        self.ladder = ladder
        self._model, self._kv, self._streams = model, kv, streams
        self._largest = PrefillBuffers.empty(model, ladder.max_rows)
        if streams.device.type == "cuda":
            torch.cuda.synchronize(streams.device)  # they were made on another stream
        self._pool = torch.cuda.graph_pool_handle() if streams.device.type == "cuda" else None
        self._captured: dict[int, list[Replayable]] = {}
        self._wanted: Counter[int] = Counter()
        self._captures = captures
        self.max_bytes = 0  # of device memory, for all of them
        if captures:
            self._capture_first()

    def prepare(self, bucket: int) -> None:
        """A prefill of the bucket is about to be launched: captures it if that is due, which blocks
        until the streams are empty. Where memory runs out for it, it is called from then on."""
        if not self._captures or bucket in self._captured:
            return
        self._wanted[bucket] += 1
        if self._wanted[bucket] != _USES_BEFORE_CAPTURE:
            return
        try:
            self._captured[bucket] = self._capture(bucket)
        except torch.OutOfMemoryError:
            _log.warning("no memory is left to capture prefills of %d tokens", bucket)
        except Exception as error:
            raise CaptureError(f"capture of {bucket} tokens' prefill failed: {error}") from error

    def run(
        self,
        inputs: dict[str, Tensor],
        num_tokens: int,
        metadata: PrefillMetadata,
        *,
        trial: DecoderModel | None = None,
    ) -> Tensor:
        """As DecoderModel.forward, [S, E]. inputs: those of PrefillBuffers.inputs, [T], a bucket's,
        of which the first num_tokens mean something. trial: see ModelRunner.prefill."""
        model = trial or self._model
        bucket = len(inputs["input_ids"])
        buffers = self._largest.head(bucket)
        for name, to in buffers.inputs.items():
            self._streams.copy(COMPUTE, to, inputs[name], f"prefill.{name}")
        captured = self._captured.get(bucket) if trial is None else None
        pieces = captured or [Called(step) for step in self._steps(model, bucket)]
        pieces[0].replay()
        for index, piece in enumerate(pieces[1:]):
            model.prefill_attention(index, buffers, num_tokens, self._kv, metadata)
            piece.replay()
        heads = model.prefill_heads(buffers, num_tokens)
        return model.finish_prefill(heads, buffers.residual, self._kv, metadata)

    def close(self) -> None:
        """Frees the graphs. Nothing may be running."""
        for pieces in self._captured.values():
            for piece in pieces:
                piece.reset()
        self._captured.clear()

    def _capture_first(self) -> None:
        """The largest bucket brings the pool that all share, unless one that is left to cuBLAS
        does, which has more between gate, up and SiLU; the smallest what each further one adds."""
        config, sizes = self._model.config, self.ladder.sizes
        i, e = config.intermediate_size, config.hidden_size
        heavy = [size for size in sizes if gated_features(size, i, e) is None]
        first = dict.fromkeys((sizes[-1], *heavy[-1:], sizes[0]))
        for bucket in first:
            free_before = _free_bytes(self._streams)
            self._captured[bucket] = self._capture(bucket)
            num_bytes = max(0, free_before - _free_bytes(self._streams))
            self.max_bytes += num_bytes
        # The driver hands memory out in larger pieces: what the last took may have been there.
        each = max(num_bytes, config.num_layers * _LEAST_BYTES_OF_A_LAYER)
        self.max_bytes += (len(sizes) - len(first)) * each

    def _capture(self, bucket: int) -> list[Replayable]:
        # As padded tokens, of the null block. A prefill on its way may still read the buffers.
        with self._streams.on(COMPUTE):
            for tensor in self._largest.head(bucket).inputs.values():
                tensor.zero_()
        return [
            capture(step, self._streams, self._pool) for step in self._steps(self._model, bucket)
        ]

    def _steps(self, model: DecoderModel, bucket: int) -> list[Callable[[], None]]:
        buffers = self._largest.head(bucket)

        def step(index: int) -> Callable[[], None]:
            def piece() -> None:
                with torch.inference_mode():
                    model.prefill_piece(index, buffers, self._kv)

            return piece

        return [step(index) for index in range(len(model.layers))]


def _free_bytes(streams: Streams) -> int:
    return torch.cuda.mem_get_info(streams.device)[0] if streams.device.type == "cuda" else 0
