"""How does a prefill of few tokens run without the host in its way? In graphs, but for attention.

What lies between two attentions depends on the number of tokens alone: it is captured, a graph for
each, for numbers of tokens in steps; a prefill is padded to the next one. Attention is launched as
it is, since how many sequences there are, and of which lengths, is every prefill's own.

Letters: T tokens of a bucket, L layers.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from captures import COMPUTE, BucketLadder, HostArrays, Replayable, Streams, capture
from graphengine.attention.base import PrefillMetadata
from graphengine.kv_cache import KVCache
from graphengine.model import DecoderModel, PrefillBuffers
from graphengine.model_config import ModelConfig

# A layer's launches take the host 0.36 to 0.41 ms (perf/LOG.md): as long as the GPU's arithmetic
# takes for this many multiplications of a token's by a layer's weights.
_MULTIPLICATIONS_OF_LAUNCHES = 1.4e11
_FEWEST_TOKENS = 128
# Capturing takes as long as this many prefills lose to their launches; who knows how many come.
_USES_BEFORE_CAPTURE = 4


def prefill_ladder(config: ModelConfig, max_tokens: int) -> BucketLadder | None:
    """Numbers of tokens to capture, each a third or a half above the last: those whose launches
    take the host longer than their arithmetic the GPU. None where there are none."""
    sizes = []
    size = _FEWEST_TOKENS
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
    """Graphs of prefills by number of tokens. The largest and the smallest bucket are captured at
    once, so that the memory of all is known; the others when they have been wanted a few times."""

    def __init__(
        self, model: DecoderModel, kv: KVCache, streams: Streams, ladder: BucketLadder
    ) -> None:
        self.ladder = ladder
        self._model, self._kv, self._streams = model, kv, streams
        self._largest = PrefillBuffers.empty(model, ladder.max_rows)
        if streams.device.type == "cuda":
            torch.cuda.synchronize(streams.device)  # they were made on another stream
        self._pool = torch.cuda.graph_pool_handle() if streams.device.type == "cuda" else None
        self._pieces: dict[int, list[Replayable]] = {}
        self._uses: Counter[int] = Counter()
        # The largest brings the pool all share, the smallest what each further one adds. Device
        # memory of all of them, in bytes:
        self.most_bytes = 0
        for bucket, count in ((ladder.sizes[-1], 1), (ladder.sizes[0], len(ladder.sizes) - 1)):
            if count:
                free_before = _free_bytes(streams)
                self._pieces[bucket] = self._capture(bucket)
                self.most_bytes += count * max(0, free_before - _free_bytes(streams))

    def bucket_for(self, num_tokens: int) -> int | None:
        """The bucket that a prefill of num_tokens, which is to be launched, runs in; None where it
        runs without. May capture one, which blocks until the streams are empty."""
        if num_tokens > self.ladder.max_rows:
            return None
        bucket = self.ladder.pick(num_tokens)
        if bucket not in self._pieces:
            self._uses[bucket] += 1
            if self._uses[bucket] < _USES_BEFORE_CAPTURE:
                return None
            self._pieces[bucket] = self._capture(bucket)
        return bucket

    def run(self, inputs: dict[str, Tensor], num_tokens: int, metadata: PrefillMetadata) -> Tensor:
        """Hidden states after the last norm, [T, E], of which the first num_tokens mean something;
        the next call overwrites them. inputs: those of PrefillBuffers.inputs, [T], a bucket's."""
        bucket = len(inputs["input_ids"])
        buffers = self._largest.head(bucket)
        for name, to in buffers.inputs.items():
            self._streams.copy(COMPUTE, to, inputs[name], f"prefill.{name}")
        first, *others = self._pieces[bucket]
        first.replay()
        for index, piece in enumerate(others):
            self._model.prefill_attention(index, buffers, num_tokens, self._kv, metadata)
            piece.replay()
        return buffers.hidden

    def close(self) -> None:
        """Frees the graphs. Nothing may be running."""
        for pieces in self._pieces.values():
            for piece in pieces:
                piece.reset()
        self._pieces.clear()

    def _capture(self, bucket: int) -> list[Replayable]:
        buffers = self._largest.head(bucket)
        # Tokens of the null block: see pad_tokens. A prefill on its way may still read the buffers.
        with self._streams.on(COMPUTE):
            for tensor in buffers.inputs.values():
                tensor.zero_()

        def piece(index: int) -> Replayable:
            def step() -> None:
                with torch.inference_mode():
                    self._model.prefill_piece(index, buffers, self._kv)

            return capture(step, self._streams, self._pool)

        return [piece(index) for index in range(len(self._model.layers) + 1)]


def pad_tokens(tokens: HostArrays, num_tokens: int) -> None:
    """Makes the rows from num_tokens on tokens of the null block: what they write is never read."""
    for name in ("input_ids", "positions", "slot_mapping"):
        tokens[name][num_tokens:] = 0


def _free_bytes(streams: Streams) -> int:
    return torch.cuda.mem_get_info(streams.device)[0] if streams.device.type == "cuda" else 0
