"""Which way is the fastest for each product of a decode step here? Measured on the model itself.

Letters: N rows, E hidden, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captures import COMPUTE, BucketLadder, Event, Replayable, Streams, capture
from graphengine.attention.base import DecodeMetadata
from graphengine.kernels.ahead import expendable
from graphengine.kernels.ways import MAX_TUNED_ROWS, Product, Way
from graphengine.layers import DecoderLayer
from graphengine.model import DecoderModel
from graphengine.model_config import ModelConfig

if TYPE_CHECKING:  # it needs Triton
    from graphengine.kernels.tuned import TunedKernels

_log = logging.getLogger(__name__)
# Weights of so many bytes, and of two layers at least, are read in turn: the L2 cache keeps none.
_LEAST_BYTES = 150e6
# Tokens a row of the cache that attention reads, and bytes of it at most.
_CONTEXT = 256
_MOST_CACHE_BYTES = 2**29
_ROUNDS = 5
_REPLAYS = 2
# Of the time of whole layers: what is gained by less may be noise, and a rule is the same for all.
_LEAST_GAIN = 0.01
_MAX_ERROR = 2e-2
_CHECKED_FEATURES = 512


def products_to_tune(
    config: ModelConfig, ladder: BucketLadder, *, num_chained: int
) -> list[Product]:
    """Those of decode steps of more than num_chained rows, which run without the chain, and at most
    MAX_TUNED_ROWS."""
    e, i = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    qkv_rows = q_rows + 2 * config.num_kv_heads * config.head_dim
    shapes = ((qkv_rows, e, False), (e, q_rows, False), (i, e, True), (e, i, False))
    return [
        Product(size, *shape)
        for size in ladder.sizes
        if num_chained < size <= MAX_TUNED_ROWS
        for shape in dict.fromkeys(shapes)
    ]


_Named = list[tuple[Product, Mapping[str, Way]]]


def _by_rows(products: Mapping[Product, Mapping[str, Way]]) -> list[_Named]:
    """Each lot has a trial of its own, whose memory is free before the next one's."""
    lots: dict[int, _Named] = {}
    for product, ways in products.items():
        lots.setdefault(product.num_rows, []).append((product, ways))
    return list(lots.values())


def try_all(
    model: DecoderModel, kernels: TunedKernels, products: Mapping[Product, Mapping[str, Way]]
) -> None:
    """Runs the steps that `tune` will, each way of each product once: in a rehearsal, to have all
    compiled that they launch. What fails, or finds no memory, is left to `tune`."""

    def try_some(some: _Named) -> None:
        trial = _Trial(model, kernels, some[0][0].num_rows)
        for product, ways in some:
            for name, way in ways.items():
                forgiven = _forgiven(product, name, logging.DEBUG)
                with _way(kernels, product, way), forgiven, expendable():
                    trial.step()

    with contextlib.suppress(torch.OutOfMemoryError):
        for some in _by_rows(products):
            try_some(some)


def tune(
    model: DecoderModel,
    kernels: TunedKernels,
    products: Mapping[Product, Mapping[str, Way]],
    streams: Streams,
) -> dict[Product, str]:
    """The name of each product's fastest way, of those that are given by their names, the rule's
    first. Blocks until known; leaves kernels.ways as it is. Within model.exclusive(). A way that
    fails or is wrong here is left out; where memory runs out, what is known by then is given.

    Whole layers are timed, one product's way changed at a time, since what a way costs shows in the
    kernels beside it too: in partial sums that they add up, or in starting before it has ended."""
    found: dict[Product, str] = {}

    def tune_some(some: _Named) -> None:
        trial = _Trial(model, kernels, some[0][0].num_rows)
        if streams.device.type == "cuda":
            torch.cuda.synchronize(streams.device)  # its buffers were filled on another stream
        for product, ways in some:
            found[product] = _fastest(trial, product, ways, streams)

    try:
        for some in _by_rows(products):
            tune_some(some)
    except torch.OutOfMemoryError:
        _log.warning("no memory is left to measure more products: the others run by their rules")
    return found


@contextlib.contextmanager
def _way(kernels: TunedKernels, product: Product, way: Way) -> Iterator[None]:
    kernels.ways[product] = way
    try:
        yield
    finally:
        del kernels.ways[product]


@contextlib.contextmanager
def _forgiven(product: Product, name: str, level: int = logging.WARNING) -> Iterator[None]:
    """Its failure is told, and ends nothing else. Not so where memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        _log.log(level, "%s of %s fails here (%s), so it is left out", name, product, text)


class _Trial:
    """Decode steps of num_rows rows through a few layers, on buffers of its own."""

    def __init__(self, model: DecoderModel, kernels: TunedKernels, num_rows: int) -> None:
        self.model, self.kernels = model, kernels
        config, weight = model.config, model.embed_tokens
        layers: list[DecoderLayer] = list(model.layers)  # type: ignore[arg-type]
        layer_bytes = sum(parameter.nbytes for parameter in layers[0].parameters())
        self._layers = layers[: max(2, math.ceil(_LEAST_BYTES / layer_bytes))]
        # One cache for all layers, of noise; where blocks would be too many, rows share them.
        block_size, max_len = model.block_size, len(model.cos_sin)
        context = min(_CONTEXT, max_len)
        per_row = math.ceil(context / block_size)
        shape = (block_size, config.num_kv_heads, config.head_dim)
        most = _MOST_CACHE_BYTES // (2 * math.prod(shape) * weight.itemsize)
        num_blocks = max(1, min(num_rows * per_row, most))
        device = weight.device
        self._k_cache, self._v_cache = (_noise(num_blocks, *shape, like=weight) for _ in "kv")
        held = torch.arange(num_rows * per_row, dtype=torch.int32, device=device) % num_blocks
        # As wide as a step's, which kernels are compiled for.
        width = math.ceil(max_len / block_size)
        tables = torch.zeros((num_rows, width), dtype=torch.int32, device=device)
        tables[:, :per_row] = held.view(num_rows, per_row)
        last = context - 1
        self._metadata = DecodeMetadata(
            tables[:, per_row - 1].long() * block_size + last % block_size,
            tables,
            torch.full((num_rows,), context, dtype=torch.int32, device=device),
        )
        self._positions = torch.full((num_rows,), last, device=device)
        self._start = _noise(num_rows, config.hidden_size, like=weight)
        self._residual = torch.empty_like(self._start)

    @torch.inference_mode()
    def step(self) -> None:
        self.model.plan(self._metadata)
        # A kernel that does not start early, as attention wants one after its plan.
        self._residual.copy_(self._start)
        added: Tensor | None = None
        for layer in self._layers:
            added = layer(
                added,
                self._residual,
                self._positions,
                self.model.cos_sin,
                self._k_cache,
                self._v_cache,
                self._metadata,
            )


@torch.inference_mode()
def run_product(model: DecoderModel, kernels: TunedKernels, product: Product) -> Tensor:
    """Of noise by the first layer's weight, by the way that kernels.ways has: [N, F]."""
    weight, bias = _weight(model, product)
    x = _noise(product.num_rows, product.depth, like=weight)
    if product.silu:
        return kernels.linear_silu_mul(x, weight, bias, decode=True)
    out = kernels.linear(x, weight, bias, decode=True)
    return out.sum(dim=0) if out.dim() == 3 else out


@torch.inference_mode()
def error_of(model: DecoderModel, kernels: TunedKernels, product: Product) -> float:
    """How far `run_product` is from float32, of its norm, by some of the features."""
    weight, bias = _weight(model, product)
    x = _noise(product.num_rows, product.depth, like=weight)
    step = math.ceil(product.num_features / _CHECKED_FEATURES)

    def plain(weight: Tensor, bias: Tensor | None) -> Tensor:
        some = None if bias is None else bias[::step].float()
        return torch.nn.functional.linear(x.float(), weight[::step].float(), some)

    if product.silu:
        biases = (None, None) if bias is None else bias.chunk(2)
        gate, up = (plain(*pair) for pair in zip(weight.chunk(2), biases, strict=True))
        expected = torch.nn.functional.silu(gate) * up
    else:
        expected = plain(weight, bias)
    actual = run_product(model, kernels, product)[:, ::step].float()
    return float((actual - expected).norm() / expected.norm())


def _noise(*shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(generator=generator)


def _weight(model: DecoderModel, product: Product) -> tuple[Tensor, Tensor | None]:
    layer: DecoderLayer = model.layers[0]  # type: ignore[assignment]
    pairs = [
        (layer.qkv_proj, layer.qkv_bias),
        (layer.o_proj, layer.o_bias),
        (layer.down_proj, layer.down_bias),
    ]
    if product.silu:
        pairs = [(layer.gate_up_proj, layer.gate_up_bias)]
    shape = (product.num_features * (2 if product.silu else 1), product.depth)
    return next(pair for pair in pairs if pair[0].shape == shape)


def _fastest(trial: _Trial, product: Product, ways: Mapping[str, Way], streams: Streams) -> str:
    kernels, rule = trial.kernels, next(iter(ways))
    if len(ways) == 1:
        return rule
    graphs: dict[str, Replayable] = {}
    # Of its own: a pool is gone with the last graph in it.
    pool = torch.cuda.graph_pool_handle() if streams.device.type == "cuda" else None

    def step(way: Way) -> None:
        with _way(kernels, product, way):
            trial.step()

    try:
        graphs[rule] = capture(functools.partial(step, ways[rule]), streams, pool)
        for name, way in ways.items():
            if name == rule:
                continue
            with _forgiven(product, name):
                with _way(kernels, product, way):
                    error = error_of(trial.model, kernels, product)
                if not error <= _MAX_ERROR:  # NaN too
                    raise ArithmeticError(f"it is wrong by {error:.1e}")
                graphs[name] = capture(functools.partial(step, way), streams, pool)
        times_ms = _times({name: graph.replay for name, graph in graphs.items()}, streams)
    finally:
        streams.synchronize()
        for graph in graphs.values():
            graph.reset()
    return choose(times_ms)


def choose(times_ms: Mapping[str, float]) -> str:
    """The fastest, if it is worth more than noise beside the rule, which comes first."""
    rule = next(iter(times_ms))
    best = min(times_ms, key=lambda name: times_ms[name])
    return best if times_ms[best] < (1 - _LEAST_GAIN) * times_ms[rule] else rule


def _times(runs: dict[str, Callable[[], None]], streams: Streams) -> dict[str, float]:
    """Milliseconds, medians of rounds in which each has its turn."""
    events: dict[str, list[tuple[Event, Event]]] = {name: [] for name in runs}
    with streams.on(COMPUTE):
        for _ in range(_ROUNDS + 1):
            for name, run in runs.items():
                start, end = (streams.event(name, timed=True) for _ in range(2))
                streams.record(start, COMPUTE)
                for _ in range(_REPLAYS):
                    run()
                streams.record(end, COMPUTE)
                events[name].append((start, end))
    streams.synchronize()
    return {
        # The first round warms up.
        name: statistics.median(start.elapsed_ms(end) for start, end in pairs[1:])
        for name, pairs in events.items()
    }
