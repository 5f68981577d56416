"""Chat templates of others, rendered by transformers within limits of time and size.

A chat template is a program. transformers runs it in Jinja's sandbox, which keeps it from files and from the interpreter, but
lets it run for hours or fill the memory. Here the same sandbox counts what the template does: every turn of a loop, every call,
and the size of every result before it is made. A template that exceeds the limits is refused. There is no other thread and no
signal, so a rendering is the same each time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from crossdiff.errors import UserError
from crossdiff.text.template_sizes import (
    LARGEST,
    METHODS,
    largest_number,
    size_of,
    size_of_filter,
    size_of_format,
    size_of_operation,
)

SECONDS = 10.0
"""How long one rendering may take."""
BASE, PER_CHARACTER = 20_000_000, 500
"""Characters that the steps of one rendering may make in total: a number, and more for each character of the conversation."""
FOLDED = 100_000
"""Size of a constant that Jinja may compute when it compiles a template."""


class TemplateLimit(UserError):
    """A template that takes too long or makes too much."""


class _Meter:
    """Counts the steps of a rendering, each with the size of what it makes."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.limit, self.seconds = limit, seconds
        self._made, self._end = 0, time.monotonic() + seconds

    def charge(self, size: int) -> None:
        self._made += size
        if self._made > self.limit:
            raise TemplateLimit(f"makes more than {self.limit:,} characters")
        if time.monotonic() > self._end:
            raise TemplateLimit(f"did not finish within {self.seconds:g} s")


class _Running(threading.local):
    meter: _Meter | None = None


_RUNNING = _Running()
_LOCK = threading.Lock()


def _limit() -> int:
    return FOLDED if _RUNNING.meter is None else _RUNNING.meter.limit


def _charge(size: int) -> None:
    if _RUNNING.meter is not None:
        _RUNNING.meter.charge(size)
    elif size > FOLDED:
        raise TemplateLimit(f"makes more than {FOLDED:,} characters in a constant")


def _charge_result(value: Any) -> Any:
    _charge(size_of(value, _limit()))
    return value


class _Counted(NodeTransformer):
    """Puts a count into every loop and macro, and around every concatenation and every list that is built."""

    def _with_tick(self, node: Any) -> Any:
        self.generic_visit(node)
        size = sum(len(text.data) for part in node.body for text in part.find_all(nodes.TemplateData))
        size += sum(len(part.data) for part in node.body if isinstance(part, nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("tick", [nodes.Const(size + 1)])).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _with_tick

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", node.nodes)

    def _collected(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        is_target = isinstance(node, nodes.Tuple) and node.ctx != "load"
        is_constant = all(isinstance(child, nodes.Const | nodes.Pair) for child in node.iter_child_nodes()) and all(
            isinstance(child, nodes.Const | nodes.Pair) for part in node.iter_child_nodes() for child in part.iter_child_nodes()
        )
        return node if is_target or is_constant else _call("collected", [node])

    visit_List = visit_Tuple = visit_Dict = _collected


def _call(method: str, arguments: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with counts. Its extensions, filters and globals are those of transformers."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, model: Any) -> None:
        super().__init__(
            trim_blocks=model.trim_blocks, lstrip_blocks=model.lstrip_blocks, finalize=_charge_result,
            extensions=[type(extension) for extension in model.extensions.values()],
        )  # fmt: skip
        self.filters.update({name: _counted_filter(name, function) for name, function in model.filters.items()})
        self.globals.update(model.globals)
        self.globals.pop("lipsum", None)  # makes any number of pages of nonsense

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _Counted().visit(super()._parse(source, name, filename)).set_environment(self)
        return parsed

    def tick(self, size: int) -> None:
        """Count a turn of a loop, or a call of a macro, with the size of the text in it."""
        _charge(size)

    def concatenated(self, *parts: Any) -> str:
        """The operator `~`."""
        _charge(size_of(list(parts), _limit()))
        return str_join(parts)

    def collected(self, items: Any) -> Any:
        """A list, tuple or dictionary that the template builds."""
        return _charge_result(items)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _charge(size_of_operation(operator, left, right, _limit()))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        @wraps(formatted)
        def counted(*arguments: Any, **named: Any) -> str:
            _charge(size_of_format(str(value.__self__), [*arguments, *named.values()], _limit()))
            result: str = formatted(*arguments, **named)
            return result

        return counted

    def call(self, context: Context, function: Any, *arguments: Any, **named: Any) -> Any:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if owner is self:
            return function(*arguments)
        if isinstance(owner, str | bytes) and name in METHODS:
            if name == "join" and arguments:
                arguments = (list(arguments[0]), *arguments[1:])  # a generator could be counted only once
            _charge(METHODS[name](owner, [*arguments, *named.values()], _limit()))
        elif isinstance(owner, int | float) and largest_number([*arguments, *named.values()]) > LARGEST:
            raise TemplateLimit(f"calls {name} with a number above {LARGEST:,}")
        return _charge_result(super().call(context, function, *arguments, **named))


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = int(hasattr(function, "jinja_pass_arg"))  # the context comes before the value

    @wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        value, rest = arguments[first], [*arguments[first + 1 :], *named.values()]
        if largest_number(rest) > LARGEST and name not in ("default", "d", "replace", "format", "map"):
            raise TemplateLimit(f"calls the filter {name} with a number above {LARGEST:,}")
        if name == "join" and not isinstance(value, str | list | tuple | dict):
            value = list(value)
        _charge(size_of_filter(name, value, rest, _limit()))
        return _charge_result(function(*arguments[:first], value, *arguments[first + 1 :], **named))

    return counted


@lru_cache(maxsize=16)
def _compiled(source: str, compile_plain: Callable[[str], Template]) -> Template:
    return _Environment(compile_plain("").environment).from_string(source)


@contextmanager
def limited(name: str, length: int, seconds: float = SECONDS) -> Iterator[None]:
    """Within the block, transformers renders chat templates within limits.

    Args:
        name: whose template it is, for messages.
        length: number of characters of the conversation.

    Raises:
        TemplateLimit: a template takes longer or makes more than it may.
    """
    from transformers.utils import chat_template_utils

    utils: Any = chat_template_utils

    def compile_here(source: str) -> Any:
        # Another thread may call transformers on its own.
        return compile_plain(source) if _RUNNING.meter is None else _compiled(source, compile_plain)

    with _LOCK:
        compile_plain = utils._compile_jinja_template
        utils._compile_jinja_template = compile_here
        _RUNNING.meter = _Meter(BASE + PER_CHARACTER * length, seconds)
        try:
            yield
        except (TemplateLimit, MemoryError, RecursionError) as error:
            reason = str(error) if isinstance(error, TemplateLimit) else f"fails with a {type(error).__name__}"
            raise TemplateLimit(
                f"the chat template of {name} {reason}, for a conversation of {length:,} characters; no real template does "
                "so: use another model, or repair its chat_template"
            ) from None
        finally:
            _RUNNING.meter = None
            utils._compile_jinja_template = compile_plain
