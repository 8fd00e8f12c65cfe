"""How does a command end? What a user can cause is one line and an exit code."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import typer

from graphengine.errors import ConfigError, GraphEngineError
from graphengine.output_file import STDOUT_NAME, one_line

BAD_INPUT = 2
INTERRUPTED = 128 + signal.SIGINT  # as a shell counts it
TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, where `sigterm_as_interrupt` says so."""


@contextlib.contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """What a user can cause ends in one line and an exit code; a bug keeps its traceback."""
    try:
        _check_working_directory()
        yield
    except GraphEngineError as error:
        tell(error)
        raise typer.Exit(BAD_INPUT) from error
    except Terminated as error:
        say("terminated")
        raise typer.Exit(TERMINATED) from error
    except KeyboardInterrupt as error:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from error


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does, not at once: what is finished can be kept. Where
    the process was told to ignore it, it goes on ignoring it."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def ignore_interrupts_at_exit() -> None:
    """All is written by then: a Ctrl-C while Python takes leave would only change the exit code."""
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def help_errors() -> Iterator[None]:
    """A standard output that takes no help is one line too: commands tell of theirs themselves."""
    try:
        yield
    except OSError as error:
        if "--help" not in sys.argv:
            raise
        try:
            print(flush=True)  # whether it was that, or a bug
        except OSError:
            _drop_unwritten_output()
            say(f"error: {STDOUT_NAME}: {error.strerror}")
            sys.exit(BAD_INPUT)
        raise


def _check_working_directory() -> None:
    """Where it was removed, torch's math library ends the process as it is loaded, and every worker
    process of a job, with a line about another thing."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory cannot be found ({error.strerror}), it may be removed; "
            "change to another one"
        ) from error


def tell(error: GraphEngineError) -> None:
    """The error's line, for a command that goes on to its own exit code."""
    _drop_unwritten_output()
    say("error: " + one_line(str(error)))


def _drop_unwritten_output() -> None:
    """What standard output cannot take, Python would try to write again at exit, and end with
    another error and exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def say(line: str) -> None:
    """A line for the person at the terminal; standard output is for results. If nobody reads it any
    more, the work goes on."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def describe_exit(status: int) -> str:
    """Of a process, as `Popen.returncode` has it: `killed by SIGKILL` or `exit code 1`."""
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit code {status}"
