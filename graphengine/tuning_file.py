"""Which way is chosen for each product, and where is it kept? JSON that processes share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import filelock

from graphengine.kernels.ways import Product, Way

_log = logging.getLogger(__name__)
CACHE = Path("~/.cache/graphengine/products")
_LOCK_TIMEOUT_S = 60.0


def file_in(folder: Path, made_for: Mapping[str, object]) -> Path:
    """The file in `folder` for one card, model and whatever else `made_for` names."""
    key = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()
    return folder / f"{key[:32]}.json"


def read(path: Path) -> dict[str, str]:
    """Names of ways by product. Empty where there is no such file, or it is damaged."""
    try:
        ways = json.loads(path.read_bytes())["ways"]
        return {str(product): str(name) for product, name in ways.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def write(path: Path, made_for: Mapping[str, object], ways: Mapping[str, str]) -> None:
    """Replaces the file at once, or leaves it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"made_for": made_for, "ways": ways}, file, indent=1, sort_keys=True)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: the others wait, and find what the first one has written. Where no
    lock can be had, each is on its own."""
    lock = filelock.FileLock(f"{path}.lock", timeout=_LOCK_TIMEOUT_S)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, filelock.Timeout):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock)
        yield


class Choices:
    """One way for each product, of those it has by their names. The first file that has a product
    decides it; what a file lacks it gets."""

    def __init__(
        self,
        ways: Mapping[Product, Mapping[str, Way]],
        files: Sequence[Path],
        made_for: Mapping[str, object],
    ) -> None:
        """made_for: is written beside what is found here. The last file is the one to lock."""
        self._ways = ways
        self._files = files
        self._made_for = made_for
        self._names: dict[Product, str] = {}
        self.chosen: dict[Product, Way] = {}
        self._read()

    @property
    def missing(self) -> dict[Product, Mapping[str, Way]]:
        """The ways of products that no file has."""
        return {p: ways for p, ways in self._ways.items() if p not in self._names}

    def complete(
        self, find: Callable[[Mapping[Product, Mapping[str, Way]]], Mapping[Product, str]]
    ) -> None:
        """Has what is missing found, and keeps all. Waits for another process that does the same,
        and takes what that has found."""
        if self.missing:
            with locked(self._files[-1]) if self._files else contextlib.nullcontext():
                self._read()
                if self.missing:
                    self._take(find(self.missing))
                self._keep()
        else:
            self._keep()

    def _take(self, names: Mapping[Product, str]) -> None:
        for product, name in names.items():
            self._names[product] = name
            self.chosen[product] = self._ways[product][name]

    def _read(self) -> None:
        for path in self._files:
            known = read(path)
            # A name that is none of its ways is as good as none.
            found = {p: known.get(str(p), "") for p in self.missing}
            self._take({p: name for p, name in found.items() if name in self._ways[p]})

    def _keep(self) -> None:
        for path in self._files:
            known = read(path)
            lacking = {
                str(product): name
                for product, name in self._names.items()
                if known.get(str(product), "") not in self._ways[product]
            }
            if not lacking:
                continue
            try:
                write(path, self._made_for, {**known, **lacking})
            except OSError as error:
                _log.warning("%s cannot be written (%s); it is measured again", path, error)
