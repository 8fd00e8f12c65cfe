"""How do the tensors of a safetensors checkpoint get into the model's fused parameters?

Headers are checked first, against the config and without allocating; then threads read the files
in pieces into small staging buffers and copy those to the device. The host never holds a tensor,
let alone a shard. Pickled checkpoints (.bin) are refused: loading one can run code.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from graphengine.checkpoint import StoredTensor, read_checkpoint
from graphengine.errors import WeightsError
from graphengine.model_config import ModelConfig

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# One thread reads about 8 GB/s from the page cache; a PCIe 5 x16 link takes about 50. A multiple of
# every dtype's size; larger pieces copy no faster and pin more memory.
_PIECE_BYTES = 8 << 20
_CUDA_THREADS = 8
_CPU_THREADS = 2
_DUMMY_STD = 0.02


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a tensor goes: `shape[0]` rows of `parameter` from `first_row` on."""

    parameter: str
    first_row: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """One read: bytes [offset, offset + num_bytes) of `fd` are the values of `into` (1-D)."""

    fd: int
    file: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    into: Tensor


def check_weights(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint in `path` that `config` needs, by their stored names.

    Reads headers only. Raises WeightsError naming the file, and the tensor with both shapes where
    one is missing, unknown, of another shape or not of a plain float dtype."""
    checkpoint = read_checkpoint(path)
    stored = dict(checkpoint.tensors)
    if config.tie_word_embeddings and _EMBEDDING not in stored and _HEAD in stored:
        stored[_EMBEDDING] = stored[_HEAD]
    targets = _layout(config)
    for name, target in targets.items():
        if name not in stored:
            raise WeightsError(
                f"{checkpoint.file_of(name)}: tensor {name!r} is missing; config.json asks for it "
                f"with shape {list(target.shape)}, correct config.json or complete the checkpoint"
            )
        if stored[name].shape != target.shape:
            raise WeightsError(
                f"{stored[name].file}: tensor {name!r} has shape {list(stored[name].shape)}, "
                f"config.json gives {list(target.shape)}; correct one of them"
            )
    for name, tensor in stored.items():
        is_tied_head = config.tie_word_embeddings and name == _HEAD
        if name not in targets and not is_tied_head:
            raise WeightsError(
                f"{tensor.file}: tensor {name!r} of shape {list(tensor.shape)} is unexpected; a "
                f"{config.architecture} with this config.json has none, correct one of them"
            )
    return stored


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of `config` stores, in loading order."""
    return {name: target.shape for name, target in _layout(config).items()}


def load_weights(model: nn.Module, path: Path, config: ModelConfig) -> None:
    """Fills the parameters of a DecoderModel from the checkpoint in `path`, converting dtypes.

    On return all copies have landed. Raises WeightsError as check_weights does, for a file that
    ends early, and for a tied checkpoint that stores a head of its own with other values."""
    stored = check_weights(path, config)
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    with ExitStack() as stack:
        fds: dict[Path, int] = {}
        for file in {tensor.file for tensor in stored.values()}:
            fds[file] = os.open(file, os.O_RDONLY)
            stack.callback(os.close, fds[file])
        if config.tie_word_embeddings and _HEAD in stored:
            _check_tied_head(stored, fds)
        pieces: deque[_Piece] = deque()
        for name, target in _layout(config).items():
            tensor = stored[name]
            rows = parameters[target.parameter].detach()[target.first_row :][: target.shape[0]]
            pieces.extend(_pieces(tensor, fds[tensor.file], rows.view(-1)))
        _copy_all(pieces, device)


def dummy_weights(model: nn.Module, *, seed: int) -> None:
    """Fills the parameters with seeded values of standard deviation 0.02, norms with ones.

    A parameter's values depend on seed, name, shape, dtype and the kind of device only."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm"):
            parameter.detach().fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(parameter.device)
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        parameter.detach().normal_(0.0, _DUMMY_STD, generator=generator)


def _layout(config: ModelConfig) -> dict[str, _Target]:
    """Every tensor the checkpoint must have, by Hugging Face's name, and its place in our model."""
    e, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * d, config.num_kv_heads * d
    targets = {_EMBEDDING: _Target("embed_tokens", 0, (config.vocab_size, e))}
    if not config.tie_word_embeddings:
        targets[_HEAD] = _Target("lm_head", 0, (config.vocab_size, e))
    targets["model.norm.weight"] = _Target("norm", 0, (e,))
    for index in range(config.num_layers):
        theirs, ours = f"model.layers.{index}", f"layers.{index}"
        attn, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        targets[f"{theirs}.input_layernorm.weight"] = _Target(f"{ours}.input_norm", 0, (e,))
        targets[f"{theirs}.post_attention_layernorm.weight"] = _Target(f"{ours}.post_norm", 0, (e,))
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                targets[f"{attn}.{name}.weight"] = _Target(f"{ours}.{name}", 0, (d,))
        for linear, fused, first_row, rows, columns, has_bias in (
            (f"{attn}.q_proj", "qkv", 0, q_rows, e, config.qkv_bias),
            (f"{attn}.k_proj", "qkv", q_rows, kv_rows, e, config.qkv_bias),
            (f"{attn}.v_proj", "qkv", q_rows + kv_rows, kv_rows, e, config.qkv_bias),
            (f"{attn}.o_proj", "o", 0, e, q_rows, config.o_bias),
            (f"{mlp}.gate_proj", "gate_up", 0, i, e, config.mlp_bias),
            (f"{mlp}.up_proj", "gate_up", i, i, e, config.mlp_bias),
            (f"{mlp}.down_proj", "down", 0, e, i, config.mlp_bias),
        ):
            targets[f"{linear}.weight"] = _Target(
                f"{ours}.{fused}_proj", first_row, (rows, columns)
            )
            if has_bias:
                targets[f"{linear}.bias"] = _Target(f"{ours}.{fused}_bias", first_row, (rows,))
    return targets


def _check_tied_head(stored: Mapping[str, StoredTensor], fds: Mapping[Path, int]) -> None:
    """transformers unties such a model with a warning; here config.json has to say so."""
    head, embedding = stored[_HEAD], stored[_EMBEDDING]
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    for done in range(0, head.num_bytes if same else 0, _PIECE_BYTES):
        size = min(_PIECE_BYTES, head.num_bytes - done)
        same = same and (
            os.pread(fds[head.file], size, head.offset + done)
            == os.pread(fds[embedding.file], size, embedding.offset + done)
        )
    if not same:
        raise WeightsError(
            f"{head.file}: tensor {_HEAD!r} differs from {_EMBEDDING!r}, but config.json ties "
            'them; set "tie_word_embeddings" to false there'
        )


def _pieces(tensor: StoredTensor, fd: int, into: Tensor) -> Iterable[_Piece]:
    """`tensor` cut into reads of at most _PIECE_BYTES. into: its place in a parameter, flat."""
    piece_bytes = _PIECE_BYTES
    for start in range(0, tensor.num_bytes, piece_bytes):
        end = min(start + piece_bytes, tensor.num_bytes)
        yield _Piece(
            fd=fd,
            file=tensor.file,
            offset=tensor.offset + start,
            num_bytes=end - start,
            dtype=tensor.dtype,
            into=into[start // tensor.dtype.itemsize : end // tensor.dtype.itemsize],
        )


def _copy_all(pieces: deque[_Piece], device: torch.device) -> None:
    """Empties `pieces` with a few threads; raises the first error of any."""
    is_cuda = device.type == "cuda"
    num_threads = min(_CUDA_THREADS if is_cuda else _CPU_THREADS, len(pieces))
    staging_bytes = max(piece.num_bytes for piece in pieces)
    # The parameters' memory may still be in use by work queued on this stream.
    queued = torch.cuda.current_stream(device) if is_cuda else None
    with ThreadPoolExecutor(num_threads) as pool:
        work = _copy_on_cuda if is_cuda else _copy_on_cpu
        futures = [pool.submit(work, pieces, staging_bytes, queued) for _ in range(num_threads)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pieces.clear()  # after an error or Ctrl-C the threads stop at their next piece
        for future in futures:
            future.result()


@torch.inference_mode()
def _copy_on_cpu(
    pieces: deque[_Piece], staging_bytes: int, _queued: torch.cuda.Stream | None
) -> None:
    staging = torch.empty(staging_bytes, dtype=torch.uint8)
    while piece := _next(pieces):
        piece.into.copy_(_read(piece, staging))


@torch.inference_mode()
def _copy_on_cuda(
    pieces: deque[_Piece], staging_bytes: int, queued: torch.cuda.Stream | None
) -> None:
    """Reads into one pinned buffer while the copy from the other is under way."""
    assert queued is not None
    stream = torch.cuda.Stream(queued.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(queued)
    stagings = [torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
    turn = 0
    with torch.cuda.stream(stream):
        while piece := _next(pieces):
            # The buffer's last copy reads it; overwriting waits for that copy, not for the stream.
            copied[turn].synchronize()
            values = _read(piece, stagings[turn])
            if values.dtype != piece.into.dtype:  # convert on the device: it is faster there
                values = values.to(piece.into.device, non_blocking=True)
            piece.into.copy_(values, non_blocking=True)
            copied[turn].record(stream)
            turn = 1 - turn
    stream.synchronize()


def _next(pieces: deque[_Piece]) -> _Piece | None:
    """Atomic: threads share the deque."""
    try:
        return pieces.popleft()
    except IndexError:
        return None


def _read(piece: _Piece, staging: Tensor) -> Tensor:
    """The piece's values as a view of `staging`. Raises WeightsError if the file ends early."""
    staging = staging[: piece.num_bytes]
    buffer = staging.numpy().data
    done = 0
    while done < piece.num_bytes:
        num_read = os.preadv(piece.fd, [buffer[done:]], piece.offset + done)
        if num_read == 0:
            raise WeightsError(
                f"{piece.file} ends before byte {piece.offset + piece.num_bytes}, where a tensor "
                "ends; download it again"
            )
        done += num_read
    return staging.view(piece.dtype)
