"""How does a model turn its positions into angles? RoPE, as a config.json has it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphengine.errors import ModelError

_ROPE_TYPES = ("default", "linear", "llama3")
_MOST_ANGLES = 4096  # looked at of one position: all of them, of any head up to twice as wide


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. rope_type: "default", "linear" (factor) or "llama3" (all fields)."""

    rope_type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: float = 8192.0


def rope_config(
    values: Mapping[str, Any], file: Path, *, head_dim: int, num_positions: int
) -> RopeConfig:
    """RoPE of the config.json `file` with `values`, as transformers reads it: `rope_scaling` is the
    older name of `rope_parameters` and goes first, and theta may stand beside either. Raises
    ModelError for what is not supported or cannot be computed with."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"{file} has rope_parameters {given!r}; it must be an object")
    for name, value in given.items():
        if isinstance(value, Mapping):
            raise ModelError(f"{file} has RoPE of its own for {name!r}; one for all is supported")
    parameters = {
        "rope_type": given.get("type", "default"),
        "rope_theta": values["rope_theta"],
        "original_max_position_embeddings": values["max_position_embeddings"],
        **given,
    }
    rope_type = parameters["rope_type"]
    if rope_type not in _ROPE_TYPES:
        raise ModelError(f"{file} has RoPE type {rope_type!r}; supported: {', '.join(_ROPE_TYPES)}")
    rotary_share = values.get("partial_rotary_factor")
    rotary_share = given.get("partial_rotary_factor", 1.0 if rotary_share is None else rotary_share)
    if rotary_share != 1.0:
        raise ModelError(
            f"{file} has partial_rotary_factor {rotary_share!r}; only RoPE over the whole head "
            "(1.0) is supported"
        )
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }[rope_type]
    numbers = {"theta": parameters["rope_theta"]}
    numbers |= {name: parameters.get(name) for name in names}
    for name, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Python's JSON knows NaN and Infinity, and whole numbers that no float holds.
        if not is_number or not 0 < value <= sys.float_info.max:
            raise ModelError(
                f"{file} has RoPE {name} {value!r}; it must be a finite number above 0"
            )
    # Not as a whole number, which may be larger than torch takes.
    rope = RopeConfig(rope_type, **{name: float(value) for name, value in numbers.items()})
    if not has_finite_angles(rope, head_dim=head_dim, num_positions=num_positions):
        shown = ", ".join(f"{name} {value!r}" for name, value in numbers.items())
        raise ModelError(
            f"{file} has RoPE {shown}, whose angles at {num_positions} positions float32 cannot "
            "hold; give the numbers that the model was trained with"
        )
    return rope


def has_finite_angles(rope: RopeConfig, *, head_dim: int, num_positions: int) -> bool:
    """Whether layers.rope_table has, expression by expression; without, each logit is NaN."""
    with np.errstate(all="ignore"):
        dims = np.linspace(0, head_dim - 2, min(head_dim // 2, _MOST_ANGLES), dtype=np.float32)
        inv_freq = 1.0 / rope.theta ** (dims / head_dim)
        if rope.rope_type == "linear":
            inv_freq = inv_freq / rope.factor
        elif rope.rope_type == "llama3":
            wavelengths = 2 * math.pi / inv_freq
            original = rope.original_max_position_embeddings
            low, high = rope.low_freq_factor, rope.high_freq_factor
            smooth = (original / wavelengths - low) / (high - low)
            scaled = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
            scaled = np.where(wavelengths > original / low, inv_freq / rope.factor, scaled)
            inv_freq = np.where(wavelengths < original / high, inv_freq, scaled)
        return bool(np.isfinite(inv_freq * np.float32(num_positions)).all())
