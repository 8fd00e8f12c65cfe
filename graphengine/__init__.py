"""graphengine: static-shape LLM inference for offline work.

Names are imported at first use: `import graphengine` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from graphengine.version import __version__

if TYPE_CHECKING:
    from graphengine.config import EngineConfig
    from graphengine.engine import LLM
    from graphengine.errors import GraphEngineError
    from graphengine.metrics import EngineStats
    from graphengine.request import (
        CompletionOutput,
        FinishReason,
        Request,
        RequestOutput,
        SamplingParams,
    )

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "GraphEngineError",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "LLM": "engine",
    "CompletionOutput": "request",
    "EngineConfig": "config",
    "EngineStats": "metrics",
    "FinishReason": "request",
    "GraphEngineError": "errors",
    "Request": "request",
    "RequestOutput": "request",
    "SamplingParams": "request",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
