"""Which attention backend runs on which device?"""

from __future__ import annotations

import torch

from graphengine.attention.base import AttentionBackend, DecodeMetadata, PrefillMetadata
from graphengine.attention.flash import FlashAttention
from graphengine.attention.flash4 import FlashAttention4
from graphengine.attention.reference import ReferenceAttention
from graphengine.config import ATTENTION
from graphengine.errors import BackendError

__all__ = ["AttentionBackend", "DecodeMetadata", "PrefillMetadata", "make_attention"]


def make_attention(
    name: str,
    device: torch.device,
    *,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionBackend:
    """The backend called `name`; "auto" is "flash" on CUDA and "reference" elsewhere, but "flash4"
    on Hopper for a head_dim and dtype that it takes, where exactly the packages are installed that
    it is written for. Should it then not run, a warning says so and all is as with "flash".

    Raises BackendError for "flash" or "flash4" where it cannot run or is not installed: a silent
    fallback would be a slow path nobody asked for; and for a name that there is not."""
    if name == "auto":
        name = "flash" if device.type == "cuda" else "reference"
        if FlashAttention4.takes(device, head_dim=head_dim, dtype=dtype):
            return FlashAttention4(device, or_flash=True)
    if name not in ATTENTION:
        raise BackendError(f"attention is {name!r}; choose one of {', '.join(ATTENTION)}")
    if name == "reference":
        return ReferenceAttention()
    if device.type != "cuda":
        raise BackendError(
            f'attention "{name}" runs on CUDA, the device is {device.type}; '
            'choose attention "reference" or device "cuda"'
        )
    return FlashAttention4(device) if name == "flash4" else FlashAttention()
