"""Is machine code kept once, loaded later, and never where somebody else could have put it?"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import pytest

from graphengine.kernels import linked
from graphengine.kernels.linked import LinkError

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="links for Linux, by a C compiler"
)


def object_of(answer: int) -> Callable[[Path], None]:
    """Compiles `int answer(void)`."""

    def compile_to(part: Path) -> None:
        assert COMPILER is not None
        source = f"int answer(void) {{ return {answer}; }}"
        command = [COMPILER, "-fPIC", "-c", "-x", "c", "-o", str(part), "-"]
        subprocess.run(command, input=source.encode(), check=True)

    return compile_to


def never(part: Path) -> None:
    pytest.fail("compiled")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "answer.so"


def test_what_was_made_is_loaded_by_another_process(path: Path) -> None:
    assert linked.load(path) is None
    assert linked.make(path, object_of(42))["answer"]() == 42
    code = (
        "import sys; from pathlib import Path; from graphengine.kernels import linked\n"
        "print(linked.load(Path(sys.argv[1]))['answer']())"
    )
    command = [sys.executable, "-c", code, str(path)]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "42"
    assert list(path.parent.iterdir()) == [path], "parts are left"


@pytest.mark.parametrize("damage", ["empty", "short", "cut off", "a bit", "no digest"])
def test_damaged_library_is_not_loaded_and_made_anew(path: Path, damage: str) -> None:
    """One that is cut off would end the process where it is read beyond its end."""
    linked.make(path, object_of(1))
    good = path.read_bytes()
    flipped = bytes([good[100] ^ 1])
    bad = {
        "empty": b"",
        "short": b"ELF",
        "cut off": good[: len(good) // 2],
        "a bit": good[:100] + flipped + good[101:],
        "no digest": good[: -linked._DIGEST_BYTES],
    }[damage]
    other = path.with_name("other.so")  # of a path loaded before nothing is loaded again
    other.write_bytes(bad)
    other.chmod(0o700)
    assert linked.load(other) is None
    assert linked.make(other, object_of(2))["answer"]() == 2


def test_library_that_the_loader_refuses_is_an_error_and_not_made_anew(path: Path) -> None:
    """As from a home that is mounted noexec: each start would compile."""
    path.parent.mkdir(mode=0o700)
    path.write_bytes((content := b"not ELF") + hashlib.sha256(content).digest())
    path.chmod(0o700)
    said = rf"{re.escape(str(path))} cannot be loaded \(.*(ELF|short).*\)"
    with pytest.raises(LinkError, match=said):
        linked.load(path)
    with pytest.raises(LinkError, match=said):
        linked.load_or_make(path, never, longest_s=1.0)


def test_what_is_loaded_is_what_was_checked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file that takes its name meanwhile is not."""
    linked.make(path.with_name("other.so"), object_of(12))
    linked.make(path.with_name("first.so"), object_of(11))
    shutil.copy(path.with_name("first.so"), path)  # an inode that nothing is loaded of
    is_as_made = linked._is_as_made

    def then_exchanged(file: int) -> bool:
        found = is_as_made(file)
        path.with_name("other.so").replace(path)
        return found

    monkeypatch.setattr(linked, "_is_as_made", then_exchanged)
    library = linked.load(path)
    assert library is not None
    assert library["answer"]() == 11


def test_many_libraries_are_each_their_own(path: Path) -> None:
    """The loader takes a name that it knows for the library that it knows by it."""
    paths = [path.with_name(f"{answer}.so") for answer in range(20, 25)]
    for answer, own in enumerate(paths, 20):
        assert linked.make(own, object_of(answer))["answer"]() == answer
    assert [linked.load(own)["answer"]() for own in paths] == list(range(20, 25))  # type: ignore[index]


def test_what_is_not_loaded_is_closed(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"damaged")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert linked.load(path) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_pipe_is_not_waited_for(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    os.mkfifo(path)
    assert linked.load(path) is None


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_what_others_can_write_is_not_loaded(path: Path, mode: int) -> None:
    linked.make(path, object_of(3))
    path.chmod(mode)
    assert linked.load(path) is None


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_nothing_is_made_where_others_can_write(path: Path, mode: int) -> None:
    path.parent.mkdir()
    path.parent.chmod(mode)
    said = f"can be written by others: it is of user {os.geteuid()}, mode {mode:04o}, you are"
    for make in (linked.make, functools.partial(linked.load_or_make, longest_s=1.0)):
        with pytest.raises(LinkError, match=said):
            make(path, never)
    assert list(path.parent.iterdir()) == [], "no lock either: it could be a link to another file"


@pytest.mark.parametrize("part", ["folder", "file"])
def test_what_is_somebody_elses_is_not_used(
    path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked.make(path, object_of(4))
    theirs = (path if part == "file" else path.parent).stat().st_ino
    is_alone = linked._is_users_alone

    def of_another(status: os.stat_result) -> bool:
        if status.st_ino != theirs:
            return is_alone(status)
        user = os.geteuid()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: user + 1)
            return is_alone(status)

    monkeypatch.setattr(linked, "_is_users_alone", of_another)
    if part == "file":
        assert linked.load(path) is None
    else:
        with pytest.raises(LinkError, match="can be written by others"):
            linked.make(path, never)


def test_one_process_makes_it_and_the_others_load_it(path: Path) -> None:
    """By threads, whose locks are as those of processes."""
    made: list[Path] = []

    def compile_to(part: Path) -> None:
        made.append(part)
        time.sleep(0.2)
        object_of(9)(part)

    with ThreadPoolExecutor(4) as pool:
        loads = [
            pool.submit(linked.load_or_make, path, compile_to, longest_s=60.0) for _ in range(4)
        ]
        assert [load.result()["answer"]() for load in loads] == [9] * 4
    assert len(made) == 1


@pytest.mark.parametrize("error", [OSError("no locks"), NotImplementedError()])
def test_without_locks_each_is_on_its_own(
    path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(self: filelock.FileLock, *args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert linked.load_or_make(path, object_of(10), longest_s=60.0)["answer"]() == 10


def test_lock_is_waited_for_longer_than_a_compiler_may_take(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts = []

    def lock(_path: str, *, timeout: float) -> contextlib.nullcontext[None]:
        timeouts.append(timeout)
        return contextlib.nullcontext()

    monkeypatch.setattr(filelock, "FileLock", lock)
    linked.load_or_make(path, object_of(13), longest_s=300.0)
    assert timeouts[0] > 300.0 + linked._LINK_TIMEOUT_S


def test_what_killed_processes_left_is_removed_once_it_is_old(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    old, new, other = (path.with_name(name) for name in ("parts-old", "parts-new", "other"))
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "part.o").touch()
    past = time.time() - 60.0 - linked._LINK_TIMEOUT_S - 10.0
    for folder in (old, other):
        os.utime(folder, (past, past))
    linked.load_or_make(path, object_of(14), longest_s=60.0)
    assert not old.exists()
    assert new.exists()
    assert other.exists()


def test_new_folder_is_the_users_alone_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        linked.make(path, object_of(5))
    finally:
        os.umask(before)
    assert linked.load(path) is not None


def test_without_a_compiler_nothing_is_begun(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(LinkError, match="no C compiler"):
        linked.make(path, never)


def test_linker_that_fails_says_why_and_leaves_nothing(path: Path) -> None:
    with pytest.raises(LinkError, match=r"cannot link it \(.+\)"):
        linked.make(path, lambda part: part.write_text("no object") and None)
    assert list(path.parent.iterdir()) == []


def test_error_of_the_compiler_leaves_what_was_there(path: Path) -> None:
    linked.make(path, object_of(6))
    good = path.read_bytes()

    def fails(part: Path) -> None:
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"):
        linked.make(path, fails)
    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LinkError, match="cannot be written"):
        linked.make(tmp_path / "file" / "kept" / "x.so", never)


def test_functions_of_two_libraries_are_their_own(path: Path) -> None:
    """All kernels have functions of the same names, and call them."""
    source = "int inner(void) {{ return {0}; }} int answer(void) {{ return inner(); }}"

    def object_calling(answer: int) -> Callable[[Path], None]:
        def compile_to(part: Path) -> None:
            assert COMPILER is not None
            command = [COMPILER, "-fPIC", "-c", "-x", "c", "-o", str(part), "-"]
            subprocess.run(command, input=source.format(answer).encode(), check=True)

        return compile_to

    linked.make(path, object_calling(1))
    first = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    second = linked.make(path.with_name("other.so"), object_calling(2))
    assert (first["answer"](), second["answer"]()) == (1, 2)


_MAKE = """
import subprocess, sys
from pathlib import Path
from graphengine.kernels import linked

def compile_to(part):
    print("begun", flush=True)
    sys.stdin.read(1)  # until all have begun
    command = ["cc", "-fPIC", "-c", "-x", "c", "-o", str(part), "-"]
    subprocess.run(command, input=b"int answer(void) { return 8; }", check=True)

print(linked.make(Path(sys.argv[1]), compile_to)["answer"]())
"""


def test_processes_that_make_it_at_once_do_not_disturb_each_other(path: Path) -> None:
    command = [sys.executable, "-c", _MAKE, str(path)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    root = Path(__file__).parents[1]
    runs = [subprocess.Popen(command, cwd=root, **pipes) for _ in range(3)]
    assert [run.stdout.readline() for run in runs] == ["begun\n"] * 3
    assert [run.communicate("x", timeout=60)[0] for run in runs] == ["8\n"] * 3
    assert list(path.parent.iterdir()) == [path]
