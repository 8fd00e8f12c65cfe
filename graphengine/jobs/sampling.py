"""What may a row say of its own sampling? Overrides of the job's parameters, checked."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson

from graphengine.errors import RequestError
from graphengine.request import SamplingParams, brief

_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


def overrides(value: object, column: str, default: SamplingParams) -> dict[str, Any]:
    """The parameters that a row sets in `column`: an object, its JSON as a string, or null for
    none. A null parameter is not set. Raises RequestError for one that there is not, or is wrong.
    """
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise RequestError(f"{column} is broken JSON: {error}; give an object") from error
    if not isinstance(value, dict):
        raise RequestError(f"{column} is {brief(value)}; give an object of sampling parameters")
    given = {name: item for name, item in value.items() if item is not None}
    for name in given:
        if name not in _NAMES:
            raise RequestError(f"{column} sets {name!r}; choose from {', '.join(_NAMES)}")
    return checked(given, default)


def checked(given: dict[str, Any], default: SamplingParams) -> dict[str, Any]:
    """`given`, after a look at what it makes of `default`. Raises RequestError."""
    dataclasses.replace(default, **given)
    return given
