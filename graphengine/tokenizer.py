"""How does text become tokens and back? The checkpoint's own tokenizer, and stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphengine.errors import ModelError, RequestError
from graphengine.request import check_text

_REPLACEMENT = "\ufffd"  # what an unfinished multi-byte character decodes to
# An output that is no text may never settle. Past so many tokens it is taken as it is, so that the
# window stays short; a character begun in the last of them is then lost.
_MOST_PENDING = 64


class Tokenizer:
    """A Hugging Face tokenizer. Chat templates run in transformers' sandbox; code that a checkpoint
    brings is never run."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError if `path` holds no tokenizer that loads without running its code."""
        from transformers import AutoTokenizer  # here and not above: it takes seconds

        try:
            self.hf: Any = AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # a dozen kinds, by file and version
            # A KeyError's text is the key alone.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelError(
                f"no usable tokenizer in {str(path)!r} ({reason}); add its files, or give another "
                "as tokenizer; `run` and LLM need none for token ids (skip_tokenizer_init)"
            ) from error

        # What transformers would call after a tenth of its time, unless it is to tidy the text.
        backend: Any = getattr(self.hf, "backend_tokenizer", None)
        is_plain = backend is not None and not self.hf.clean_up_tokenization_spaces
        self._decode: Any = backend.decode if is_plain else self.hf.decode

    @property
    def eos_token_id(self) -> int | None:
        token_id: int | None = self.hf.eos_token_id
        return token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens added as the tokenizer is configured to. Raises
        RequestError if `text` is not Unicode."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn. Raises RequestError without
        a chat template, or where the template refuses the messages."""
        if not self.hf.chat_template:
            raise RequestError(
                "the request has messages, but the model has no chat template; send a prompt"
            )
        try:
            text = self.hf.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template raises on hostile rows
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"the chat template refuses the messages: {reason}") from error
        # The template wrote the special tokens already.
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises RequestError for a str that is no text: tokenizers would raise TypeError."""
        check_text("the text", text)
        # verbose=False: the engine itself says when a prompt is too long.
        ids: list[int] = self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self._decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


class StopStrings:
    """Finds the first stop string in one sequence's output as it grows, token by token.

    Only a window of tokens is decoded each time. Text is taken up only once it is whole: an
    unfinished multi-byte character decodes to U+FFFD and waits for the token that ends it. The
    window starts one settled piece before the new tokens, since a token can decode differently at
    the start of a text (Llama 2 drops a leading space there). What a push costs does not grow with
    the output.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        min_tokens: int,
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop))
        self._min_tokens = min_tokens
        self._skip_special_tokens = skip_special_tokens
        self._num_tokens = 0
        self._window: list[int] = []  # the last settled piece's tokens, then those not settled
        self._num_settled = 0  # of the window
        self._pieces: list[str] = []  # settled text
        self._tail = ""  # the end of it, as much as a stop string can begin in
        self._searched = 0  # characters past the tail in which no match may end

    def push(self, token_id: int) -> tuple[str, str] | None:
        """Takes one more token. Once a stop string is complete: that string, and the text before
        it."""
        self._num_tokens += 1
        self._window.append(token_id)
        before = self._decode(self._window[: self._num_settled])
        fresh = self._decode(self._window)[len(before) :]
        num_pending = len(self._window) - self._num_settled
        is_whole = not fresh.endswith(_REPLACEMENT) or num_pending > _MOST_PENDING
        # A token can hold a stop string and the start of a character: only the latter waits.
        whole = fresh if is_whole else fresh.rstrip(_REPLACEMENT)
        text = self._tail + whole
        match = None
        if self._num_tokens > self._min_tokens:
            match = self._find(text, len(self._tail) + self._searched)
        self._searched = len(whole)
        if match is not None:
            stop, at = match
            return stop, ("".join(self._pieces) + whole)[: at - len(text)]
        if fresh and is_whole:
            self._pieces.append(fresh)
            self._tail = text[-self._longest :]
            self._window = self._window[self._num_settled :]
            self._num_settled = len(self._window)
            self._searched = 0
        return None

    def _find(self, text: str, searched: int) -> tuple[str, int] | None:
        """The stop string that begins first among those that end past `searched`, and where."""
        found = [
            (at, stop)
            for stop in self._stop
            if (at := text.find(stop, max(0, searched - len(stop) + 1))) >= 0
        ]
        if not found:
            return None
        at, stop = min(found)
        return stop, at

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
