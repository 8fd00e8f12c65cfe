"""How does a decode step of few rows run on Hopper? All layers in one launch.

`decode_chain.cu` says how. This is its host side: which models it takes, its buffers, and how the
copy engine is told where weights, inputs, keys and values lie. A row's result does not depend on
the number of rows, nor on the others: not one bit.

Letters: N rows, E hidden, I intermediate, H query heads, K kv heads, D head dim, L layers,
W blocks per sequence.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from cuda.bindings import driver
from torch import Tensor

from graphengine.attention.base import DecodeMetadata
from graphengine.kernels.nvrtc import Kernel, checked, compiled
from graphengine.model_config import ModelConfig

MAX_ROWS = 64
ROWS = (8, 16, 32, 64)  # a kernel each
SOURCE = Path(__file__).with_name("decode_chain.cu")
HEADER = Path(__file__).with_name("hopper.cuh")
ARCHITECTURE = "sm_90a"
_CAPABILITY = (9, 0)  # wgmma is Hopper's alone
_NUM_THREADS = 320
# As in decode_chain.cu.
_TILE_F = 128
_UNIT_C = 64
_TILE_T = 64
_HEAD_DIM = 128
_MAX_GROUP = 8
_MAX_PARTS = 32
_NUM_COUNTERS = 5
_COUNTER_STRIDE = 32
_EMPTY = -1
_BOX_ROWS = 64
# A chunk of attention has 256 tokens, and more where a row could have more than 32 chunks.
_CHUNK_TOKENS = 256
_MAX_CHUNKS = 32
_LOG2_E = math.log2(math.e)


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


class TensorMap(ctypes.Structure):
    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class LayerParams(ctypes.Structure):
    """`Layer` of decode_chain.cu, field by field."""

    _fields_ = (
        *((name, TensorMap) for name in ("o", "gate_up", "down", "qkv", "keys", "values")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "input_norm",
                "post_norm",
                "qkv_bias",
                "q_norm",
                "k_norm",
                "k_cache",
                "v_cache",
                "unused",
            )
        ),
    )


class Params(ctypes.Structure):
    """`Params` of decode_chain.cu, field by field; it is aligned to 64 bytes there."""

    _fields_ = (
        *((name, TensorMap) for name in ("attended_map", "normed_map", "activated_map")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "layers",
                "partials",
                "chunks",
                "squares",
                "counters",
                "residual",
                "normed",
                "activated",
                "q",
                "attended",
                "unscaled",
                "hidden",
                "last_norm",
                "slots",
                "positions",
                "context_lens",
                "block_tables",
                "cos_sin",
                "token_ids",
                "embedding",
            )
        ),
        ("tables_stride", ctypes.c_int64),
        ("slot_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("softmax_scale", ctypes.c_float),
        ("num_rows", ctypes.c_int),
        ("block_size", ctypes.c_int),
    )


class Launcher(Protocol):
    """What runs the kernel: a Hopper GPU, or, in the tests, a CPU."""

    num_blocks: int

    def tensor_map(self, matrix: Tensor, box_rows: int) -> TensorMap:
        """How boxes of box_rows x 64 elements are found in `matrix`, bfloat16, its rows dense and
        multiples of 16 bytes apart. Rows past the end read as zeros."""

    def launch(self, params: Params, num_rows: int) -> None:
        """num_rows: one of ROWS."""


class DecodeChain:
    """A decode step of up to MAX_ROWS rows from token ids to the last norm, on torch's current
    stream; it can be captured. Reads weights and KV cache in place, at the addresses they had when
    `run` saw them."""

    max_rows = MAX_ROWS

    def __init__(
        self,
        config: ModelConfig,
        *,
        cos_sin: Tensor,
        block_size: int,
        max_model_len: int,
        device: torch.device,
        launcher: Launcher | None = None,
    ) -> None:
        """cos_sin: as `layers.rope_table` makes it. Compiles the kernels, or takes them from the
        user's cache, unless a launcher is given."""
        self._config = config
        self._cos_sin = cos_sin
        self._block_size = block_size
        self._chunk_tiles = chunk_tiles(max_model_len)
        self._device = device
        self._launcher = launcher or HopperLauncher(config, self._chunk_tiles, device)
        h, e, i = config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size

        def buffer(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def empty(size: int) -> Tensor:
            return torch.full((size,), _EMPTY, dtype=torch.int32, device=device)

        self._partials = empty(num_partials(config, self._launcher.num_blocks))
        self._chunks = empty(MAX_ROWS * _MAX_CHUNKS * config.num_kv_heads * chunk_floats(config))
        self._squares = buffer(MAX_ROWS, e // _TILE_F, dtype=torch.float32)
        counters = (config.num_layers + 1) * _NUM_COUNTERS * _COUNTER_STRIDE
        self._counters = buffer(counters, dtype=torch.int32)
        self._residual = buffer(MAX_ROWS, e)
        self._normed = buffer(MAX_ROWS, e)
        self._activated = buffer(MAX_ROWS, i)
        self._q = buffer(MAX_ROWS, h)
        self._attended = buffer(MAX_ROWS, h)
        self._unscaled = buffer(MAX_ROWS, e, dtype=torch.float32)
        self._layers: dict[bytes, Tensor] = {}

    @staticmethod
    def takes(
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        block_size: int,
        device: torch.device,
        num_blocks: int | None = None,
    ) -> bool:
        """Whether a model runs this way. Its layers must see all tokens: a window that some
        position reaches past is not known here. num_blocks: of the device's multiprocessors, if
        `device` is not to be asked."""
        if num_blocks is None:
            if device.type != "cuda" or torch.cuda.get_device_capability(device) != _CAPABILITY:
                return False
            num_blocks = torch.cuda.get_device_properties(device).multi_processor_count
        group, rest = divmod(config.num_heads, config.num_kv_heads)
        if dtype != torch.bfloat16 or config.head_dim != _HEAD_DIM or block_size % _TILE_T:
            return False
        if config.o_bias or config.mlp_bias or rest or group > _MAX_GROUP:
            return False
        return all(
            features % _TILE_F == 0
            and depth % _UNIT_C == 0
            # Each block has a part of each product.
            and features // _TILE_F * (depth // _UNIT_C) >= num_blocks
            and max_parts(features, depth, num_blocks) <= _MAX_PARTS
            for features, depth in _products(config)
        )

    def run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        metadata: DecodeMetadata,
        *,
        embedding: Tensor,
        layers: Sequence[LayerWeights],
        norm: Tensor,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
    ) -> Tensor:
        """token_ids and positions: int64 [N] -> hidden states after the last norm [N, E]. The
        tokens' keys and values go to the caches at metadata.slot_mapping."""
        num_rows = len(token_ids)
        rows = next(rows for rows in ROWS if rows >= num_rows)
        block_size, num_kv_heads, head_dim = k_caches[0].shape[1:]
        assert block_size == self._block_size
        assert k_caches[0].stride(0) == block_size * k_caches[0].stride(1)
        assert metadata.block_tables.stride(1) == 1
        shape = (num_rows, self._config.hidden_size)
        hidden = torch.empty(shape, dtype=embedding.dtype, device=self._device)
        self._counters.zero_()
        params = Params(
            attended_map=self._launcher.tensor_map(self._attended, rows),
            normed_map=self._launcher.tensor_map(self._normed, rows),
            activated_map=self._launcher.tensor_map(self._activated, rows),
            layers=self._layer_params(layers, k_caches, v_caches).data_ptr(),
            partials=self._partials.data_ptr(),
            chunks=self._chunks.data_ptr(),
            squares=self._squares.data_ptr(),
            counters=self._counters.data_ptr(),
            residual=self._residual.data_ptr(),
            normed=self._normed.data_ptr(),
            activated=self._activated.data_ptr(),
            q=self._q.data_ptr(),
            attended=self._attended.data_ptr(),
            unscaled=self._unscaled.data_ptr(),
            hidden=hidden.data_ptr(),
            last_norm=norm.data_ptr(),
            slots=metadata.slot_mapping.data_ptr(),
            positions=positions.data_ptr(),
            context_lens=metadata.context_lens.data_ptr(),
            block_tables=metadata.block_tables.data_ptr(),
            cos_sin=self._cos_sin.data_ptr(),
            token_ids=token_ids.data_ptr(),
            embedding=embedding.data_ptr(),
            tables_stride=metadata.block_tables.stride(0),
            slot_stride=num_kv_heads * head_dim,
            eps=self._config.rms_norm_eps,
            softmax_scale=head_dim**-0.5 * _LOG2_E,
            num_rows=num_rows,
            block_size=block_size,
        )
        self._launcher.launch(params, rows)
        return hidden

    def _layer_params(
        self,
        layers: Sequence[LayerWeights],
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
    ) -> Tensor:
        """LayerParams of all layers in the device's memory, copied there when weights and caches are
        first seen (so not while a graph is captured: a step is run once before). Addresses alone
        would not tell: memory that was freed serves others."""
        table = (LayerParams * len(layers))(
            *(self._params_of(*each) for each in zip(layers, k_caches, v_caches, strict=True))
        )
        contents = bytes(table)
        if contents not in self._layers:
            copied = torch.frombuffer(bytearray(contents), dtype=torch.uint8)
            self._layers[contents] = copied.to(self._device)
        return self._layers[contents]

    def _params_of(self, layer: LayerWeights, k_cache: Tensor, v_cache: Tensor) -> LayerParams:
        def address(weight: Tensor | None) -> int | None:
            return None if weight is None else weight.data_ptr()

        def tensor_map(matrix: Tensor) -> TensorMap:
            return self._launcher.tensor_map(matrix, _BOX_ROWS)

        return LayerParams(
            o=tensor_map(layer.o_proj),
            gate_up=tensor_map(layer.gate_up_proj),
            down=tensor_map(layer.down_proj),
            qkv=tensor_map(layer.qkv_proj),
            keys=tensor_map(k_cache.view(-1, k_cache.shape[2] * k_cache.shape[3])),
            values=tensor_map(v_cache.view(-1, v_cache.shape[2] * v_cache.shape[3])),
            input_norm=layer.input_norm.data_ptr(),
            post_norm=layer.post_norm.data_ptr(),
            qkv_bias=address(layer.qkv_bias),
            q_norm=address(layer.q_norm),
            k_norm=address(layer.k_norm),
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
        )


class HopperLauncher:
    """Launcher on torch's current stream of a GPU."""

    def __init__(self, config: ModelConfig, chunk_tiles: int, device: torch.device) -> None:
        self._device = device
        self._maps: dict[tuple[int, ...], TensorMap] = {}  # all of a map follows from its key
        self.num_blocks = torch.cuda.get_device_properties(device).multi_processor_count

        def compile(rows: int) -> bytes:
            defines = defines_for(
                config, num_rows=rows, num_blocks=self.num_blocks, chunk_tiles=chunk_tiles
            )
            return compiled(SOURCE, (HEADER,), architecture=ARCHITECTURE, defines=defines)

        with ThreadPoolExecutor(len(ROWS)) as pool:
            cubins = list(pool.map(compile, ROWS))
        self._kernels = {
            rows: Kernel(cubin, "decode_chain", num_threads=_NUM_THREADS)
            for rows, cubin in zip(ROWS, cubins, strict=True)
        }

    def tensor_map(self, matrix: Tensor, box_rows: int) -> TensorMap:
        """See Launcher."""
        num_rows, num_columns = matrix.shape
        key = (matrix.data_ptr(), num_rows, num_columns, matrix.stride(0), box_rows)
        if key not in self._maps:
            self._maps[key] = self._encoded(matrix, box_rows)
        return self._maps[key]

    def _encoded(self, matrix: Tensor, box_rows: int) -> TensorMap:
        num_rows, num_columns = matrix.shape
        tensor_map = checked(
            driver.cuTensorMapEncodeTiled(
                driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                matrix.data_ptr(),
                [driver.cuuint64_t(num_columns), driver.cuuint64_t(num_rows)],
                [driver.cuuint64_t(matrix.stride(0) * matrix.element_size())],
                [driver.cuuint32_t(_UNIT_C), driver.cuuint32_t(box_rows)],
                [driver.cuuint32_t(1), driver.cuuint32_t(1)],
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )
        return TensorMap.from_buffer_copy(ctypes.string_at(tensor_map.getPtr(), 128))

    def launch(self, params: Params, num_rows: int) -> None:
        """See Launcher."""
        # The kernel's struct is aligned to 64 bytes, so its size is a multiple of that.
        padded = ctypes.create_string_buffer(-(-ctypes.sizeof(params) // 64) * 64)
        ctypes.memmove(padded, ctypes.addressof(params), ctypes.sizeof(params))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._kernels[num_rows].launch(padded, num_blocks=self.num_blocks, stream=stream)


def defines_for(
    config: ModelConfig, *, num_rows: int, num_blocks: int, chunk_tiles: int
) -> dict[str, int]:
    """What SOURCE is compiled with for steps of up to num_rows rows, one of ROWS."""
    return {
        "NR": num_rows,
        "GRID": num_blocks,
        "HIDDEN": config.hidden_size,
        "INTER": config.intermediate_size,
        "HEADS": config.num_heads,
        "KV_HEADS": config.num_kv_heads,
        "NUM_LAYERS": config.num_layers,
        "CHUNK_TILES": chunk_tiles,
        "MAX_CHUNKS": _MAX_CHUNKS,
    }


def chunk_tiles(max_model_len: int) -> int:
    """Tiles of a chunk of attention."""
    chunks = max(1, math.ceil(max_model_len / (_MAX_CHUNKS * _CHUNK_TOKENS)))
    return chunks * _CHUNK_TOKENS // _TILE_T


def chunk_floats(config: ModelConfig) -> int:
    """Of a chunk's result, CHUNK_FLOATS of the kernel."""
    group = config.num_heads // config.num_kv_heads
    return (_HEAD_DIM + 8) * (1 << (group - 1).bit_length())


def num_partials(config: ModelConfig, num_blocks: int) -> int:
    """Floats of the partial sums of the product that has the most, at MAX_ROWS rows."""
    return max(
        features // _TILE_F * max_parts(features, depth, num_blocks) * _TILE_F * MAX_ROWS
        for features, depth in _products(config)
    )


def max_parts(features: int, depth: int, num_blocks: int) -> int:
    """The most blocks that sum one tile of features, MAX_PARTS of the kernel."""
    tiles, units = features // _TILE_F, depth // _UNIT_C

    def owner(unit: int) -> int:
        return ((unit + 1) * num_blocks - 1) // (tiles * units)

    return max(owner((t + 1) * units - 1) - owner(t * units) + 1 for t in range(tiles))


def _products(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """(F, C) of each product of a layer."""
    e, i = config.hidden_size, config.intermediate_size
    q_features = config.num_heads * config.head_dim
    qkv_features = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return (e, q_features), (2 * i, e), (e, i), (qkv_features, e)
