"""Would a test notice? Puts one fault into a function, so that a test can show that others fail."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def mutated(function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """`function` with one piece of its source replaced. Fails if the piece is not there once, so
    that a mutation test cannot outlive the code it mutates."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__} does not hold {old!r} once"
    namespace = dict(function.__globals__)
    code = f"from __future__ import annotations\n{source.replace(old, new)}"
    exec(compile(code, f"<mutated {function.__qualname__}>", "exec"), namespace)
    result: Callable[..., Any] = namespace[function.__name__]
    return result
