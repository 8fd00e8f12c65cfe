"""How far may a Jinja template go? A sandbox with bounds on its loops and on what it makes.

Templates come from users and checkpoints, and what they are given from anywhere. A list that holds
one long text many times can still be written out at a cost of its own (`[text] * n | string`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_eval_context
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from graphengine.errors import RequestError

MAX_CHARS = 8 << 20
# Rounds of loops and calls of macros. Some chat templates take a round for each two messages.
MAX_STEPS = 2 << 20
_LARGEST_POWER_BITS = 4096
# Methods and filters that make something as wide as a number says.
_PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "tojson"}
_PADDING |= {"batch", "slice"}
_PERCENT = re.compile(r"%%|%(?:\([^)]*\))?([^a-zA-Z%]*)")
_BRACES = re.compile(r"\{[^{}:]*:([^}]*)")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Raises RequestError for what would be larger, or go on for longer, than any prompt."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(**options)
        self._num_steps = 0
        self.filters |= filters
        self.filters = {name: _bounded(name, made) for name, made in self.filters.items()}
        del self.globals["lipsum"]  # as long as one likes

    def render(self, template: Template, values: Mapping[str, object]) -> str:
        """Of one thread at a time. Raises whatever a template can."""
        self._num_steps = 0
        parts: list[str] = []
        num_chars = 0
        for part in template.generate(values):
            num_chars += len(part)
            _check_chars(num_chars)
            parts.append(part)
        return "".join(parts)

    def step(self) -> None:
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise RequestError(f"the template goes on for more than {MAX_STEPS:,} steps")

    def concatenate(self, *values: Any) -> str:
        texts = [str(value) for value in values]
        _check_chars(sum(map(len, texts)))
        return str_join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _LARGEST_POWER_BITS:
                raise RequestError("the template uses ** for a number that is too large")
        elif operator == "%" and isinstance(left, str):
            _check_format(_PERCENT, left, right if isinstance(right, tuple) else (right,))
        elif operator == "+" and isinstance(left, str | list) and isinstance(right, str | list):
            _check_chars(len(left) + len(right))
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
                    _check_chars(len(text) * times)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox has wrapped str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            pattern = _BRACES if method.__name__ in ("format", "format_map") else None
            _check_growth(method.__name__, (owner, *args, *kwargs.values()), pattern)
        elif isinstance(__obj, Macro):
            __self.step()
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bounds().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree


class _Bounds(NodeTransformer):
    """Counts the rounds of each loop, and lets the environment do the work of `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        # With its brackets: a Call would be checked by the sandbox, at twenty times the cost.
        step = nodes.EnvironmentAttribute("step()")
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        name = nodes.EnvironmentAttribute("concatenate")
        return nodes.Call(name, node.nodes, [], None, None, lineno=node.lineno)


def _bounded(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `made`, which its name may make a large one."""

    @functools.wraps(made)  # with what Jinja passes to it first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if hasattr(made, "jinja_pass_arg") else args
        pattern = _PERCENT if name == "format" else None
        _check_growth(name, (*given, *kwargs.values()), pattern)
        return _checked(made(*args, **kwargs))

    return bounded


def _check_growth(name: str, values: tuple[Any, ...], format: re.Pattern[str] | None) -> None:
    """values: what a method or filter is given, what it is of first."""
    texts = [value for value in values if isinstance(value, str)]
    if format is not None and texts:
        _check_format(format, texts[0], values[1:])
    elif name in _PADDING:
        num_lines = 1 + sum(texts[0].count(end) for end in "\n\t") if texts else 1
        _check_chars(num_lines * _largest(values))
    elif name == "replace" and len(texts) == 3:
        _check_chars(texts[0].count(texts[1]) * len(texts[2]))
    elif name == "join" and len(values) > 1:
        for items, separator in (values[:2], values[1::-1]):
            if isinstance(items, list | tuple | str) and isinstance(separator, str):
                _check_chars(len(items) * len(separator))


def _check_format(format: re.Pattern[str], text: str, values: tuple[Any, ...]) -> None:
    """Of the widths that a format string asks for, those given as values too."""
    asked = " ".join(format.findall(text))
    num_given = asked.count("*") + asked.count("{")
    widths = [int(digits[:9]) for digits in re.findall(r"\d+", asked)]
    _check_chars(sum(widths) + num_given * _largest(values))


def _largest(values: tuple[Any, ...]) -> int:
    return max((value for value in values if isinstance(value, int)), default=0)


def _checked(value: Any) -> Any:
    if isinstance(value, str):
        _check_chars(len(value))
    return value


def _check_chars(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise RequestError(f"the template gives more than {MAX_CHARS:,} characters")


class ChatTemplate:
    """A checkpoint's chat template with the extensions, filters and names of transformers'
    utils/chat_template_utils.py."""

    def __init__(self, text: str) -> None:
        """Raises whatever Jinja and Python have against the template."""
        self._environment = BoundedEnvironment(
            filters={"tojson": _tojson},
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
        )
        self._environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        self._template = self._environment.from_string(text)

    def render(self, values: Mapping[str, object]) -> str:
        """Raises whatever a template can."""
        return self._environment.render(self._template, values)


class _Generation(Extension):
    """`{% generation %}`: marks what a model said, which matters to training alone."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _said(self, context: EvalContext, caller: Macro) -> str:
        text: str = caller()
        return text


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
