"""Are a GPU's joules read of the right device, and nothing made up where they cannot be?"""

from __future__ import annotations

import ctypes
import uuid
from typing import Any

import pytest
import torch

from graphengine import LLM
from perf.energy import counter_of, energy_counter
from perf.run import _requests
from perf.workloads import Workload

UUID = uuid.UUID("12345678-9abc-def0-1122-334455667788")


class Nvml:
    """The library, of one GPU that draws 250 J between two looks. Statuses: of each function."""

    def __init__(self, **statuses: int) -> None:
        self.statuses = statuses
        self.millijoules = 5_000_000_000_000

    def nvmlInit_v2(self) -> int:
        return self.statuses.get("init", 0)

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        if name != f"GPU-{UUID}".encode():
            return 6  # NVML_ERROR_NOT_FOUND
        handle._obj.value = 77
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, to: Any) -> int:
        assert handle.value == 77
        self.millijoules += 250_000
        to._obj.value = self.millijoules
        return self.statuses.get("energy", 0)


def test_joules_are_those_of_the_device() -> None:
    read = counter_of(Nvml(), UUID.bytes)
    assert read is not None
    first, second = read(), read()
    assert first is not None
    assert second is not None
    assert first > 5e9
    assert second - first == pytest.approx(250.0)


def test_none_where_nothing_is_counted() -> None:
    assert counter_of(Nvml(init=9), UUID.bytes) is None
    assert counter_of(Nvml(), bytes(16)) is None
    nvml = Nvml()
    read = counter_of(nvml, UUID.bytes)
    assert read is not None
    assert read() is not None
    nvml.statuses["energy"] = 15  # NVML_ERROR_GPU_IS_LOST
    assert read() is None


@pytest.mark.parametrize("looks", [[], [100.0], [100.0, 350.0]])
def test_run_has_the_joules_between_two_looks_or_none(
    monkeypatch: pytest.MonkeyPatch, looks: list[float]
) -> None:
    left = list(looks)
    read = (lambda: left.pop(0) if left else None) if looks else None
    monkeypatch.setattr("perf.run.energy_counter", lambda: read)
    workload = Workload("tiny", "tiny", "run", lambda: [(3, 2)])
    with LLM("demo", device="cpu") as llm:
        _, detail = _requests(workload, llm, 1.0, 1e9)
        elapsed_s = llm.stats().elapsed_s
    if len(looks) == 2:
        assert detail["joules"] == 250.0
        assert detail["watts"] == pytest.approx(250.0 / elapsed_s)
    else:
        assert "joules" not in detail
        assert "watts" not in detail


def test_none_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert energy_counter() is None


@pytest.mark.gpu
def test_a_gpu_draws_more_at_work() -> None:
    read = energy_counter()
    if read is None:
        pytest.skip("NVML does not know this GPU")
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    first = read()
    if first is None:
        pytest.skip("this GPU counts no energy")
    for _ in range(2000):
        x @ x
    torch.cuda.synchronize()
    last = read()
    assert last is not None
    assert last - first > 50.0
