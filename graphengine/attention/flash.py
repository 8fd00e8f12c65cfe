"""How does attention run on CUDA? FlashAttention 2, or our own kernels where decoding gains by it.

On Hopper, in bfloat16, with heads of 64 or 128: without a window `kernels.decode_attention` runs
steps of up to 64 rows, in which all blocks have equal shares of the contexts, and it begins before
the kernel ahead has ended. Steps of more rows are `kernels.row_attention`'s.

Elsewhere: flash-attn gives each program 64 query rows; a decode step has H / K of them for a kv
head. From 65 rows on `kernels.paged_decode` is ahead, and by most where contexts differ in length.
With two query heads each so it is for so few rows that flash-attn splits the context, which it does
by the table's width, not by the context's length. Figures, of Hopper without windows alone:
perf/LOG.md.

Letters: N tokens, B decode rows, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphengine.attention.base import DecodeMetadata, PrefillMetadata
from graphengine.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from graphengine.kernels.decode_attention import DecodeAttention

_BLOCK_MULTIPLE = 256  # flash_api.cpp: "Paged KV cache block size must be divisible by 256"
_MAX_HEAD_DIM = 256
_MIN_CAPABILITY = (8, 0)
# row_attention or paged_decode takes over from so many rows on, with one program for a row and kv
# head; and paged_decode, with more splits, of few query heads a kv head, where there would be fewer
# programs than 0.8 of an H100's or H200's multiprocessors. (With four query heads each it lost 0.7
# ms of an 8B step of single kernels.)
_MANY_ROWS = 65
_FEW_PROGRAMS = 105
_FEW_HEADS = 2
_SPLIT_PROGRAMS = 256
_MAX_SPLITS = 16
# tl.dot takes no shorter heads; longer ones were not measured, and need more shared memory than
# some GPUs have.
_HEAD_DIMS = (16, 32, 64, 128)


class FlashAttention:
    """AttentionBackend on flash-attn 2: Ampere and later, bfloat16 or float16."""

    name = "flash"
    default_block_size = _BLOCK_MULTIPLE
    reads_key_slots = False

    def __init__(self) -> None:
        """Raises BackendError if flash-attn cannot be imported."""
        try:
            flash_attn = importlib.import_module("flash_attn.flash_attn_interface")
        except ImportError as error:
            raise BackendError(
                f'attention "flash" needs flash-attn, which cannot be imported ({error}); install '
                'it, in the clone, with: pip install --no-build-isolation -e ".[cuda]", or choose '
                'attention "reference" (slow)'
            ) from error
        # flash_attn_varlen_func is a torch custom operator, whose first call imports torch._dynamo:
        # seconds of every start. This is the function that it wraps.
        varlen = flash_attn._flash_attn_varlen_forward
        self._varlen = getattr(varlen, "_init_fn", varlen)
        self._with_kvcache = flash_attn.flash_attn_with_kvcache
        self._arrivals: Tensor | None = None

    def check(
        self, *, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises ConfigError (block size, dtype) or BackendError (device, head dim)."""
        if device.type != "cuda":
            raise BackendError(
                f'attention "flash" runs on CUDA, the device is {device.type}; '
                'choose attention "reference" or device "cuda"'
            )
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            raise BackendError(
                f'attention "flash" needs compute capability 8.0, this GPU has '
                f'{capability[0]}.{capability[1]}; choose attention "reference"'
            )
        self.check_shapes(block_size=block_size, head_dim=head_dim, dtype=dtype)

    @staticmethod
    def check_shapes(*, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        """The part of `check` that needs no GPU."""
        if block_size % _BLOCK_MULTIPLE:
            raise ConfigError(
                f'block_size is {block_size}; attention "flash" needs a multiple of '
                f"{_BLOCK_MULTIPLE}"
            )
        if dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f'dtype is {str(dtype).removeprefix("torch.")}; attention "flash" needs bfloat16 '
                'or float16, choose one of them or attention "reference"'
            )
        if head_dim > _MAX_HEAD_DIM or head_dim % 8:
            raise BackendError(
                f'the model\'s head_dim is {head_dim}; attention "flash" needs a multiple of 8 of '
                f'at most {_MAX_HEAD_DIM}, choose attention "reference"'
            )

    def planned_decode(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> DecodeAttention | None:
        """See AttentionBackend. On Hopper: `kernels.decode_attention`, compiled at the first
        start."""
        if device.type != "cuda":
            return None
        # Imported here: a CPU machine need not have cuda-bindings.
        from graphengine.kernels.decode_attention import DecodeAttention

        if not DecodeAttention.takes(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            device=device,
        ):
            return None
        return DecodeAttention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            device=device,
        )

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
        """See AttentionBackend. Without context the step's own k and v are read, not the cache."""
        paged = metadata.has_context
        left, right = _window_size(window)
        out: Tensor = self._varlen(
            q,
            k_cache if paged else k,
            v_cache if paged else v,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=metadata.cu_seqlens_k,
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=metadata.max_seqlen_k,
            dropout_p=0.0,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=True,
            window_size_left=left,
            window_size_right=right,
            block_table=metadata.block_tables if paged else None,
        )[0]
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
        """See AttentionBackend. The number of splits follows from B and the table's width, which
        are fixed in a captured graph."""
        num_rows, num_heads, head_dim = q.shape
        num_splits = decode_splits(
            num_rows, num_heads=num_heads, num_kv_heads=k_cache.shape[2], head_dim=head_dim
        )
        if num_splits is not None:
            return self._own_decode(q, k_cache, v_cache, metadata, window, num_splits)
        out: Tensor = self._with_kvcache(
            q[:, None],
            k_cache,
            v_cache,
            cache_seqlens=metadata.context_lens,
            block_table=metadata.block_tables,
            causal=True,
            window_size=_window_size(window),
        )
        return out[:, 0]

    def _own_decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: DecodeMetadata,
        window: int | None,
        num_splits: int,
    ) -> Tensor:
        # Imported here: a CPU machine has no Triton, and need not have cuda-bindings.
        from graphengine.kernels import row_attention
        from graphengine.kernels.paged_decode import paged_decode

        if num_splits == 1 and row_attention.takes(q, k_cache):
            return row_attention.row_attention(
                q,
                k_cache,
                v_cache,
                metadata.block_tables,
                metadata.context_lens,
                window=window,
            )
        if self._arrivals is None:
            self._arrivals = torch.zeros(_FEW_PROGRAMS, dtype=torch.int32, device=q.device)
        return paged_decode(
            q,
            k_cache,
            v_cache,
            metadata.block_tables,
            metadata.context_lens,
            self._arrivals,
            window=window,
            num_splits=num_splits,
        )


def decode_splits(num_rows: int, *, num_heads: int, num_kv_heads: int, head_dim: int) -> int | None:
    """Splits of a decode step by kernels of ours; None where flash-attn is to run it."""
    if head_dim not in _HEAD_DIMS:
        return None
    if num_rows >= _MANY_ROWS:
        return 1
    num_programs = num_rows * num_kv_heads
    if num_programs > _FEW_PROGRAMS or num_heads // num_kv_heads > _FEW_HEADS:
        return None
    return min(_MAX_SPLITS, _SPLIT_PROGRAMS // num_programs)


def _window_size(window: int | None) -> tuple[int, int]:
    """flash-attn counts the tokens beside the query itself; -1 is no limit."""
    return (-1, -1) if window is None else (window - 1, 0)
