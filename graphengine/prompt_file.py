"""How does a prompt file become requests? Text or JSONL, one request a line, streamed.

A file is JSONL if its name ends in .jsonl, .ndjson or .json, text if it ends in .txt, and otherwise
JSONL if its first character that is not white space is "{".

Text: a line is a prompt; an empty line is an error, since a line of output belongs to each line of
input. JSONL: a line is an object with exactly one of `prompt` (a string), `messages` (a chat) and
`prompt_token_ids`, and maybe an `id`; empty lines are skipped, other keys ignored, except for the
names of sampling parameters, which would otherwise seem to have an effect.
Only "\\n" ends a line; a "\\r" before it and a byte order mark at the start are dropped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from graphengine.entry import EXPECTED, id_of, prompt_of
from graphengine.errors import InputError, RequestError
from graphengine.request import Request, SamplingParams, brief, check_text

STDIN = "-"
STDIN_FILENO = 0
_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TEXT_SUFFIXES = (".txt",)
_SAMPLING_KEYS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_BOM = b"\xef\xbb\xbf"


def read_requests(path: str | Path) -> Iterator[Request]:
    """The requests of a prompt file ("-" is standard input), one line in memory at a time.

    Raises InputError naming the file and the line when it comes to a line it cannot use."""
    is_stdin = str(path) == STDIN
    name = "<stdin>" if is_stdin else str(path)
    try:
        # Not sys.stdin: its lock, held by a thread that waits for a line, would abort the exit.
        with open(STDIN_FILENO if is_stdin else path, "rb", closefd=not is_stdin) as file:
            yield from _requests(file, name)
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}; give a file of prompts") from error


def count_requests(path: str | Path) -> int | None:
    """How many requests a regular file holds, after a look at every line, so that a broken one is
    found before a model is loaded. None for standard input and pipes, which can be read only once.

    Raises InputError as `read_requests` does."""
    if str(path) == STDIN:
        return None
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            return None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file of prompts") from error
    return sum(1 for _ in read_requests(path))


def check_prompts(prompts: Iterable[str]) -> UntilBroken:
    """Requests from prompts given one by one. Raises InputError naming one that is empty or no
    text."""
    requests = []
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise InputError(f"prompt {number} is empty; give it at least one character")
        try:
            check_text(f"prompt {number}", prompt)
        except RequestError as error:
            raise InputError(str(error)) from error
        requests.append(Request(prompt))
    return CountedUntilBroken(requests, len(requests))


class UntilBroken:
    """Passes requests on, and ends before one that cannot be read instead of raising, so that what
    was read before it is still finished; `error` then says what was wrong, else it is None.

    num_requests: None if unknown, as it is of standard input."""

    num_requests: int | None = None

    def __init__(self, requests: Iterable[Request]) -> None:
        self.error: InputError | None = None
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        try:
            yield from self._requests
        except InputError as error:
            self.error = error


class CountedUntilBroken(UntilBroken):
    """Its length tells the engine that no request is far off, so that a rerun batches alike."""

    def __init__(self, requests: Iterable[Request], num_requests: int) -> None:
        super().__init__(requests)
        self.num_requests = num_requests

    def __len__(self) -> int:
        assert self.num_requests is not None
        return self.num_requests


def open_prompts(path: str | Path) -> UntilBroken:
    """The requests of a prompt file. Raises InputError as `count_requests` does."""
    num_requests = count_requests(path)
    requests = read_requests(path)
    if num_requests is None:
        return UntilBroken(requests)
    return CountedUntilBroken(requests, num_requests)


def _requests(file: BinaryIO, name: str) -> Iterator[Request]:
    is_jsonl = _format_by_name(name)
    num_requests = 0
    for number, line in enumerate(file, start=1):
        where = f"{name}:{number}"
        text = _decode(line.removeprefix(_BOM) if number == 1 else line, where)
        is_blank = not text.strip()
        if is_jsonl is None and not is_blank:
            is_jsonl = text.lstrip().startswith("{")
        if not is_blank:
            yield _parse_json(text, where) if is_jsonl else Request(text)
            num_requests += 1
        elif is_jsonl is False:
            raise InputError(f"{where}: empty line; a prompt was expected, take the line out")
    if num_requests == 0:
        raise InputError(f"{name}: holds no prompt; give one a line")


def _format_by_name(name: str) -> bool | None:
    """Whether a file of that name is JSONL; None if the name does not tell."""
    suffix = Path(name).suffix.lower()
    if suffix in _JSONL_SUFFIXES:
        return True
    return False if suffix in _TEXT_SUFFIXES else None


def _decode(line: bytes, where: str) -> str:
    """The text of a line, without its end."""
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line:
        raise InputError(f"{where}: holds NUL bytes or UTF-16; convert the file to UTF-8 text")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8 text"
        ) from error


def _parse_json(text: str, where: str) -> Request:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: broken JSON: {error.msg} at column {error.colno}; {EXPECTED} on one line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number or a nesting past Python's limits
        raise InputError(f"{where}: broken JSON: {error}; {EXPECTED} on one line") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {brief(entry)} is not a JSON object; {EXPECTED}")
    try:
        prompt = prompt_of(entry)
        for key in entry:
            if key in _SAMPLING_KEYS:
                raise RequestError(
                    f"{key!r} cannot be set for one line; give it as an option for all"
                )
        return Request(prompt, request_id=id_of(entry))
    except RequestError as error:
        raise InputError(f"{where}: {error}") from error
