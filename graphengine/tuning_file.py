"""Which way is chosen for each product, and which attention, and where is it kept? JSON that
processes share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import filelock

from graphengine.kernels.ways import Product, Way

_log = logging.getLogger(__name__)
CACHE = Path("~/.cache/graphengine/products")
_LOCK_TIMEOUT_S = 60.0
_MOST_BYTES = 2**20
# Among the ways of products, whose names are longer.
_ATTENTION = "attention"
# Of files that are older than any other choice.
_FIRST_ATTENTION = "flash"


def file_in(folder: Path, made_for: Mapping[str, object]) -> Path:
    """The file in `folder` for one card, model and whatever else `made_for` names."""
    key = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()
    return folder / f"{key[:32]}.json"


def read(path: Path) -> dict[str, str]:
    """Names of ways by product. Empty where there is no such file, or it is damaged."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return {}
        ways = json.loads(path.read_bytes())["ways"]
        return {str(product): str(name) for product, name in ways.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def write(path: Path, made_for: Mapping[str, object], ways: Mapping[str, str]) -> None:
    """Replaces the file at once, or leaves it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"made_for": made_for, "ways": ways}, indent=1, sort_keys=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text + "\n", "utf-8")
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: the others wait, and find what the first one has written. Where no
    lock can be had, each is on its own."""
    lock = filelock.FileLock(f"{path}.lock", timeout=_LOCK_TIMEOUT_S)
    with contextlib.ExitStack() as stack:
        # A Timeout is an OSError; some file systems have no locks.
        with contextlib.suppress(OSError, NotImplementedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock)
        yield


def attention_begun_with(path: Path) -> str | None:
    """The attention that what goes on with the file began with; None where nothing has begun."""
    ways = read(path)
    return ways.get(_ATTENTION, _FIRST_ATTENTION) if ways else None


def keep_attention_begun_with(path: Path, made_for: Mapping[str, object], name: str) -> str:
    """Writes it, unless one stands there, or did before it was written down; gives what stands
    there. Waits for another process that writes. Where nothing can be written a warning says so."""
    begun = attention_begun_with(path)
    if begun is not None:
        return begun
    with locked(path):
        begun = attention_begun_with(path)
        if begun is not None:
            return begun
        try:
            write(path, made_for, {_ATTENTION: name})
        except OSError as error:
            _log.warning(
                "%s cannot be written (%s): with it another start may take another attention",
                path,
                error,
            )
    return name


Find = Callable[[Mapping[Product, Mapping[str, Way]]], Mapping[Product, str]]


class Choices:
    """One way for each product, of those it has by their names, the rule's first. The first file
    that has a product decides it."""

    def __init__(
        self,
        ways: Mapping[Product, Mapping[str, Way]],
        made_for: Mapping[str, object],
        *,
        own: Path | None,
        cache: Path | None,
    ) -> None:
        """own: gets all that is chosen. cache: gets what is found here, as found for made_for."""
        self._ways = ways
        self._made_for = made_for
        self._own, self._cache = own, cache
        self._names: dict[Product, str] = {}
        self.chosen: dict[Product, Way] = {}
        self._read()

    @property
    def missing(self) -> dict[Product, Mapping[str, Way]]:
        """The ways of products that no file has."""
        return {p: ways for p, ways in self._ways.items() if p not in self._names}

    def complete(self, find: Find) -> None:
        """Has what is missing found, and keeps all. Waits for another process that does the same,
        and takes what that has found. What `find` leaves out has no way here."""
        if not self.missing and self._is_own():
            return
        with contextlib.ExitStack() as stack:
            for path in self._files:
                stack.enter_context(locked(path))
            self._read_again()
            if self.missing:
                found = find(self.missing)
                self._keep(self._cache, found)
                # Of two that did not see each other's lock, one has been the first.
                self._read_again()
                self._take({p: name for p, name in found.items() if p in self.missing})
            self._keep(self._own, self._names)

    def _is_own(self) -> bool:
        """Whether the user's own file says what is chosen, if there is one."""
        if self._own is None:
            return True
        known = read(self._own)
        return all(known.get(str(p)) == name for p, name in self._names.items())

    @property
    def _files(self) -> list[Path]:
        return [path for path in (self._own, self._cache) if path is not None]

    def _take(self, names: Mapping[Product, str]) -> None:
        for product, name in names.items():
            self._names[product] = name
            self.chosen[product] = self._ways[product][name]

    def _read_again(self) -> None:
        """A file that has changed meanwhile decides too."""
        self._names.clear()
        self.chosen.clear()
        self._read()

    def _read(self) -> None:
        for path in self._files:
            known = read(path)
            # A name that is none of its ways is as good as none.
            found = {p: known.get(str(p), "") for p in self.missing}
            self._take({p: name for p, name in found.items() if name in self._ways[p]})

    def _keep(self, path: Path | None, names: Mapping[Product, str]) -> None:
        """Writes names of products that the file lacks."""
        if path is None:
            return
        known = read(path)
        lacking = {
            str(product): name
            for product, name in names.items()
            if known.get(str(product), "") not in self._ways[product]
        }
        if not lacking:
            return
        try:
            write(path, self._made_for, {**known, **lacking})
        except OSError as error:
            _log.warning("%s cannot be written (%s): what it lacks is not kept", path, error)
