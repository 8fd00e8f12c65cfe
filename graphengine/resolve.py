"""What do an engine's options come to on this machine? Every "auto" is decided here, once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from captures import BucketLadder
from graphengine.attention import AttentionBackend, make_attention
from graphengine.attention.flash import FlashAttention
from graphengine.config import EngineConfig
from graphengine.errors import BackendError, ConfigError
from graphengine.metrics import Laps
from graphengine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Resolved:
    """An EngineConfig with nothing left open."""

    config: EngineConfig
    model_path: Path
    model_config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    attention: AttentionBackend
    block_size: int
    max_model_len: int
    ladder: BucketLadder

    @property
    def use_graphs(self) -> bool:
        return self.device.type == "cuda" and not self.config.enforce_eager

    @property
    def bytes_per_block(self) -> int:
        """Of KV cache, in all layers."""
        return self.block_size * self.model_config.kv_bytes_per_token(self.dtype.itemsize)


def resolve(
    config: EngineConfig, model_path: Path, model_config: ModelConfig, *, laps: Laps
) -> Resolved:
    """Raises BackendError or ConfigError."""
    device = _device(config.device)
    laps.end("device")
    attention = make_attention(config.attention, device)
    laps.end("imports")  # of flash-attn
    dtype = _dtype(config.dtype, model_config, device, attention.name)
    block_size = config.block_size or attention.default_block_size
    attention.check(
        block_size=block_size, head_dim=model_config.head_dim, dtype=dtype, device=device
    )
    limit = model_config.max_position_embeddings
    max_model_len = config.max_model_len or limit
    if max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {max_model_len}, the model was made for {limit} positions; lower it"
        )
    return Resolved(
        config=config,
        model_path=model_path,
        model_config=model_config,
        device=device,
        dtype=dtype,
        attention=attention,
        block_size=block_size,
        max_model_len=max_model_len,
        ladder=BucketLadder.up_to(config.max_num_seqs),
    )


def as_on_cuda(resolved: Resolved) -> Resolved:
    """What a machine without a GPU resolved, as one with a GPU would have: for plans only, since
    the attention backend stays what it is."""
    config = resolved.config
    is_flash = config.attention == "auto"
    device = torch.device("cuda", 0)
    attention = FlashAttention.name if is_flash else resolved.attention.name
    dtype = _dtype(config.dtype, resolved.model_config, device, attention)
    block_size = resolved.block_size
    if is_flash:
        block_size = config.block_size or FlashAttention.default_block_size
        FlashAttention.check_shapes(
            block_size=block_size, head_dim=resolved.model_config.head_dim, dtype=dtype
        )
    return dataclasses.replace(resolved, device=device, dtype=dtype, block_size=block_size)


def _device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise BackendError(
            "device is cuda, but torch sees no CUDA GPU here; choose device cpu, or install a "
            "CUDA build of torch and a driver"
        )
    return torch.device("cuda", 0) if name != "cpu" and has_cuda else torch.device("cpu")


def _dtype(
    name: str, model_config: ModelConfig, device: torch.device, attention: str
) -> torch.dtype:
    if name == "auto":
        name = model_config.dtype if device.type == "cuda" else "float32"
        if name == "float32" and attention != "reference":
            name = "bfloat16"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
