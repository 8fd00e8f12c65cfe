"""What does a caller ask for and get back? Sampling parameters, requests, outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import StrEnum

from graphengine.errors import RequestError

# A prompt that is not a string is a mapping with exactly one of these.
PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
# float32 holds it, and logits divided by it are noise: a larger one could change nothing.
MAX_TEMPERATURE = 1e6
_BRIEF_CHARS = 60


class FinishReason(StrEnum):
    STOP = "stop"  # EOS, a stop token id or a stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ERROR = "error"  # the request was refused; RequestOutput.error says why


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Names, defaults and meanings are vLLM's, save where noted.

    temperature: 0 is greedy; at most MAX_TEMPERATURE. top_k: 0 or -1 keeps all. top_p in (0, 1],
    min_p in [0, 1].
    The order is temperature, top-k, top-p on what top-k left, min-p against the likeliest token.
    seed: None derives one from the engine's seed and the request's place in the input, so a
    rerun of the same input gives the same tokens.
    stop: strings; the text ends before the first of them. stop_token_ids: end the output, and are
    its last token, as EOS is. min_tokens: no stop of any kind before that many tokens.
    max_tokens: None runs to max_model_len.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Raises RequestError naming the parameter, its value and the accepted range."""
        stop: object = self.stop  # a caller may give one string, or a list
        object.__setattr__(
            self, "stop", _tuple_of("stop", (stop,) if isinstance(stop, str) else stop, str)
        )
        object.__setattr__(
            self, "stop_token_ids", _tuple_of("stop_token_ids", self.stop_token_ids, int)
        )
        _check_float("temperature", self.temperature, low=0.0, high=MAX_TEMPERATURE)
        _check_float("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        _check_float("min_p", self.min_p, low=0.0, high=1.0)
        _check_int("top_k", self.top_k, low=-1, high=2**31 - 1)
        _check_int("min_tokens", self.min_tokens, low=0, high=2**31 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, low=1, high=2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}; lower it"
                )
        if self.seed is not None:
            _check_int("seed", self.seed, low=0, high=2**63 - 1)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; give true or false")
        if any(text == "" for text in self.stop):
            raise RequestError("stop holds an empty string; take it out")
        for text in self.stop:
            check_text("stop", text)


def _tuple_of(name: str, value: object, kind: type) -> tuple[object, ...]:
    if value is None:
        return ()
    if not isinstance(value, SequenceOf) or isinstance(value, str):
        raise RequestError(f"{name} is {value!r}; give a list of {kind.__name__}")
    for item in value:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise RequestError(f"{name} holds {item!r}; give a list of {kind.__name__}")
    return tuple(value)


def _check_float(
    name: str, value: object, *, low: float, high: float, open_low: bool = False
) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        above = value > low if open_low else value >= low
        if above and value <= high and math.isfinite(value):
            return
    left = "(" if open_low else "["
    raise RequestError(f"{name} is {value!r}; give a number in {left}{low:g}, {high:g}]")


def _check_int(name: str, value: object, *, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; give a whole number in [{low}, {high}]")


def brief(value: object) -> str:
    """What an error shows of a wrong value: its repr, cut where it is long."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deep to show"
    return text if len(text) <= _BRIEF_CHARS else f"{text[:_BRIEF_CHARS]}..."


def check_text(name: str, text: str) -> None:
    """Raises RequestError for half a surrogate pair: JSON can spell one ("\\ud800"), and Python has
    bytes of the command line so that are not UTF-8, but it is no text, and no tokenizer takes it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        shown = f"\\u{code:04x}"
        if 0xDC80 <= code <= 0xDCFF:  # PEP 383; many emoji end with one of them too
            raise RequestError(
                f"{name} holds half of a surrogate pair ({shown}), on a command line the byte "
                f"0x{code - 0xDC00:02x} that is not UTF-8; give whole characters, in UTF-8"
            ) from error
        raise RequestError(
            f"{name} holds half of a surrogate pair ({shown}); take it out"
        ) from error


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt on its way in. `prompt` is a string, or a mapping with exactly one of `prompt`,
    `messages` (a chat) and `prompt_token_ids`. None as sampling_params takes the call's."""

    prompt: str | Mapping[str, object]
    sampling_params: SamplingParams | None = None
    request_id: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """The generated part. `token_ids` ends with the stop token where one ended it; `text` ends
    before the stop string or the stop token, whether that token is special or not."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None = None  # the stop id (not EOS) or stop string that matched


@dataclass(slots=True)
class RequestOutput:
    """What became of one request. `error` is "" unless finish_reason is "error"; `index` is the
    request's place in the input."""

    request_id: str
    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    error: str = ""
    finished: bool = True


@dataclass(slots=True, eq=False)
class Sequence:
    """One accepted request inside the engine. What changes every step lives in SequenceTable while
    it runs.

    seed: the effective one. stop_ids: EOS and stop token ids together, at most MAX_STOP_IDS.
    max_total: prompt and output tokens at which a length stop ends it.
    """

    index: int
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    max_total: int
    # Written when it finishes:
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
