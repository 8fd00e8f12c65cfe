"""How does text become tokens and back? The checkpoint's own tokenizer, and stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphengine.errors import ModelError, RequestError

_REPLACEMENT = "\ufffd"  # what an unfinished multi-byte character decodes to


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
            reason = " ".join(str(error).split())
            raise ModelError(
                f"no usable tokenizer in {str(path)!r} ({reason}); add its files, give tokenizer="
                " another directory, or set skip_tokenizer_init and send prompt_token_ids"
            ) from error

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
            reason = " ".join(str(error).split())
            raise RequestError(f"the chat template refuses the messages: {reason}") from error
        # The template wrote the special tokens already.
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises RequestError for a str that is no text: tokenizers would raise TypeError."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds half of a surrogate pair (\\u{ord(text[error.start]):04x}); "
                "take it out"
            ) from error
        # verbose=False: the engine itself says when a prompt is too long.
        ids: list[int] = self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self.hf.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


class StopStrings:
    """Finds the first stop string in one sequence's output as it grows, token by token.

    Only a window of tokens is decoded each time. Text is taken up only once it is whole: an
    unfinished multi-byte character decodes to U+FFFD and waits for the token that ends it. The
    window starts one settled piece before the new tokens, since a token can decode differently at
    the start of a text (Llama 2 drops a leading space there).
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
        self._min_tokens = min_tokens
        self._skip_special_tokens = skip_special_tokens
        self._token_ids: list[int] = []
        self._window = 0  # first token that is decoded
        self._settled = 0  # tokens whose text is in _text
        self._text = ""
        self._searched = 0  # characters in which no match may end: searched, or of min_tokens

    def push(self, token_id: int) -> tuple[str, str] | None:
        """Takes one more token. Once a stop string is complete: that string, and the text before
        it."""
        self._token_ids.append(token_id)
        before = self._decode(self._token_ids[self._window : self._settled])
        fresh = self._decode(self._token_ids[self._window :])[len(before) :]
        # A token can hold a stop string and the start of a character: only the latter waits.
        text = self._text + fresh.rstrip(_REPLACEMENT)
        if fresh and not fresh.endswith(_REPLACEMENT):
            self._text = text
            self._window, self._settled = self._settled, len(self._token_ids)
        searched, self._searched = self._searched, len(text)
        if len(self._token_ids) <= self._min_tokens:
            return None
        found = [
            (at, stop)
            for stop in self._stop
            if (at := text.find(stop, max(0, searched - len(stop) + 1))) >= 0
        ]
        if not found:
            return None
        at, stop = min(found)
        return stop, text[:at]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
