"""Which attention backend runs on which device?"""

from __future__ import annotations

import torch

from graphengine.attention.base import AttentionBackend, DecodeMetadata, PrefillMetadata
from graphengine.attention.flash import FlashAttention
from graphengine.attention.reference import ReferenceAttention
from graphengine.errors import BackendError

__all__ = ["AttentionBackend", "DecodeMetadata", "PrefillMetadata", "make_attention"]


def make_attention(name: str, device: torch.device) -> AttentionBackend:
    """The backend called `name`; "auto" is "flash" on CUDA and "reference" elsewhere.

    Raises BackendError for "flash" off CUDA or without flash-attn: a silent fallback would be a
    slow path nobody asked for."""
    if name == "auto":
        name = "flash" if device.type == "cuda" else "reference"
    if name == "reference":
        return ReferenceAttention()
    if device.type != "cuda":
        raise BackendError(
            f'attention "{name}" runs on CUDA, the device is {device.type}; '
            'choose attention "reference" or device "cuda"'
        )
    return FlashAttention()
