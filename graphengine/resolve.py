"""What do an engine's options come to on this machine? Every "auto" is decided here, once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from captures import BucketLadder
from graphengine.attention import AttentionBackend, make_attention
from graphengine.attention.flash import FlashAttention
from graphengine.attention.flash4 import FlashAttention4
from graphengine.attention.reference import ReferenceAttention
from graphengine.config import TUNING, EngineConfig
from graphengine.errors import BackendError, ConfigError
from graphengine.metrics import Laps
from graphengine.model_config import ModelConfig

# What a folder of tuning may say that was begun with: those that round otherwise on one GPU.
_KEPT = (FlashAttention.name, FlashAttention4.name)


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
    is_reference = config.attention == "reference" or device.type != "cuda"
    dtype = _dtype(config.dtype, model_config, device, is_reference=is_reference)
    attention = _attention(config, model_config, device, dtype)
    laps.end("imports")  # of flash-attn
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
    is_reference = not is_flash and resolved.attention.name == ReferenceAttention.name
    dtype = _dtype(config.dtype, resolved.model_config, device, is_reference=is_reference)
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


def _attention(
    config: EngineConfig, model_config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    name, head_dim = config.attention, model_config.head_dim
    if name != "auto" or device.type != "cuda":
        return make_attention(name, device)
    # "off": nothing depends on what this machine has.
    if config.tuning == "off":
        return make_attention(FlashAttention.name, device)
    path = own_tuning_file(config, model_config, device, dtype)
    begun = None
    if path is not None:
        from graphengine.tuning_file import attention_begun_with

        begun = attention_begun_with(path)
        _check_begun(begun, path)
    if begun is None:
        return make_attention(name, device, head_dim=head_dim, dtype=dtype)
    if begun != FlashAttention4.name:
        return make_attention(begun, device)
    return FlashAttention4(
        device,
        instead=f"begin anew, with another folder of tuning (a job: with another output): {path} "
        'says that this began with "flash4", which rounds otherwise than "flash"',
    )


def _check_begun(begun: str | None, path: Path) -> None:
    """Raises BackendError unless it is one that a start may have written, or None."""
    if begun is not None and begun not in _KEPT:
        said = repr(begun) if len(begun) <= 40 else f"{begun[:40]!r}..."
        raise BackendError(
            f"{path} says that this began with attention {said}, expected one of "
            f"{', '.join(_KEPT)}; mend it, or begin anew, with another folder of tuning (a job: "
            "with another output)"
        )


def own_tuning_file(
    config: EngineConfig, model_config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Path | None:
    """The file of the user's own folder (see EngineConfig.tuning), if there is one, for models of
    this shape on this kind of GPU: what goes on with it rounds as what began with it did."""
    if config.tuning in TUNING:
        return None
    # Imported here, as elsewhere: filelock comes with the extra for CUDA.
    from graphengine.tuning_file import file_in

    return file_in(
        Path(config.tuning).expanduser(), tuned_shape(model_config, device=device, dtype=dtype)
    )


def tuned_shape(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    """What ways of products and of attention are chosen by, the card and its software aside."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "biases": [config.qkv_bias, config.o_bias, config.mlp_bias],
        "dtype": str(dtype),
        "capability": list(torch.cuda.get_device_capability(device)),
    }


def keep_attention(resolved: Resolved) -> None:
    """Writes to the user's own folder which attention this runs by, unless that is said there.
    Raises BackendError where "auto" has come to one and the folder says another by now, which a
    process that began at the same time has come to; who names an attention gets it."""
    config, name = resolved.config, resolved.attention.name
    if name not in _KEPT or resolved.device.type != "cuda":
        return
    path = own_tuning_file(config, resolved.model_config, resolved.device, resolved.dtype)
    if path is None:
        return
    from graphengine.tuning_file import keep_attention_begun_with

    shape = tuned_shape(resolved.model_config, device=resolved.device, dtype=resolved.dtype)
    begun = keep_attention_begun_with(path, shape, name)
    if config.attention != "auto" or begun == name:
        return
    _check_begun(begun, path)
    raise BackendError(
        f'attention is "{name}" here, and "{begun}" in a process that began at the same time '
        f"with {path}; start this one again, which takes what stands there"
    )


def _dtype(
    name: str, model_config: ModelConfig, device: torch.device, *, is_reference: bool
) -> torch.dtype:
    if name == "auto":
        name = model_config.dtype if device.type == "cuda" else "float32"
        if name == "float32" and not is_reference:
            name = "bfloat16"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
