"""Which kernels run on which device? Triton on CUDA, their plain torch twins on the CPU; and on
Hopper some in CUDA C++.

Letters: N tokens, B decode rows, E hidden, H query heads, K kv heads, D head dim, I intermediate,
V vocab, M stop ids a row, P table positions. All functions have static shapes, never sync with the
host (see `reference.sample` for the one CPU-only exception) and can be captured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from graphengine.errors import BackendError
from graphengine.model_config import ModelConfig

if TYPE_CHECKING:
    from graphengine.kernels.decode_chain import DecodeChain


class Kernels(Protocol):
    """The fused operations of a decode step. `kernels.reference`, `kernels.fused` and the class of
    `kernels.tuned` have them all; `reference` says what each computes."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def rope_and_cache(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        whole: bool = False,
        decode: bool = False,
        out: Tensor | None = None,
    ) -> Tensor: ...

    def add_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
    ) -> None: ...

    def linear_silu_mul(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, decode: bool = False
    ) -> Tensor: ...

    def decode_chain(
        self,
        config: ModelConfig,
        *,
        cos_sin: Tensor,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> DecodeChain | None: ...

    def sample(
        self,
        logits: Tensor,
        *,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
        stop_ids: Tensor,
        suppress_stops: Tensor,
        out: Tensor,
        seq_indices: Tensor,
        last_token_ids: Tensor,
    ) -> None: ...


def kernels_for(device: torch.device) -> Kernels:
    """The kernels for `device`. Raises BackendError on CUDA without Triton or cuda-bindings:
    falling back to the plain twins there would be slow without saying so."""
    # Imported here: a CPU machine has neither, a CUDA one need not load what it never calls.
    if device.type != "cuda":
        from graphengine.kernels import reference

        return reference
    try:
        from graphengine.kernels import fused
    except ImportError as error:
        raise BackendError(
            f"device is {device} and Triton or cuda-bindings cannot be imported ({error}); "
            'install both, in the clone, with: pip install --no-build-isolation -e ".[cuda]", or '
            "run with --device cpu"
        ) from error
    return fused
