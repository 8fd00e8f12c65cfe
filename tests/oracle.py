"""What should a request give? One request at a time, one token at a time, with none of our code.

transformers' model on the whole prefix for each token: no cache, no batch, no block. Sampling and
stops are written out here from the documented meaning, in float64 and plain loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from checkpoints import reference_model

from graphengine.request import FinishReason, RequestOutput, SamplingParams

Logits = npt.NDArray[np.float64]
REPLACEMENT = "\ufffd"
_U32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Answer:
    """What a RequestOutput must say."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None

    @classmethod
    def of(cls, output: RequestOutput) -> Answer:
        assert output.error == ""
        assert output.finished
        (completion,) = output.outputs
        return cls(
            completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason
        )


class Oracle:
    def __init__(
        self,
        path: Path,
        *,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        tokenizer: Any = None,
    ) -> None:
        """tokenizer: a transformers tokenizer; without one every text is empty."""
        self._model = reference_model(path)
        self._eos_token_ids = tuple(eos_token_ids)
        self._max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, ...], Logits] = {}

    def logits(self, token_ids: Sequence[int]) -> Logits:
        """float64 [V]: of the token after `token_ids`."""
        key = tuple(token_ids)
        if key not in self._known:
            with torch.inference_mode():
                logits = self._model(torch.tensor([key])).logits[0, -1]
            self._known[key] = logits.double().numpy()
        return self._known[key]

    def answer(self, prompt: Sequence[int], params: SamplingParams, *, seed: int = 0) -> Answer:
        """seed: used where the parameters bring none."""
        seed = seed if params.seed is None else params.seed
        eos = () if params.ignore_eos else self._eos_token_ids
        stop_ids = {*eos, *params.stop_token_ids}
        out: list[int] = []
        closed = 0  # characters that min_tokens protects: no stop string may end there
        while True:
            logits = self.logits([*prompt, *out]).copy()
            if len(out) < params.min_tokens:
                logits[list(stop_ids)] = -math.inf
            # The noise belongs to the position of the token that the logits come from.
            token_id = pick(logits, params, seed, position=len(prompt) + len(out) - 1)
            out.append(token_id)
            if token_id in stop_ids:
                reason = token_id if token_id in params.stop_token_ids else None
                return Answer(out, self._text(out[:-1], params), FinishReason.STOP, reason)
            if len(out) <= params.min_tokens:
                closed = len(self._settled_text(out, params))
            else:
                found = first_stop(self._settled_text(out, params), params.stop, after=closed)
                if found is not None:
                    at, stop = found
                    return Answer(out, self._text(out, params)[:at], FinishReason.STOP, stop)
            if len(out) == params.max_tokens or len(prompt) + len(out) == self._max_model_len:
                return Answer(out, self._text(out, params), FinishReason.LENGTH, None)

    def _text(self, token_ids: list[int], params: SamplingParams) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=params.skip_special_tokens
        )
        return text

    def _settled_text(self, token_ids: list[int], params: SamplingParams) -> str:
        """Without an unfinished character at the end, which the next token may complete."""
        return self._text(token_ids, params).rstrip(REPLACEMENT)


def first_stop(text: str, stops: Sequence[str], *, after: int) -> tuple[int, str] | None:
    """The stop string that starts first among those that end behind character `after`."""
    found = [
        (at, stop)
        for stop in stops
        for at in range(len(text))
        if text.startswith(stop, at) and at + len(stop) > after
    ]
    return min(found, default=None)


def pick(logits: Logits, params: SamplingParams, seed: int, *, position: int) -> int:
    """Greedy, or top-k, top-p, min-p and a Gumbel-max draw, one token at a time."""
    if params.temperature == 0.0:
        return int(np.argmax(logits))
    scaled = logits / params.temperature
    by_value = sorted(range(len(scaled)), key=lambda token_id: -scaled[token_id])
    kept = set(by_value)
    if 0 < params.top_k < len(scaled):
        smallest = scaled[by_value[params.top_k - 1]]
        kept = {token_id for token_id in kept if scaled[token_id] >= smallest}
    weights = {token_id: math.exp(scaled[token_id] - max(scaled)) for token_id in kept}
    if params.top_p < 1.0:
        total = sum(weights.values())
        mass = 0.0
        smallest = -math.inf
        for token_id in by_value:
            mass += weights.get(token_id, 0.0) / total
            if mass >= params.top_p:
                smallest = scaled[token_id]
                break
        kept = {token_id for token_id in kept if scaled[token_id] >= smallest}
    kept = {token_id for token_id in kept if weights[token_id] >= params.min_p}
    noisy = {t: scaled[t] + gumbel(seed, position, t) for t in sorted(kept)}
    return max(noisy, key=lambda token_id: noisy[token_id])


def gumbel(seed: int, position: int, token_id: int) -> float:
    word = philox_word((token_id, position & _U32, position >> 32, 0), (seed & _U32, seed >> 32))
    uniform = min((word + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    return -math.log(-math.log1p(-uniform))


def philox_word(counter: tuple[int, int, int, int], key: tuple[int, int]) -> int:
    """First word of Philox4x32-10 (Salmon et al., SC 2011), with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & _U32, (left >> 32) ^ c3 ^ k1, left & _U32
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return c0
