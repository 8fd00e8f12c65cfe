"""Are a GPU's joules read of the right device, and nothing made up where they cannot be?"""

from __future__ import annotations

import ctypes
import uuid
from typing import Any

import pytest
import torch

from perf.energy import counter_of, energy_counter

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
    first = read()
    assert read() - first == pytest.approx(250.0)
    assert first > 5e9


def test_none_where_nothing_is_counted() -> None:
    assert counter_of(Nvml(init=9), UUID.bytes) is None
    assert counter_of(Nvml(energy=3), UUID.bytes) is None  # NVML_ERROR_NOT_SUPPORTED
    assert counter_of(Nvml(), bytes(16)) is None


def test_none_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert energy_counter() is None


@pytest.mark.gpu
def test_a_gpu_draws_more_at_work() -> None:
    read = energy_counter()
    if read is None:
        pytest.skip("this GPU counts no energy")
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    first = read()
    for _ in range(2000):
        x @ x
    torch.cuda.synchronize()
    assert read() - first > 50.0
