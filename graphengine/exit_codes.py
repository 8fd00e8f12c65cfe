"""How does a command end? What a user can cause is one line and an exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer

from graphengine.errors import GraphEngineError

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell counts it


@contextlib.contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """What a user can cause ends in one line and an exit code; a bug keeps its traceback."""
    try:
        yield
    except GraphEngineError as error:
        say("error: " + " ".join(str(error).splitlines()))
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as error:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from error


def say(line: str) -> None:
    """A line for the person at the terminal; standard output is for results."""
    print(line, file=sys.stderr)
