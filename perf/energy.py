"""What does a GPU draw? NVML's count of its joules: at its power limit a step takes the energy it
takes, so that whatever is saved anywhere is time (perf/LOG.md)."""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = "libnvidia-ml.so.1"


def energy_counter() -> Callable[[], float | None] | None:
    """Reads the joules that torch's current CUDA device has drawn since its driver was loaded, or
    None where that fails. They are counted some ten times a second. None itself where there is no
    such device or NVML does not know it. NVML API reference: nvmlDeviceGetTotalEnergyConsumption.
    """
    if not torch.cuda.is_available():
        return None
    # Imported here: a CPU machine need not have it.
    from cuda.bindings import driver

    status, device = driver.cuDeviceGet(torch.cuda.current_device())
    if status:
        return None
    status, found = driver.cuDeviceGetUuid(device)
    if status:
        return None
    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    return counter_of(nvml, found.bytes)


def counter_of(nvml: Any, device_uuid: bytes) -> Callable[[], float | None] | None:
    """nvml: the library. device_uuid: 16 bytes, as CUDA's driver tells them."""
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{uuid.UUID(bytes=bytes(device_uuid))}".encode()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None

    def read() -> float | None:
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            return None
        return 1e-3 * millijoules.value

    return read
