"""Which attention backend runs on which device?"""

from __future__ import annotations

import torch

from graphengine.attention.base import AttentionBackend, DecodeMetadata, PrefillMetadata
from graphengine.attention.flash import FlashAttention
from graphengine.attention.flash4 import FlashAttention4
from graphengine.attention.reference import ReferenceAttention
from graphengine.errors import BackendError

__all__ = ["AttentionBackend", "DecodeMetadata", "PrefillMetadata", "make_attention"]


def make_attention(name: str, device: torch.device) -> AttentionBackend:
    """The backend called `name`; "auto" is "flash" on CUDA and "reference" elsewhere.

    Raises BackendError for "flash" or "flash4" where it cannot run or is not installed: a silent
    fallback would be a slow path nobody asked for. "auto" is never "flash4": it costs seconds of
    the start, and what is installed should not decide how a job's numbers round."""
    if name == "auto":
        name = "flash" if device.type == "cuda" else "reference"
    if name == "reference":
        return ReferenceAttention()
    if device.type != "cuda":
        raise BackendError(
            f'attention "{name}" runs on CUDA, the device is {device.type}; '
            'choose attention "reference" or device "cuda"'
        )
    return FlashAttention4(device) if name == "flash4" else FlashAttention()
