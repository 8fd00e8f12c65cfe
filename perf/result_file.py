"""How is a result kept? Whole or not at all, where it was tried before anything was measured."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphengine.errors import ConfigError
from graphengine.output_file import check_output_path, write_errors

# A full disk still takes an empty file.
_TRIAL_BYTES = 64 << 10


def check_result_path(output: str) -> None:
    """Raises ConfigError if no result can be written there now. A file that is there stays as it
    is."""
    check_output_path(output, None)
    with write_errors(output), _part_of(Path(output)) as part:
        part.write_bytes(bytes(_TRIAL_BYTES))


def result_path(text: str) -> Path:
    """`check_result_path` as the type of an option of argparse."""
    try:
        check_result_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def write_result(result: dict[str, Any], path: Path) -> None:
    """A reader never finds half a file. Raises ConfigError."""
    with write_errors(str(path)), _part_of(path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        part.replace(path)


@contextlib.contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """Name of the file beside `path` that is written first; what is left of it then goes."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)
