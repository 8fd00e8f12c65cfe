"""Which objects of a file are requests? Checks of one entry, wherever it was read.

Each raises RequestError, which names no place: the reader knows the line or the row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

from graphengine.errors import RequestError
from graphengine.request import PROMPT_KEYS, brief, check_text

EXPECTED = 'expected {"prompt": ...}, {"messages": ...} or {"prompt_token_ids": ...}'


def prompt_of(entry: Mapping[str, object]) -> str | dict[str, object]:
    """What a Request takes as its prompt: the entry's `prompt`, or a mapping with its `messages` or
    `prompt_token_ids`. It must have exactly one of them."""
    given = [key for key in PROMPT_KEYS if key in entry]
    if len(given) != 1:
        found = f"both {given[0]} and {given[1]}" if given else "no prompt"
        raise RequestError(f"has {found}; {EXPECTED}")
    return checked_prompt(given[0], entry[given[0]])


def checked_prompt(kind: str, value: object) -> str | dict[str, object]:
    """kind: one of PROMPT_KEYS, which says what `value` has to be. Messages as `join_parts` gives
    them."""
    _CHECKS[kind](value)
    if kind == "messages":
        value = join_parts(cast("list[Mapping[str, object]]", value))
    return value if isinstance(value, str) else {kind: value}


def join_parts(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """The messages, with the text parts of a content joined: few chat templates know parts, and the
    others write the list as Python would, without a word. Raises RequestError for other parts."""
    return [_with_text(message) for message in messages]


def _with_text(message: Mapping[str, object]) -> Mapping[str, object]:
    content = message.get("content")
    if isinstance(content, str) or not isinstance(content, Sequence):
        return message
    texts: list[str] = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise RequestError(f"a message's content holds {brief(part)}; give text parts alone")
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}


def id_of(entry: Mapping[str, object], key: str = "id") -> str | None:
    """The entry's id as text; None if it has none."""
    if key not in entry:
        return None
    value = entry[key]
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise RequestError(f"{key} is {brief(value)}; give a string or a whole number")
    text = str(value)
    check_text(key, text)
    return text


def _check_prompt(value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(f"prompt is {brief(value)}; give a string")
    if not value:
        raise RequestError("prompt is empty; give it at least one character")
    check_text("prompt", value)


def _check_messages(value: object) -> None:
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"messages is {brief(value)}; give a list of objects with role and content"
        )
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"messages holds {brief(message)}; give objects with role and content"
            )
        # A message that only calls tools has no content; templates know that.
        is_call = message.get("content") is None and "tool_calls" in message
        if not is_call and not isinstance(message.get("content"), str | list):
            raise RequestError(
                f"the content of a {message['role']!r} message is "
                f"{brief(message.get('content'))}; give a string"
            )
    check_text("messages", json.dumps(value, ensure_ascii=False))


def _check_token_ids(value: object) -> None:
    if not isinstance(value, list) or not value:
        raise RequestError(f"prompt_token_ids is {brief(value)}; give a list of whole numbers")
    for token_id in value:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise RequestError(
                f"prompt_token_ids holds {brief(token_id)}; give whole numbers from 0 up"
            )


_CHECKS = {
    "prompt": _check_prompt,
    "messages": _check_messages,
    "prompt_token_ids": _check_token_ids,
}
