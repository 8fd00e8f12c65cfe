"""How does the CUDA context come up while Python is still importing? By the driver, in a thread."""

from __future__ import annotations

import ctypes
import threading

_DRIVER = "libcuda.so.1"
_DEVICE = 0  # the one that an engine runs on


class EarlyContext:
    """The primary context of the first CUDA device, begun at once; torch finds it made, or waits
    for it in the driver. Driver calls leave the interpreter to others, as torch's own do not.

    Without a driver or a device nothing happens: whoever then asks torch for CUDA is told why."""

    def __init__(self) -> None:
        self._held: tuple[ctypes.CDLL, ctypes.c_int] | None = None
        self._thread = threading.Thread(target=self._retain, name="cuda-context", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives up this hold on the context: it ends unless torch has taken it up. Blocks until it
        is made. Safe to call twice."""
        self._thread.join()
        if self._held is not None:
            driver, device = self._held
            driver.cuDevicePrimaryCtxRelease_v2(device)
            self._held = None

    def _retain(self) -> None:
        try:
            driver = ctypes.CDLL(_DRIVER)
        except OSError:
            return
        device, context = ctypes.c_int(), ctypes.c_void_p()
        # CUDA driver API, "Primary Context Management". 0 is success, in all three.
        failed = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), _DEVICE)
            or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        )
        if not failed:
            self._held = (driver, device)
