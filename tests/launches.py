"""Which kernels in CUDA C++ does an engine launch?"""

from __future__ import annotations

from typing import Any

import pytest

from graphengine.kernels import ahead


def record_launches(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Their names, from now on, captured or not; a rehearsal launches none."""
    from graphengine.kernels.nvrtc import Kernel

    names: set[str] = set()
    original = Kernel.launch

    def launch(self: Kernel, params: Any, **options: Any) -> None:
        if not ahead.is_rehearsal():
            names.add(self._name)
        original(self, params, **options)

    monkeypatch.setattr(Kernel, "launch", launch)
    return names
