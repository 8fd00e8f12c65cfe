"""Do README and docs show what really happens? Their commands and Python are run, and compared."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


BLOCKS = blocks_of(PAGES[0])
# The commands of a page, which may build on one another; a README's stand for themselves.
CONSOLES = {
    f"README-{number}": text
    for number, text in enumerate(text for kind, text in BLOCKS if kind == "console")
} | {
    page.stem: "".join(text for kind, text in blocks_of(page) if kind == "console")
    for page in PAGES[1:]
}
PYTHONS = [
    (text, BLOCKS[i + 1][1] if i + 1 < len(BLOCKS) else "")
    for i, (kind, text) in enumerate(BLOCKS)
    if kind == "python"
]
# What no two runs share: times, speeds, and how many steps the requests' arrival made of them.
TIMES = re.compile(r"\d[\d,.]*(?= (?:s|ms|output tok/s)\b)|(?<= steps: )[\d,]+|(?<=_s\": )[\d.]+")

# Shown every ten seconds, where the terminal is a plain one: on a slow day there is one more.
PROGRESS = re.compile(r"^[\d,]+(/~?[\d,]+)? rows, .* errors?\n", re.M)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """`graphengine` as an installation would give it, on the CPU, in a plain terminal."""
    command = tmp_path / "bin" / "graphengine"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / "graphengine").symlink_to(ROOT / "graphengine")
    return {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "TERM": "dumb",
        "COLUMNS": "200",
    }


def on_terminal(command: str, cwd: Path, environment: dict[str, str]) -> str:
    """What a person sees who types the command: both outputs, on a terminal."""
    terminal, child_end = pty.openpty()
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=child_end,
        stderr=child_end,
    ):
        os.close(child_end)
        shown = b""
        try:
            while data := os.read(terminal, 65536):
                shown += data
        except OSError:  # Linux reports a closed terminal so
            pass
    os.close(terminal)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("name", CONSOLES)
def test_console_shows_real_output(name: str, tmp_path: Path, environment: dict[str, str]) -> None:
    parts = re.split(r"^\$ (.*)\n", CONSOLES[name], flags=re.M)
    assert parts[0] == ""
    for command, expected in zip(parts[1::2], parts[2::2], strict=True):
        shown = on_terminal(command, tmp_path, environment)
        shown = PROGRESS.sub("", shown)
        assert TIMES.sub("0", shown) == TIMES.sub("0", expected), command


@pytest.mark.parametrize(("code", "expected"), PYTHONS)
def test_python_prints_what_stands_below(
    code: str, expected: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == expected, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_packages_of_an_extra_are_installed_from_the_clone(page: Path) -> None:
    """By the project's name pip would not ask constraints.txt for the versions."""
    assert not re.findall(r'pip install .*"graphengine\[\w+\]"', page.read_text("utf-8"))


def test_readme_says_first_how_to_run_it() -> None:
    kind, text = BLOCKS[0]
    assert kind == "sh"
    assert [line.split("#")[0].strip() for line in text.splitlines()] == ["make demo", "make test"]
    assert CONSOLES
    assert PYTHONS
