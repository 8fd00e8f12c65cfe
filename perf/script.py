"""What is a measuring script not given, and how does it end then? In one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator

from graphengine.errors import ConfigError, GraphEngineError
from graphengine.exit_codes import BAD_INPUT, tell
from graphengine.standard_streams import open_closed_streams

# Shapes that a CPU runs, the shipped model among them.
_SMALL = ("tiny", "demo")


@contextlib.contextmanager
def errors_as_exit() -> Iterator[None]:
    """Around `main`: what a user can cause ends in one line, after all that was printed. A bug
    keeps its traceback."""
    open_closed_streams()
    try:
        yield
    except GraphEngineError as error:
        tell(error)
        raise SystemExit(BAD_INPUT) from error


def check_least(options: argparse.Namespace, least: int, *names: str) -> None:
    """Raises ConfigError for one of the options, or a number of its list, below `least`. None is
    an option that was not given."""
    for name in names:
        given = getattr(options, name)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if value is not None and value < least:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} is {value}; give {least} or more")


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError for a name that is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"no {kind} {name!r}; choose from {', '.join(known)}")


def check_gpu(instead: str) -> None:
    """Raises ConfigError without a GPU. instead: what it is for, or what can be done without."""
    import torch  # takes seconds: what can be said before is

    if not torch.cuda.is_available():
        raise ConfigError(f"no GPU: torch sees no CUDA device; {instead}")


def check_shape(shape: str, *, instead: str) -> None:
    """Raises ConfigError for a shape that takes a machine without a GPU hours."""
    import torch

    if shape not in _SMALL and not torch.cuda.is_available():
        raise ConfigError(f"--shape is {shape}, which needs a GPU; {instead}")
