"""How does a prefill run by FlashAttention 4, on Hopper? Single queries stay with `flash`: those of
decode steps, and of a prefill's last layer.

flash-attn 4 (package flash-attn-4, module flash_attn.cute) is compiled when it is first called: the
import and that take seconds of a start, so nobody gets it without asking. What a kernel is compiled
for is the compile_key of its interface.py: dtype, heads, whether there is a window, and nothing
that changes from step to step as it is called here. So `ModelRunner.run_largest_steps` compiles all
there will be.

Letters: N tokens, S sequences, T keys, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from graphengine.attention.base import DecodeMetadata, PlannedDecode, PrefillMetadata
from graphengine.attention.flash import FlashAttention
from graphengine.errors import BackendError

_PACKAGE = "flash-attn-4"
# Of Hopper: other generations have other kernels, not measured here.
_MAJOR_CAPABILITY = 9
_HEAD_DIMS = (64, 128)
# interface.py: above BIN_BATCH_SEARCH_THRESH sequences another kernel is compiled. A prefill of so
# many has short ones, whose attention costs little either way.
_MAX_SEQUENCES = 256


class FlashAttention4:
    """AttentionBackend on flash-attn 4 and 2: Hopper, bfloat16 or float16, head dim 64 or 128.

    Keys of earlier chunks are copied out of the cache, 2 * T * K * D elements while a layer runs:
    the paged kernel needs pages of 128 tokens and reads slots that were never written."""

    name = "flash4"
    default_block_size = FlashAttention.default_block_size
    reads_key_slots = True

    def __init__(self, device: torch.device) -> None:
        """Raises BackendError off Hopper, or if flash-attn 4 or 2 cannot be imported."""
        capability = torch.cuda.get_device_capability(device)
        if capability[0] != _MAJOR_CAPABILITY:
            raise BackendError(
                f'attention "flash4" needs compute capability {_MAJOR_CAPABILITY}.x, this GPU has '
                f'{capability[0]}.{capability[1]}; choose attention "flash"'
            )
        self._flash = FlashAttention()
        self._varlen = _import_varlen()

    def check(
        self, *, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises as FlashAttention does, which decodes, and BackendError for other head dims."""
        self._flash.check(block_size=block_size, head_dim=head_dim, dtype=dtype, device=device)
        if head_dim not in _HEAD_DIMS:
            raise BackendError(
                f'the model\'s head_dim is {head_dim}; attention "flash4" needs '
                f'{" or ".join(map(str, _HEAD_DIMS))}, choose attention "flash"'
            )

    def planned_decode(self, **shape: Any) -> PlannedDecode | None:
        """See FlashAttention, which decodes."""
        return self._flash.planned_decode(**shape)

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: PrefillMetadata,
        *,
        window: int | None,
    ) -> Tensor:
        """See AttentionBackend. A sequence with NaN or infinite values can spoil its neighbours:
        the kernel multiplies them by zero."""
        # Mostly flash-attn 2 splits the keys of a single query. This one does not.
        if metadata.max_seqlen_q == 1 or metadata.cu_seqlens_q.shape[0] - 1 > _MAX_SEQUENCES:
            return self._flash.prefill(q, k, v, k_cache, v_cache, metadata, window=window)
        if metadata.has_context:
            assert metadata.key_slots is not None
            k = k_cache.flatten(0, 1).index_select(0, metadata.key_slots)  # [T, K, D]
            v = v_cache.flatten(0, 1).index_select(0, metadata.key_slots)
        # max_seqlen_q is left out: with it, short prompts would be compiled for apart.
        out, _ = self._varlen(
            q,
            k,
            v,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=metadata.cu_seqlens_k,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
        )
        return out

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: DecodeMetadata,
        *,
        window: int | None,
    ) -> Tensor:
        """See FlashAttention: flash-attn 4 splits no context on Hopper."""
        return self._flash.decode(q, k_cache, v_cache, metadata, window=window)


def _import_varlen() -> Callable[..., tuple[Tensor, Tensor | None]]:
    remedy = (
        'install it after flash-attn, whose folder it shares, with: pip install "graphengine'
        '[flash4]", or choose attention "flash"'
    )
    # flash-attn 2 brings a folder flash_attn/cute too, an early state of it.
    try:
        version(_PACKAGE)
    except PackageNotFoundError as error:
        raise BackendError(
            f'attention "flash4" needs {_PACKAGE}, which is not installed; {remedy}'
        ) from error
    # Whatever is wrong with it or with the compiler under it, RuntimeError among others.
    try:
        varlen = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BackendError(
            f'attention "flash4" needs {_PACKAGE}, which cannot be imported ({reason}); {remedy}'
        ) from error
    assert callable(varlen)
    return varlen  # type: ignore[no-any-return]
