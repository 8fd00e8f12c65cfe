"""How is a result kept? Whole or not at all, where it was tried before anything was measured."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from graphengine.errors import ConfigError
from graphengine.output_file import STDOUT, check_output_path, write_errors

# A full disk still takes an empty file.
_TRIAL_BYTES = 64 << 10
_MAX_NAME_CHARS = 50  # with what a part's name has more, in 255 bytes


def check_result_path(output: str) -> None:
    """Raises ConfigError if no result can be written there now. A file that is there stays as it
    is."""
    if output == STDOUT:
        raise ConfigError("--output is -, where the summary goes; give a file")
    check_output_path(output, None)
    path = Path(output)
    with write_errors(output), _written_first(path) as part:
        if part != path:
            part.write_bytes(bytes(_TRIAL_BYTES))


def result_path(text: str) -> Path:
    """`check_result_path` as the type of an option of argparse."""
    try:
        check_result_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def write_result(result: object, path: Path) -> None:
    """A reader never finds half a file, but where it must be written in place: see
    `_written_first`. Raises ConfigError."""
    with write_errors(str(path)), _written_first(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        if part != path:
            part.replace(os.path.realpath(path))


@contextlib.contextmanager
def _written_first(path: Path) -> Iterator[Path]:
    """A file beside `path` to write first and rename; what is left of it then goes. `path` itself
    if it is no regular file (/dev/stdout), or is there in a folder that takes no other."""
    target = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not (path.is_file() and os.access(target.parent, os.W_OK)):
        yield path
        return
    part = target.with_name(f".{target.name[:_MAX_NAME_CHARS]}.{os.getpid()}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)
