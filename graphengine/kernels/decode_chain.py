"""How does a decode step of few rows run on Hopper? One launch between two attentions.

`decode_chain.cu` says how. This is its host side: which models it takes, its buffers, and how the
copy engine is told where weights and inputs lie. A row's result does not depend on the number of
rows: not one bit.

Letters: N rows, E hidden, I intermediate, H query heads, K kv heads, D head dim, L layers.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from graphengine.kernels.nvrtc import TensorMap, is_shared_by_mps, kernel, tensor_map
from graphengine.model_config import ModelConfig

# Of more rows the single kernels are as fast or faster: inputs and parts grow, weights do not.
MAX_ROWS = 32
ROWS = (8, 16, 32)  # a kernel each
SOURCE = Path(__file__).with_name("decode_chain.cu")
HEADER = Path(__file__).with_name("hopper.cuh")
ARCHITECTURE = "sm_90a"
_CAPABILITY = (9, 0)  # wgmma is Hopper's alone
# As in decode_chain.cu.
PIECE = 64
_TILE_F = 128
_UNIT_C = 64
_LEAST_WHOLE = 96
_MAX_WHOLE_TILES = 2
_NUM_PHASES = 4
_O_PROJ, _GATE_UP, _DOWN, _QKV = range(_NUM_PHASES)
_COUNTERS = _NUM_PHASES * 32
_EMPTY = -1
_BOX_ROWS = 64
_HEAD_DIMS = (64, 128)


class LayerWeights(Protocol):
    """What the chain needs of `layers.DecoderLayer`."""

    input_norm: Tensor
    qkv_proj: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Tensor
    post_norm: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    window: int | None


class StepRows(Protocol):
    """What the chain needs of `attention.DecodeMetadata`."""

    @property
    def slot_mapping(self) -> Tensor: ...
    @property
    def block_tables(self) -> Tensor: ...
    @property
    def context_lens(self) -> Tensor: ...


_POINTERS = (
    "partials",
    "squares",
    "counters",
    "residual",
    "normed",
    "activated",
    "unscaled",
    "hidden",
    "q",
    "post_norm",
    "next_norm",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "k_cache",
    "v_cache",
    "slots",
    "positions",
    "cos_sin",
    "token_ids",
    "embedding",
    "block_tables",
    "context_lens",
)
_STRIDES = (
    "k_block_stride",
    "k_slot_stride",
    "v_block_stride",
    "v_slot_stride",
    "table_stride",
)
_INTS = ("num_rows", "block_size", "first_phase", "last_phase", "is_first", "is_last")


class Params(ctypes.Structure):
    """`Params` of decode_chain.cu, field by field."""

    _fields_ = (
        ("weights", TensorMap * _NUM_PHASES),
        ("attended", TensorMap),
        ("normed_map", TensorMap),
        ("activated_map", TensorMap),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in _INTS),
    )


class Launcher(Protocol):
    """What runs the kernel: a Hopper GPU, or, in the tests, a CPU."""

    num_blocks: int

    def tensor_map(self, matrix: Tensor, box_rows: int) -> TensorMap:
        """How boxes of box_rows x 64 elements are found in `matrix`, bfloat16, its rows dense and
        multiples of 16 bytes apart. Rows past the end read as zeros."""

    def launch(self, params: Params, num_rows: int, *, early: bool) -> None:
        """num_rows: one of ROWS. early: it may start before the kernel ahead of it has ended."""


class DecodeChain:
    """The launches of a decode step of up to MAX_ROWS rows: `begin`, then `between` after each
    layer's attention but the last, then `end`. All on torch's current stream; they can be captured,
    and read the weights in place, at the addresses they had when they were first used."""

    max_rows = MAX_ROWS

    def __init__(
        self,
        config: ModelConfig,
        *,
        cos_sin: Tensor,
        block_size: int,
        device: torch.device,
        launcher: Launcher | None = None,
    ) -> None:
        """cos_sin: as `layers.rope_table` makes it. Unless a launcher is given, the kernels begin
        to compile, or are taken from the user's cache."""
        self._config = config
        self._cos_sin = cos_sin
        self._block_size = block_size
        self._device = device
        self._launcher = launcher or HopperLauncher(config, device)
        self._whole_rows = whole_rows(config, self._launcher.num_blocks)
        h, e, i = config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size

        def buffer(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        partials = (num_partials(config, self._launcher.num_blocks),)
        self._partials = torch.full(partials, _EMPTY, dtype=torch.int32, device=device)
        self._squares = buffer(MAX_ROWS, e // PIECE, dtype=torch.float32)
        self._counters = buffer(config.num_layers + 1, _COUNTERS, dtype=torch.int32)
        self._residual = buffer(MAX_ROWS, e)
        self._normed = buffer(MAX_ROWS, e)
        self._activated = buffer(MAX_ROWS, i)
        self._unscaled = buffer(MAX_ROWS, e, dtype=torch.float32)
        self._q = buffer(MAX_ROWS, h)

    @staticmethod
    def takes(
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_blocks: int | None = None,
    ) -> bool:
        """Whether a model runs this way. num_blocks: of the device's multiprocessors, if `device`
        is not to be asked."""
        if num_blocks is None:
            if device.type != "cuda" or torch.cuda.get_device_capability(device) != _CAPABILITY:
                return False
            # Other processes' blocks would take multiprocessors that a launch needs all of.
            if is_shared_by_mps(device):
                return False
            num_blocks = torch.cuda.get_device_properties(device).multi_processor_count
        if dtype != torch.bfloat16 or config.head_dim not in _HEAD_DIMS:
            return False
        if config.o_bias or config.mlp_bias:
            return False
        return all(
            features % _TILE_F == 0
            and depth % _UNIT_C == 0
            # Each block has a part of each product.
            and features // _TILE_F * (depth // _UNIT_C) >= num_blocks
            for features, depth in _products(config, num_blocks)
        )

    def begin(
        self,
        token_ids: Tensor,
        positions: Tensor,
        embedding: Tensor,
        layer: LayerWeights,
        k_cache: Tensor,
        v_cache: Tensor,
        step: StepRows,
    ) -> Tensor:
        """Embedding, first norm and the first layer's q, k and v: q [N, H, D]; k and v go to the
        cache at step.slot_mapping."""
        self._counters.zero_()
        params = self._params(0, positions.shape[0])
        params.token_ids = token_ids.data_ptr()
        params.embedding = embedding.data_ptr()
        params.next_norm = layer.input_norm.data_ptr()
        params.first_phase, params.last_phase, params.is_first = _QKV, _QKV, 1
        q = self._give_q(params, layer, positions, k_cache, v_cache, step)
        # The counters' zeros are written by no kernel: it must not start early, nor should it for
        # attention's sake: see DecodeAttention.plan.
        self._launcher.launch(params, _padded(positions.shape[0]), early=False)
        return q

    def between(
        self,
        index: int,
        attended: Tensor,
        positions: Tensor,
        layer: LayerWeights,
        next_layer: LayerWeights,
        k_cache: Tensor,
        v_cache: Tensor,
        step: StepRows,
    ) -> Tensor:
        """The rest of layer `index` after its attention, attended [N, H, D], and the start of the
        next: its q [N, H, D]; its k and v go to its caches."""
        params = self._params(index + 1, attended.shape[0])
        self._take_attended(params, attended, layer)
        params.next_norm = next_layer.input_norm.data_ptr()
        params.first_phase, params.last_phase = _O_PROJ, _QKV
        q = self._give_q(params, next_layer, positions, k_cache, v_cache, step)
        self._launcher.launch(params, _padded(attended.shape[0]), early=True)
        return q

    def end(self, attended: Tensor, layer: LayerWeights, norm: Tensor) -> Tensor:
        """The rest of the last layer, and the model's last norm: [N, E]."""
        num_rows = attended.shape[0]
        params = self._params(self._config.num_layers, num_rows)
        self._take_attended(params, attended, layer)
        shape = (num_rows, self._config.hidden_size)
        hidden = torch.empty(shape, dtype=attended.dtype, device=self._device)
        params.hidden = hidden.data_ptr()
        params.next_norm = norm.data_ptr()
        params.first_phase, params.last_phase, params.is_last = _O_PROJ, _DOWN, 1
        self._launcher.launch(params, _padded(attended.shape[0]), early=True)
        return hidden

    def _params(self, launch: int, num_rows: int) -> Params:
        """What all launches of a step share. launch: its place among them."""
        params = Params()
        params.partials = self._partials.data_ptr()
        params.squares = self._squares.data_ptr()
        params.counters = self._counters[launch].data_ptr()
        params.residual = self._residual.data_ptr()
        params.normed = self._normed.data_ptr()
        params.activated = self._activated.data_ptr()
        params.unscaled = self._unscaled.data_ptr()
        params.normed_map = self._input_map(self._normed, num_rows)
        params.activated_map = self._input_map(self._activated, num_rows)
        params.cos_sin = self._cos_sin.data_ptr()
        params.eps = self._config.rms_norm_eps
        params.num_rows = num_rows
        params.block_size = self._block_size
        return params

    def _take_attended(self, params: Params, attended: Tensor, layer: LayerWeights) -> None:
        params.attended = self._input_map(attended.flatten(1), attended.shape[0])
        params.post_norm = layer.post_norm.data_ptr()
        for phase, weight, box_rows in (
            (_O_PROJ, layer.o_proj, _BOX_ROWS),
            (_GATE_UP, layer.gate_up_proj, self._whole_rows or _BOX_ROWS),
            (_DOWN, layer.down_proj, _BOX_ROWS),
        ):
            params.weights[phase] = self._launcher.tensor_map(weight, box_rows)

    def _give_q(
        self,
        params: Params,
        layer: LayerWeights,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: StepRows,
    ) -> Tensor:
        params.weights[_QKV] = self._launcher.tensor_map(layer.qkv_proj, _BOX_ROWS)
        for name in ("qkv_bias", "q_norm", "k_norm"):
            weight: Tensor | None = getattr(layer, name)
            setattr(params, name, None if weight is None else weight.data_ptr())
        params.k_cache, params.v_cache = k_cache.data_ptr(), v_cache.data_ptr()
        params.k_block_stride, params.k_slot_stride = k_cache.stride()[:2]
        params.v_block_stride, params.v_slot_stride = v_cache.stride()[:2]
        params.slots, params.positions = step.slot_mapping.data_ptr(), positions.data_ptr()
        if layer.window is None:
            params.block_tables = step.block_tables.data_ptr()
        params.context_lens = step.context_lens.data_ptr()
        params.table_stride = step.block_tables.stride(0)
        params.q = self._q.data_ptr()
        num_rows = positions.shape[0]
        return self._q[:num_rows].view(num_rows, self._config.num_heads, self._config.head_dim)

    def _input_map(self, matrix: Tensor, num_rows: int) -> TensorMap:
        return self._launcher.tensor_map(matrix, _padded(num_rows))


class HopperLauncher:
    """Launcher on torch's current stream of a GPU."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._device = device
        self._maps: dict[tuple[int, ...], TensorMap] = {}  # all of a map follows from its key
        self.num_blocks = torch.cuda.get_device_properties(device).multi_processor_count

        self._kernels = {
            rows: kernel(
                "decode_chain",
                SOURCE,
                (HEADER,),
                architecture=ARCHITECTURE,
                defines=defines_for(config, num_rows=rows, num_blocks=self.num_blocks),
                device=device.index,
            )
            for rows in ROWS
        }

    def tensor_map(self, matrix: Tensor, box_rows: int) -> TensorMap:
        """See Launcher."""
        num_rows, num_columns = matrix.shape
        key = (matrix.data_ptr(), num_rows, num_columns, matrix.stride(0), box_rows)
        if key not in self._maps:
            sizes, strides = (num_columns, num_rows), (matrix.stride(0),)
            self._maps[key] = tensor_map(matrix, sizes, strides, (_UNIT_C, box_rows))
        return self._maps[key]

    def launch(self, params: Params, num_rows: int, *, early: bool) -> None:
        """See Launcher."""
        # The kernel's struct is aligned to 64 bytes, so its size is a multiple of that.
        padded = ctypes.create_string_buffer(-(-ctypes.sizeof(params) // 64) * 64)
        ctypes.memmove(padded, ctypes.addressof(params), ctypes.sizeof(params))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._kernels[num_rows].launch(
            padded, num_blocks=self.num_blocks, stream=stream, early=early
        )


def defines_for(config: ModelConfig, *, num_rows: int, num_blocks: int) -> dict[str, int]:
    """What SOURCE is compiled with for steps of up to num_rows rows, one of ROWS."""
    return {
        "NR": num_rows,
        "GRID": num_blocks,
        "HIDDEN": config.hidden_size,
        "INTER": config.intermediate_size,
        "HEADS": config.num_heads,
        "KV_HEADS": config.num_kv_heads,
        "HEAD_DIM": config.head_dim,
    }


def num_partials(config: ModelConfig, num_blocks: int) -> int:
    """Floats of the partial sums of the product that has the most, at MAX_ROWS rows."""
    most = 0
    for features, inputs in _products(config, num_blocks):
        tiles, depth = features // _TILE_F, inputs // _UNIT_C
        units = tiles * depth

        def owner(unit: int, units: int = units) -> int:
            return ((unit + 1) * num_blocks - 1) // units

        parts = max(owner((t + 1) * depth - 1) - owner(t * depth) + 1 for t in range(tiles))
        most = max(most, tiles * parts * _TILE_F * MAX_ROWS)
    return most


def whole_rows(config: ModelConfig, num_blocks: int) -> int | None:
    """Rows of gate's weights, or of up's, that a block loads at once where it has whole features of
    them; None where they are cut in units as the other products are."""
    most = 2 * math.ceil(config.intermediate_size // 2 / num_blocks)  # features
    tiles = math.ceil(most / _TILE_F)
    rows = 8 * math.ceil(math.ceil(most / tiles) / 8)
    return rows if rows >= _LEAST_WHOLE and tiles <= _MAX_WHOLE_TILES else None


def _products(config: ModelConfig, num_blocks: int) -> list[tuple[int, int]]:
    """(F, C) of each product that is cut in units."""
    e, i = config.hidden_size, config.intermediate_size
    q_features = config.num_heads * config.head_dim
    qkv_features = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    products = [(e, q_features), (e, i), (qkv_features, e)]
    return products if whole_rows(config, num_blocks) else [*products, (2 * i, e)]


def _padded(num_rows: int) -> int:
    return next(rows for rows in ROWS if rows >= num_rows)
