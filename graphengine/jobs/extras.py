"""Which optional packages does a job need? One error line names the extra that brings them."""

from __future__ import annotations

import importlib
from types import ModuleType

from graphengine.errors import ConfigError


def require(module: str, *, extra: str = "jobs") -> ModuleType:
    """The module, imported. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise  # it is there and lacks something itself
        raise ConfigError(
            f'{package} is not installed; in the clone, pip install -e ".[{extra}]" brings it'
        ) from error
