"""Does the README show what really happens? Its commands and its Python are run, and compared."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
CONSOLES = [text for kind, text in BLOCKS if kind == "console"]
PYTHONS = [
    (text, BLOCKS[i + 1][1] if i + 1 < len(BLOCKS) else "")
    for i, (kind, text) in enumerate(BLOCKS)
    if kind == "python"
]
# What no two runs share: times, speeds, and how many steps the requests' arrival made of them.
TIMES = re.compile(r"\d[\d,.]*(?= (?:s|ms|output tok/s)\b)|(?<= steps: )[\d,]+")


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


@pytest.mark.parametrize("number", range(len(CONSOLES)))
def test_console_shows_real_output(
    number: int, tmp_path: Path, environment: dict[str, str]
) -> None:
    parts = re.split(r"^\$ (.*)\n", CONSOLES[number], flags=re.M)
    assert parts[0] == ""
    for command, expected in zip(parts[1::2], parts[2::2], strict=True):
        shown = on_terminal(command, tmp_path, environment)
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


def test_readme_says_first_how_to_run_it() -> None:
    kind, text = BLOCKS[0]
    assert kind == "sh"
    assert [line.split("#")[0].strip() for line in text.splitlines()] == ["make demo", "make test"]
    assert CONSOLES
    assert PYTHONS
