"""How does a row become a prompt? A Jinja template in a sandbox, with bounded output.

The template is the user's, rows are not: a row is data for it and never a template itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import StrictUndefined, TemplateError, meta

from graphengine.errors import ConfigError, RequestError
from graphengine.templates import BoundedEnvironment


class RowTemplate:
    """`columns`: the names that the template looks up in a row."""

    def __init__(self, text: str) -> None:
        """Raises ConfigError for a template that is none."""
        self._environment = BoundedEnvironment(filters={}, undefined=StrictUndefined)
        try:
            self._template = self._environment.from_string(text)
            # A column may be called as one of Jinja's globals, which are no names to look up.
            bare = BoundedEnvironment(filters={}, undefined=StrictUndefined)
            bare.globals.clear()
            self.columns = frozenset(meta.find_undeclared_variables(bare.parse(text)))
        except (TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            # Jinja makes a Python program of it, whose compiler has limits of its own.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"--template cannot be used: {reason}; see Jinja's manual") from error

    def render(self, row: Mapping[str, object]) -> str:
        """Raises RequestError where the row does not fit the template, whatever the row holds."""
        try:
            return self._environment.render(self._template, row)
        except RequestError:
            raise
        except Exception as error:  # a row can make any expression fail in its own way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"the template cannot take this row: {reason}") from error
