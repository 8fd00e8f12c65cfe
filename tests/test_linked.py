"""Is machine code kept once, loaded later, and never where somebody else could have put it?"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_library_of_another_machine_is_not_loaded(path: Path) -> None:
    """What the loader refuses, as it is kept."""
    path.parent.mkdir(mode=0o700)
    path.write_bytes((content := b"not ELF") + hashlib.sha256(content).digest())
    path.chmod(0o700)
    assert linked.load(path) is None


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
@pytest.mark.parametrize("part", ["folder", "file"])
def test_what_others_can_write_is_not_loaded(path: Path, part: str, mode: int) -> None:
    linked.make(path, object_of(3))
    (path if part == "file" else path.parent).chmod(mode)
    assert linked.load(path) is None
    if part == "folder":
        with pytest.raises(LinkError, match="can be written by others; make it yours alone"):
            linked.make(path, never)


@pytest.mark.parametrize("part", ["folder", "file"])
def test_what_is_somebody_elses_is_not_loaded(
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
    assert linked.load(path) is None


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
