"""What holds for every test: no network, few threads, reproducible in CI, a rule for GPU tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator

# Before torch and huggingface_hub are imported, which read them once. Subprocesses inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as the command line sets it

import pytest
from hypothesis import settings

# A run on a GPU machine sets it, so that a GPU test that did not run cannot pass for one that did.
REQUIRE_GPU = os.environ.get("GRAPHENGINE_REQUIRE_GPU") == "1"

settings.register_profile("graphengine", deadline=None)
settings.register_profile("graphengine-ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("graphengine-ci" if os.environ.get("CI") else "graphengine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_GPU and report.skipped and item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"GRAPHENGINE_REQUIRE_GPU=1, but the test was skipped: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips itself, as `importorskip` does, hides its GPU tests from the rule."""
    report = yield
    if REQUIRE_GPU and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"GRAPHENGINE_REQUIRE_GPU=1, but a module was skipped: {report.longrepr}"
    return report


@pytest.fixture
def give_stdin() -> Iterator[Callable[[str | int], None]]:
    """Puts a text, or an open file, in the place of standard input until the test ends."""
    saved = os.dup(0)

    def give(source: str | int) -> None:
        if isinstance(source, int):
            os.dup2(source, 0)
            return
        with tempfile.TemporaryFile() as file:
            file.write(source.encode())
            file.seek(0)
            os.dup2(file.fileno(), 0)

    yield give
    os.dup2(saved, 0)
    os.close(saved)
