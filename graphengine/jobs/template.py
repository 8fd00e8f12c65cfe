"""How does a row become a prompt? A Jinja template in a sandbox, with bounded output.

The template is the user's, rows are not: a row is data for it and never a template itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from graphengine.errors import ConfigError, RequestError

MAX_CHARS = 8 << 20


class RowTemplate:
    """`columns`: the names that the template looks up in a row."""

    def __init__(self, text: str) -> None:
        """Raises ConfigError for a template that is none."""
        environment = _Environment(undefined=StrictUndefined, autoescape=False)
        try:
            self._template = environment.from_string(text)
            # A column may be called as one of Jinja's globals, which are no names to look up.
            bare = _Environment(undefined=StrictUndefined)
            bare.globals.clear()
            self.columns = frozenset(meta.find_undeclared_variables(bare.parse(text)))
        except (TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            # Jinja makes a Python program of it, whose compiler has limits of its own.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"--template cannot be used: {reason}; see Jinja's manual") from error

    def render(self, row: Mapping[str, object]) -> str:
        """Raises RequestError where the row does not fit the template, whatever the row holds."""
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(row):
                num_chars += len(part)
                if num_chars > MAX_CHARS:
                    raise RequestError(f"the template gives more than {MAX_CHARS:,} characters")
                parts.append(part)
        except RequestError:
            raise
        except Exception as error:  # a row can make any expression fail in its own way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"the template cannot take this row: {reason}") from error
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """Refuses the operators that make something huge at once of a number in a row."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise RequestError("the template uses **, which is not allowed")
        for text, times in ((left, right), (right, left)):
            is_repeated = isinstance(text, str | bytes | list | tuple) and isinstance(times, int)
            if is_repeated and len(text) * times > MAX_CHARS:
                raise RequestError(f"the template gives more than {MAX_CHARS:,} characters")
        return super().call_binop(context, operator, left, right)
