"""How does a caller's request become a sequence? Checks and tokenization, ahead of the loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import cast

from graphengine.config import MAX_STOP_IDS
from graphengine.entry import join_parts
from graphengine.errors import RequestError
from graphengine.request import (
    PROMPT_KEYS,
    CompletionOutput,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    Sequence,
    brief,
)
from graphengine.tokenizer import Tokenizer

Prompt = str | Mapping[str, object]


class Intake:
    """Turns requests into sequences. Host only and free of shared state, so that it can run in a
    thread beside the loop."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        eos_token_ids: SequenceOf[int],
        vocab_size: int,
        max_model_len: int,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._seed = seed

    def sequences(
        self, requests: Iterable[Prompt | Request], default: SamplingParams
    ) -> Iterator[Sequence | RequestOutput]:
        """One item for each request, in order; a refused one gives a finished RequestOutput."""
        for index, item in enumerate(requests):
            request = item if isinstance(item, Request) else Request(item)
            request_id = str(index) if request.request_id is None else request.request_id
            params = request.sampling_params or default
            try:
                if not isinstance(params, SamplingParams):
                    raise RequestError(
                        f"sampling_params is {brief(params)}; give SamplingParams or None"
                    )
                yield self._sequence(index, request_id, request.prompt, params)
            except RequestError as error:
                prompt = request.prompt if isinstance(request.prompt, str) else None
                yield refused(index, request_id, prompt, str(error))

    def _sequence(
        self, index: int, request_id: str, prompt: object, params: SamplingParams
    ) -> Sequence:
        text, token_ids = self._encode(prompt)
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token")
        # The device samples one token at least, so a prompt must leave room for it.
        if len(token_ids) >= self._max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, max_model_len is {self._max_model_len} "
                "with at least one of output; raise it or shorten the prompt"
            )
        eos = () if params.ignore_eos else self._eos_token_ids
        stop_ids = tuple(dict.fromkeys((*eos, *params.stop_token_ids)))
        self._check_ids("stop_token_ids", stop_ids)
        if len(stop_ids) > MAX_STOP_IDS:
            raise RequestError(
                f"{len(stop_ids)} stop token ids, EOS included; give at most {MAX_STOP_IDS}"
            )
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")
        max_tokens = self._max_model_len if params.max_tokens is None else params.max_tokens
        return Sequence(
            index=index,
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            seed=derived_seed(self._seed, index) if params.seed is None else params.seed,
            stop_ids=stop_ids,
            max_total=min(self._max_model_len, len(token_ids) + max_tokens),
        )

    def _encode(self, prompt: object) -> tuple[str | None, list[int]]:
        """The prompt's text, if it came as text, and its token ids."""
        kind: object
        value: object
        if isinstance(prompt, str):
            kind, value = "prompt", prompt
        elif isinstance(prompt, Mapping) and len(prompt) == 1 and next(iter(prompt)) in PROMPT_KEYS:
            ((kind, value),) = prompt.items()
        else:
            raise RequestError(
                f"a prompt is a string or a mapping with one of {', '.join(PROMPT_KEYS)}; got "
                f"{brief(prompt)}"
            )
        if kind == "prompt_token_ids":
            if not isinstance(value, SequenceOf) or isinstance(value, str):
                raise RequestError(f"prompt_token_ids is {brief(value)}; give a list of int")
            self._check_ids(kind, value)
            return None, list(value)
        if self._tokenizer is None:
            raise RequestError(f"a {kind} needs a tokenizer; send prompt_token_ids")
        if kind == "messages":
            if not (isinstance(value, SequenceOf) and all(isinstance(m, Mapping) for m in value)):
                raise RequestError(f"messages is {brief(value)}; give a list of objects")
            token_ids = self._tokenizer.encode_chat(join_parts(value))
            self._check_ids("the tokenizer's output", token_ids)
            return None, token_ids
        if not isinstance(value, str):
            raise RequestError(f"prompt is {brief(value)}; give a string")
        if not value:
            raise RequestError("the prompt is empty; give at least one token")
        token_ids = self._tokenizer.encode(value)
        self._check_ids("the tokenizer's output", token_ids)
        return value, token_ids

    def _check_ids(self, name: str, token_ids: SequenceOf[object]) -> None:
        # Most prompts are a list of int in range, which takes no Python for each token; the thread
        # beside this one launches steps meanwhile.
        if set(map(type, token_ids)) == {int}:
            known = cast("SequenceOf[int]", token_ids)
            if min(known) >= 0 and max(known) < self._vocab_size:
                return
        for token_id in token_ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise RequestError(f"{name} holds {brief(token_id)}; give a list of int")
            if not 0 <= token_id < self._vocab_size:
                raise RequestError(
                    f"{name} holds {token_id}; the vocabulary is 0..{self._vocab_size - 1}"
                )


def refused(index: int, request_id: str, prompt: str | None, error: str) -> RequestOutput:
    completion = CompletionOutput(0, "", [], FinishReason.ERROR)
    return RequestOutput(request_id, index, prompt, [], [completion], error=error)


def derived_seed(seed: int, index: int) -> int:
    """A seed in [0, 2**63) for request `index`: the splitmix64 finalizer (Steele, Lea and Flood,
    OOPSLA 2014), so that neighbours are unrelated."""
    mask = 2**64 - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


class Feeder:
    """Reads an iterator ahead in a thread, `depth` items at most, so that tokenization costs the
    loop nothing and memory stays bounded. An exception of the iterator is raised by `get`."""

    def __init__(self, items: Iterator[Sequence | RequestOutput], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[Sequence | RequestOutput | _End] = queue.Queue(depth)
        self._stop = threading.Event()
        self.exhausted = False
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)
        self._thread.start()

    def get(self, timeout_s: float | None = 0.0) -> Sequence | RequestOutput | None:
        """The next item; None if there is none within `timeout_s` (None: wait for one) or at the
        end, which sets `exhausted`."""
        if self.exhausted:
            return None
        try:
            item = self._queue.get(timeout_s != 0.0, timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, _End):
            self.exhausted = True
            if item.error is not None:
                raise item.error
            return None
        return item

    def close(self) -> None:
        """Stops the thread; it ends at once unless the caller's own iterator blocks."""
        self._stop.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        end = _End(None)
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:  # handed to the caller's thread, not lost in this one
            end = _End(error)
        self._put(end)

    def _put(self, item: Sequence | RequestOutput | _End) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error
