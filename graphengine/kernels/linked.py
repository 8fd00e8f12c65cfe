"""How is machine code kept that another compiler made? Linked to a shared library on disk.

What is loaded runs with the user's rights. So only files are loaded that nobody else can have
written, and whose digest, behind them, is right: a library that is cut off would end the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_COMPILERS = ("cc", "gcc", "clang")  # to link alone; Triton needs one of the last two anyway
_LINK_TIMEOUT_S = 60
_DIGEST_BYTES = hashlib.sha256().digest_size
_PARTS = "parts-"


class LinkError(RuntimeError):
    """Nothing can be kept here, and why."""


def load(path: Path) -> ctypes.CDLL | None:
    """The library that `make` has left there; None where there is none, or one that is damaged or
    that others can write to. Raises LinkError where it is as it was made and cannot be loaded, as
    from a file system without the right to execute: to make it anew would not help."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    library = None
    try:
        if _is_as_made(file):
            # What was checked is what is loaded, whatever the path has come to name meanwhile.
            library = ctypes.CDLL(f"/proc/self/fd/{file}")
    except OSError as error:
        raise LinkError(f"{path} cannot be loaded ({error})") from error
    finally:
        # The loader knows a library by its name: under the same number another would not be loaded,
        # but this one given again. So the number stays taken, as the library stays loaded.
        if library is None:
            os.close(file)
    return library


def _is_as_made(file: int) -> bool:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or not _is_users_alone(status):
        return False
    with open(file, "rb", closefd=False) as reader:
        kept = reader.read()
    return hashlib.sha256(kept[:-_DIGEST_BYTES]).digest() == kept[-_DIGEST_BYTES:]


def _is_users_alone(status: os.stat_result) -> bool:
    """Whether nobody else may write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def load_or_make(
    path: Path, compile_to: Callable[[Path], None], *, longest_s: float
) -> ctypes.CDLL:
    """As `load`, or else `make`. One process makes it, the others wait and load what it has made.
    longest_s: what `compile_to` takes at most. Blocks. Raises as the two do."""
    library = load(path)
    if library is not None:
        return library
    longest_s += _LINK_TIMEOUT_S
    folder = _own_folder(path)
    with _locked(path, timeout_s=longest_s + 10.0):
        _sweep(folder, older_than_s=longest_s)
        library = load(path)
        return make(path, compile_to) if library is None else library


def make(path: Path, compile_to: Callable[[Path], None]) -> ctypes.CDLL:
    """The library of an object file, which `compile_to` writes to the path that it gets; replaces
    what is there. Blocks until done. Raises LinkError, mostly before anything is compiled, and what
    `compile_to` raises."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise LinkError(f"there is no C compiler to link it ({', '.join(_COMPILERS)}); install one")
    folder = _own_folder(path)
    try:
        parts = tempfile.TemporaryDirectory(prefix=_PARTS, dir=folder)
    except OSError as error:
        raise LinkError(f"{folder} cannot be written ({error})") from error
    with parts as name:
        part, library = Path(name, "part.o"), Path(name, path.name)
        compile_to(part)
        try:
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
        raise LinkError(f"{path} is not what was written there; start again")
    return loaded


def _own_folder(path: Path) -> Path:
    """Its folder, made if it is missing. Raises LinkError where others can write to it: they could
    exchange what is not yet linked."""
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise LinkError(f"{folder} cannot be written ({error})") from error
    if not _is_users_alone(status):
        mode = stat.S_IMODE(status.st_mode)
        raise LinkError(
            f"{folder} can be written by others: it is of user {status.st_uid}, mode {mode:04o}, "
            f"you are {os.geteuid()}; make it yours alone, as by chown and chmod go-w"
        )
    return folder


@contextlib.contextmanager
def _locked(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Where no lock can be had, each process is on its own."""
    import filelock  # torch brings it

    with contextlib.ExitStack() as stack:
        # A Timeout is an OSError; some file systems have no locks.
        with contextlib.suppress(OSError, NotImplementedError):
            stack.enter_context(filelock.FileLock(f"{path}.lock", timeout=timeout_s))
        yield


def _sweep(folder: Path, *, older_than_s: float) -> None:
    """Removes what processes left that were killed."""
    with contextlib.suppress(OSError):
        for parts in folder.glob(f"{_PARTS}*"):
            with contextlib.suppress(OSError):
                if parts.lstat().st_mtime < time.time() - older_than_s:
                    shutil.rmtree(parts, ignore_errors=True)


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
