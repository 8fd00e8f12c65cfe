"""How are finished requests written? In input order: a line of JSON each, or the text."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO

from rich.console import Console
from rich.text import Text

from graphengine.errors import ConfigError
from graphengine.prompt_file import STDIN_FILENO
from graphengine.request import FinishReason, RequestOutput

STDOUT = "-"
STDOUT_FILENO = 1
STDOUT_NAME = "standard output"
MAX_ERRORS_SHOWN = 10
_MAX_PROMPT_CHARS = 200
# A text may hold escape sequences, and a terminal would carry them out.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Writer(Protocol):
    """Takes outputs in input order. `names_prompt`: a reader can tell which prompt a text belongs
    to, so that a run cut short may leave gaps."""

    names_prompt: bool

    def write(self, output: RequestOutput) -> None: ...


class InputOrder:
    """Puts outputs that come as they finish back into input order.

    What it holds back is bounded: requests are admitted in order, so the oldest one ends within
    max_model_len steps, and each of these finishes at most max_num_seqs others."""

    def __init__(self) -> None:
        self._next_index = 0
        self._held: dict[int, RequestOutput] = {}

    def push(self, output: RequestOutput) -> Iterator[RequestOutput]:
        """The outputs whose turn has come with this one."""
        self._held[output.index] = output
        while self._next_index in self._held:
            yield self._held.pop(self._next_index)
            self._next_index += 1

    def rest(self) -> list[RequestOutput]:
        """What is held back, in input order: there is something only if a run was cut short."""
        return [self._held[index] for index in sorted(self._held)]


def record(output: RequestOutput) -> dict[str, object]:
    """One line of an output file. `error` is null unless the request failed."""
    completion = output.outputs[0]
    return {
        "id": output.request_id,
        "prompt": output.prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": str(completion.finish_reason),
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_output_tokens": len(completion.token_ids),
        "error": output.error or None,
    }


def is_failed(output: RequestOutput) -> bool:
    return output.outputs[0].finish_reason == FinishReason.ERROR


def one_line(text: str) -> str:
    """A text from outside, safe to print on a terminal: it can end no line and hide nothing."""
    return _CONTROL.sub("\ufffd", " ".join(text.splitlines()))


@contextlib.contextmanager
def write_errors(name: str) -> Iterator[None]:
    """Makes a failed write to the file `name` a ConfigError. A closed pipe stays one: the reader
    has had enough."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno == errno.EBADF:
            raise ConfigError(f"{name} is closed; open it, or write to a file") from error
        raise ConfigError(
            f"{name}: {error.strerror}; make room or write the output elsewhere"
        ) from error


def print_line(line: str) -> None:
    """A line on standard output, at once. Raises ConfigError if nobody takes it, also for a closed
    pipe, which would end the command with 1: of `run` and `perf compare` that means more."""
    try:
        with write_errors(STDOUT_NAME):
            print(line, flush=True)
    except BrokenPipeError as error:
        raise ConfigError(f"{STDOUT_NAME} is closed; read it to its end") from error


class JsonlWriter:
    """A line of JSON per output, UTF-8, handed to the system at once: a run cut short leaves whole
    lines. `file` is binary; `name` is for the error if it cannot be written (ConfigError)."""

    names_prompt = True

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name

    def write(self, output: RequestOutput) -> None:
        line = json.dumps(record(output), ensure_ascii=False) + "\n"
        unwritten = memoryview(line.encode("utf-8"))
        with write_errors(self._name):
            while unwritten:  # an unbuffered file may take less than all
                unwritten = unwritten[self._file.write(unwritten) :]
            self._file.flush()


class TextWriter:
    """The text alone and a line end, for pipes; a failed request leaves an empty line there and
    its error on standard error. `name` is for the error if it cannot be written (ConfigError)."""

    names_prompt = False

    def __init__(self, file: TextIO, name: str) -> None:
        self._file = file
        self._name = name

    def write(self, output: RequestOutput) -> None:
        with write_errors(self._name):
            self._file.write(output.outputs[0].text + "\n")
            self._file.flush()


class TerminalWriter:
    """Prompt and text, legible, above a live progress bar if there is one; skips failed ones."""

    names_prompt = True

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, output: RequestOutput) -> None:
        if is_failed(output):
            return  # standard error has named it
        prompt = output.prompt if output.prompt is not None else f"request {output.request_id}"
        if len(prompt) > _MAX_PROMPT_CHARS:
            prompt = "..." + prompt[-_MAX_PROMPT_CHARS:]
        block = Text()
        block.append(_CONTROL.sub("\ufffd", prompt) + " -> ", style="dim")
        block.append(_CONTROL.sub("\ufffd", output.outputs[0].text))
        self._console.print(block, soft_wrap=True)


def write_in_order(outputs: Iterable[RequestOutput], writer: Writer) -> None:
    """Writes outputs in input order as they come. The first failures are also named on standard
    error. If the run is cut short, what is finished but not at its turn is still written, where
    the writer names prompts."""
    order = InputOrder()
    num_failed = 0
    try:
        for output in outputs:
            if is_failed(output):
                num_failed += 1
                if num_failed <= MAX_ERRORS_SHOWN:
                    line = one_line(f"error: request {output.request_id}: {output.error}")
                    with contextlib.suppress(OSError):  # nobody reads it; the work goes on
                        print(line, file=sys.stderr)
            for ready in order.push(output):
                writer.write(ready)
    finally:
        if writer.names_prompt:
            for held in order.rest():
                writer.write(held)


def check_output_path(output: str, input_path: str | None, *, option: str = "--output") -> None:
    """Raises ConfigError, which names the option, if a file of that name cannot be written, before
    a model is loaded. Leaves a file that is there as it is. Standard output is for --output alone.
    """
    if output == STDOUT:
        if option == "--output":
            return
        raise ConfigError(f"{option} is -; give a file")
    path = Path(output)
    try:
        path.stat()  # what it says of a name too long, the rest would raise
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"{option} {output}: {error.strerror}; give another name") from error
    if path.is_dir():
        raise ConfigError(f"{option} {output} is a directory; give a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {output}: no directory {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {output}: not allowed to write there; give another name")
    if input_path is not None and is_one_file(output, input_path, dash=STDIN_FILENO):
        raise ConfigError(f"{option} {output} is the input file; give another name")


def check_apart(files: Iterable[tuple[str, str]]) -> None:
    """files: (option, path) of all that a command writes. Raises ConfigError if two of them are one
    file, of which the one written last would be left, or a mixture."""
    for (option, path), (other_option, other) in itertools.combinations(files, 2):
        if is_one_file(path, other, dash=STDOUT_FILENO):
            taken_by = STDOUT_NAME if other == STDOUT else f"{other_option} {other}"
            raise ConfigError(f"{option} {path} is the file of {taken_by}; give another name")


def is_one_file(path: str, other: str, *, dash: int) -> bool:
    """Whether two names lead to one file that writing to one of them would spoil for the other, be
    it there yet or not: no device or pipe. Links of all kinds are followed; "-" is whatever is open
    as descriptor `dash`."""
    here, there = _status(path, dash), _status(other, dash)
    if here is None or there is None:
        return os.path.realpath(path) == os.path.realpath(other)
    return stat.S_ISREG(here.st_mode) and os.path.samestat(here, there)


def _status(path: str, dash: int) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return os.fstat(dash) if path == STDOUT else os.stat(path)
    return None
