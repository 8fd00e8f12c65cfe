"""How does a prefill run by FlashAttention 4, on Hopper? Where its queries are many, by its kernels
(see `flash4_kernels`); short chunks and single queries stay with `flash`.

What a kernel is compiled for does not change from step to step, so `ModelRunner.run_largest_steps`,
and the rehearsal before it, want all there will be.

Letters: N tokens, S sequences, T keys, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from graphengine.attention.base import DecodeMetadata, PlannedDecode, PrefillMetadata
from graphengine.attention.flash import FlashAttention
from graphengine.attention.flash4_kernels import Kind, Launch, installed, kept
from graphengine.errors import BackendError
from graphengine.kernels import ahead
from graphengine.kernels.linked import LinkError

_log = logging.getLogger(__name__)
# Of Hopper: other generations have other kernels, not measured here.
_MAJOR_CAPABILITY = 9
_HEAD_DIMS = (64, 128)
# Tokens of a chunk, in the mean of a prefill's, from which on flash-attn 4 is ahead. On an H200, of
# 8,192 tokens in all, heads 32/8/128, 16/8/128, 32/8/64 and 40/8/128, flash-attn 2 and 4 took us:
# chunks of 128 101/110, 60/64, 68/82, 118/140; of 256 140/111, 80/64, 94/89, 173/142; of 512
# 199/132, 115/74, 142/96, 240/172 (perf/results/2026-11-28-h200-5-flash4-lengths.json).
MIN_MEAN_LENGTH = 256
# interface.py: above BIN_BATCH_SEARCH_THRESH sequences another kernel is compiled. A prefill of so
# many has short ones.
_MAX_SEQUENCES = 256
_TOKENS_TO_TRY = 8


class FlashAttention4:
    """AttentionBackend on flash-attn 4 and 2: Hopper, bfloat16 or float16, head dim 64 or 128.

    The two round differently, and which one a chunk runs by depends on what is prefilled with it:
    4 where the mean length of the chunks is min_mean_length or more, 2 below.

    Keys of earlier chunks are copied out of the cache, 2 * T * K * D elements while a layer runs:
    the paged kernel needs pages of 128 tokens and reads slots that were never written."""

    name = "flash4"
    default_block_size = FlashAttention.default_block_size
    reads_key_slots = True

    def __init__(
        self,
        device: torch.device,
        *,
        or_flash: bool = False,
        instead: str = 'choose attention "flash"',
    ) -> None:
        """or_flash: where a kernel turns out not to be had, a warning says why and all is as with
        "flash", the name too; else a BackendError does. instead: what to do, if not install it.

        Raises BackendError off Hopper, where the packages are not installed that this is written
        for, or flash-attn 2 cannot be imported. Nothing of flash-attn 4 is imported."""
        self.min_mean_length = MIN_MEAN_LENGTH
        self._instead = instead
        self._device = device
        self._capability = torch.cuda.get_device_capability(device)
        major, minor = self._capability
        if major != _MAJOR_CAPABILITY:
            raise BackendError(
                f'attention "flash4" needs compute capability {_MAJOR_CAPABILITY}.x, this GPU has '
                f"{major}.{minor}; {instead}"
            )
        try:
            installed()
        except BackendError as error:
            raise BackendError(
                f'attention "flash4": {error}; install it after flash-attn, whose folder it '
                f'shares, in the clone, with: pip install -e ".[flash4]", or {instead}'
            ) from error
        self._flash = FlashAttention()
        self._or_flash = or_flash
        self._begun: dict[Kind, Future[Launch]] = {}
        self._ready: dict[Kind, Launch] = {}

    @staticmethod
    def takes(device: torch.device, *, head_dim: int | None, dtype: torch.dtype | None) -> bool:
        """Whether "auto" is this for such a model here, by what is installed beside flash-attn 2.
        None is not known, and not taken; nor is float16, whose values a prompt may drive to
        infinity, which would spoil its neighbours (see `prefill`)."""
        if device.type != "cuda" or head_dim not in _HEAD_DIMS or dtype != torch.bfloat16:
            return False
        if torch.cuda.get_device_capability(device)[0] != _MAJOR_CAPABILITY:
            return False
        try:
            installed()
        except BackendError:
            return False
        return True

    def check(
        self, *, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises as FlashAttention does, which decodes, and BackendError for other head dims."""
        self._flash.check(block_size=block_size, head_dim=head_dim, dtype=dtype, device=device)
        if head_dim not in _HEAD_DIMS:
            raise BackendError(
                f'the model\'s head_dim is {head_dim}; attention "flash4" needs '
                f"{' or '.join(map(str, _HEAD_DIMS))}, {self._instead}"
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
        the kernel multiplies them by zero. In a rehearsal, see `ahead`, it is not launched, but
        will be compiled; elsewhere the first of its kind blocks until it is."""
        num_sequences = metadata.cu_seqlens_q.shape[0] - 1
        is_short = q.shape[0] < self.min_mean_length * num_sequences
        # Mostly flash-attn 2 splits the keys of a single query. This one does not.
        is_single = metadata.max_seqlen_q == 1
        launch = None
        if not (is_short or is_single or num_sequences > _MAX_SEQUENCES):
            _, num_heads, head_dim = q.shape
            group = num_heads // k_cache.shape[2]
            kind = Kind(q.dtype, head_dim, group, window is not None, self._capability)
            if ahead.is_rehearsal():
                self._rehearse(kind)
                return torch.empty(q.shape, dtype=q.dtype, device=q.device)
            launch = self._launch(kind)
        if launch is None:
            return self._flash.prefill(q, k, v, k_cache, v_cache, metadata, window=window)
        if metadata.has_context:
            assert metadata.key_slots is not None
            k = k_cache.flatten(0, 1).index_select(0, metadata.key_slots)  # [T, K, D]
            v = v_cache.flatten(0, 1).index_select(0, metadata.key_slots)
        return launch(
            q,
            k,
            v,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=metadata.cu_seqlens_k,
            window=window,
        )

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

    def _rehearse(self, kind: Kind) -> None:
        if kind not in self._begun:
            self._begin(kind)
            ahead.want(functools.partial(self._launch, kind))

    def _begin(self, kind: Kind) -> Future[Launch]:
        begun = self._begun.get(kind)
        if begun is None:
            begun = self._begun[kind] = _in_thread(kept, kind)
        return begun

    def _launch(self, kind: Kind) -> Launch | None:
        """What launches it; None where flash-attn 2 has taken over. Blocks until it is ready."""
        if self.name == FlashAttention.name:
            return None
        launch = self._ready.get(kind)
        if launch is not None:
            return launch
        try:
            launch = self._kept(kind)
            _try(launch, kind, self._device)
        except BackendError as error:
            if not self._or_flash:
                raise BackendError(f'attention "flash4": {error}; {self._instead}') from error
            _log.warning(
                'attention "flash4" cannot be had (%s), it is "flash" here; to choose that ends '
                "this warning",
                error,
            )
            self.name = FlashAttention.name
            self.reads_key_slots = False
            return None
        self._ready[kind] = launch
        return launch

    def _kept(self, kind: Kind) -> Launch:
        try:
            return self._begin(kind).result()
        except LinkError as error:
            raise BackendError(f"its kernels cannot be kept: {error}") from error


def _in_thread(make: Callable[[Kind], Launch], kind: Kind) -> Future[Launch]:
    """Of a thread that nobody waits for when the process ends: a compiler takes its time."""
    made: Future[Launch] = Future()

    def run() -> None:
        try:
            made.set_result(make(kind))
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, name="flash4-compile", daemon=True).start()
    return made


def _try(launch: Launch, kind: Kind, device: torch.device) -> None:
    """Launches it once, which loads it to the GPU. Raises BackendError where a driver, say, is too
    old for it."""
    try:
        q, k = (
            torch.zeros(_TOKENS_TO_TRY, num_heads, kind.head_dim, dtype=kind.dtype, device=device)
            for num_heads in (kind.group, 1)
        )
        borders = torch.tensor([0, _TOKENS_TO_TRY], dtype=torch.int32, device=device)
        window = 1 if kind.has_window else None
        launch(q, k, k, cu_seqlens_q=borders, cu_seqlens_k=borders, window=window)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of tvm_ffi: any kind
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 200 else f"{reason[:100]} ... {reason[-100:]}"
        raise BackendError(f"a kernel of flash-attn 4 cannot be launched ({reason})") from error
