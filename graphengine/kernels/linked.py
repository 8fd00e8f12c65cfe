"""How is machine code kept that another compiler made? Linked to a shared library on disk.

What is loaded runs with the user's rights. So only files are loaded that nobody else can have
written, and whose digest, behind them, is right: a library that is cut off would end the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

_COMPILERS = ("cc", "gcc", "clang")  # to link alone; Triton needs one of the last two anyway
_LINK_TIMEOUT_S = 60
_DIGEST_BYTES = hashlib.sha256().digest_size


class LinkError(RuntimeError):
    """Nothing can be kept here, and why."""


def load(path: Path) -> ctypes.CDLL | None:
    """The library that `make` has left there; None where there is none, or one that is damaged,
    another machine's or not the user's alone."""
    try:
        if not _is_users_alone(path.parent.stat()):
            return None
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or not _is_users_alone(status):
                return None
            kept = file.read()
        if hashlib.sha256(kept[:-_DIGEST_BYTES]).digest() != kept[-_DIGEST_BYTES:]:
            return None
        # Nobody else can have put another file there meanwhile: the folder is the user's alone.
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _is_users_alone(status: os.stat_result) -> bool:
    """Whether nobody else may write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def make(path: Path, compile_to: Callable[[Path], None]) -> ctypes.CDLL:
    """The library of an object file, which `compile_to` writes to the path that it gets; replaces
    what is there. Blocks until done. Raises LinkError, mostly before anything is compiled, and what
    `compile_to` raises."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise LinkError(f"there is no C compiler to link it ({', '.join(_COMPILERS)}); install one")
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_users_alone(folder.stat()):
            raise LinkError(
                f"{folder} can be written by others; make it yours alone, as by chmod go-w"
            )
        with tempfile.TemporaryDirectory(dir=folder) as name:
            part, library = Path(name, "part.o"), Path(name, path.name)
            compile_to(part)
            _link(compiler, part, library)
            digest = hashlib.sha256(library.read_bytes()).digest()
            with library.open("ab") as file:  # what lies behind the tables of an ELF file is free
                file.write(digest)
            library.chmod(0o700)
            os.replace(library, path)
    except OSError as error:
        raise LinkError(f"{folder} cannot be written ({error})") from error
    loaded = load(path)
    if loaded is None:
        raise LinkError(f"{path} cannot be loaded")
    return loaded


def _link(compiler: str, part: Path, library: Path) -> None:
    # Its own functions call each other, whatever else of their names is loaded; and what was made
    # without a word about its stack needs none that can be executed.
    options = ["-shared", "-Wl,-Bsymbolic,-z,noexecstack"]
    try:
        subprocess.run(
            [compiler, *options, "-o", str(library), str(part)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LINK_TIMEOUT_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())[:200]
        raise LinkError(f"{compiler} cannot link it ({reason})") from error
    except subprocess.TimeoutExpired as error:
        raise LinkError(f"{compiler} took over {_LINK_TIMEOUT_S} s to link it") from error
