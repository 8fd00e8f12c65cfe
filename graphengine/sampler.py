"""Which tensors does a step sample with? Per-row parameters, handed to the sampling kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graphengine.kernels import Kernels


@dataclass(frozen=True)
class SamplingTensors:
    """Sampling parameters of B rows, on the device of the logits; `kernels.reference.sample` says
    what each does. A row of zeros (top_p included) is a valid greedy row: padding may be zero."""

    temperature: Tensor  # float32 [B]
    top_k: Tensor  # int32 [B]
    top_p: Tensor  # float32 [B]
    min_p: Tensor  # float32 [B]
    seeds: Tensor  # int64 [B]
    stop_ids: Tensor  # int64 [B, M]
    suppress_stops: Tensor  # int32 [B]


def sample(
    kernels: Kernels,
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    *,
    out: Tensor,
    seq_indices: Tensor,
    last_token_ids: Tensor,
) -> None:
    """out = last_token_ids[seq_indices] = the token ids, int64 [B], of logits [B, V]. positions:
    int64 [B], those of the tokens that the logits came from. A row's token depends on its own
    logits, parameters and position only. For the rest see `kernels.reference.sample`."""
    kernels.sample(
        logits,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seeds=params.seeds,
        positions=positions,
        stop_ids=params.stop_ids,
        suppress_stops=params.suppress_stops,
        out=out,
        seq_indices=seq_indices,
        last_token_ids=last_token_ids,
    )
