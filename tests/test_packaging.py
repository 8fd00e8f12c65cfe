"""Does what is installed match what the project says, and does starting stay cheap?"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cli
import graphengine

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize(
    "code",
    [
        "import graphengine; graphengine.SamplingParams; graphengine.RequestOutput",
        "import sys, cli; sys.argv = ['graphengine', '--help']; cli.main()",
        "import sys, cli; sys.argv = ['graphengine', 'generate', '--help']; cli.main()",
        "import sys, cli; sys.argv = ['graphengine', 'generate', 'demo', '']; cli.main()",
        "import sys, cli; sys.argv = ['graphengine', 'run', '--help']; cli.main()",
        "import sys, cli; sys.argv = ['graphengine', 'perf', '--help']; cli.main()",
        "import sys, cli; sys.argv = ['graphengine', 'perf', 'compare', 'a', 'b']; cli.main()",
    ],
)
def test_start_waits_for_no_torch_and_needs_no_optional_package(code: str) -> None:
    late = {"torch", "transformers", "orjson", "filelock", "pyarrow", "zstandard", "ray"}
    code = (
        f"import atexit, sys\n"
        f"atexit.register(lambda: print('slow:', {late!r} & set(sys.modules)))\n"
        f"{code}\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.endswith("slow: set()\n"), run.stderr


def test_measuring_needs_no_optional_package() -> None:
    """`perf run` once needed what only jobs do."""
    code = (
        "import sys\n"
        "for name in ('orjson', 'filelock', 'pyarrow', 'zstandard', 'ray', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import perf.run, perf.startup, perf.host_loop, perf.step_breakdown\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_module_at_the_top_is_installed() -> None:
    names = {path.stem for path in ROOT.glob("*.py")}
    assert set(PROJECT["tool"]["setuptools"]["py-modules"]) == names


def test_entry_point_is_the_command_line() -> None:
    module, function = PROJECT["project"]["scripts"]["graphengine"].split(":")
    assert module in PROJECT["tool"]["setuptools"]["py-modules"]
    assert getattr(importlib.import_module(module), function) is cli.main


def test_every_direct_dependency_is_pinned() -> None:
    pins = {
        name_of(line)
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line
    }
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["dev"], *extras["jobs"], *extras["ray"]]
    assert {name_of(requirement) for requirement in named} - {"graphengine"} == pins


def test_version_has_one_value() -> None:
    assert graphengine.__version__ == PROJECT["project"]["version"]


def test_packages_and_their_data_are_listed() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    patterns = setuptools["packages"]["find"]["include"]
    for package in ("captures", "graphengine", "perf"):
        for directory, _, files in os.walk(ROOT / package):
            if any(name.endswith(".py") for name in files):
                assert "__init__.py" in files, f"{directory} would not be installed"
        assert f"{package}*" in patterns
    data = set()
    for pattern in setuptools["package-data"]["graphengine"]:
        found = set((ROOT / "graphengine").glob(pattern))
        assert found, pattern
        data |= found
    assert set((ROOT / "graphengine").rglob("*.cu*")) <= data


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "graphengine generate demo --input graphengine/demo/prompts.txt"),
        ("test", "pytest"),
    ],
)
def test_make_target_installs_and_runs(target: str, command: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    # The tests may themselves run under make, which tells its children so.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    dry_run = subprocess.run(
        ["make", "-n", target],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "venv" in dry_run.stdout
    assert "pip install" in dry_run.stdout
    assert dry_run.stdout.rstrip().splitlines()[-1].startswith(".venv/bin/")
    assert command in dry_run.stdout


@pytest.mark.parametrize(("is_required", "outcome"), [(False, "3 skipped"), (True, "2 errors")])
def test_skipped_gpu_test_fails_where_a_gpu_is_required(
    tmp_path: Path, is_required: bool, outcome: str
) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\n"
        "def test_a(): pytest.skip('no flash-attn')\n"
        "@pytest.mark.gpu\n"
        "@pytest.mark.skip(reason='later')\n"
        "def test_b(): pass\n"
        "def test_c(): pytest.skip('needs no GPU')\n"
    )
    environment = {**os.environ, "GRAPHENGINE_REQUIRE_GPU": "1" if is_required else "0"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in run.stdout.splitlines()[-1], run.stdout
    assert run.returncode == int(is_required)
