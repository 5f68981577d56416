"""How large the results of a template's operations will be, so that they can be refused before they are made.

The size of a value is its number of characters and items, through everything that it contains. What a template can build has
the size that it would have as text: a list that holds another one twice counts it twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, KeysView, Mapping, Sequence, ValuesView
from typing import Any

from jinja2.utils import Namespace

LARGEST = 1_000_000
"""The largest number that a filter or a method of a number may be given."""
HUGE = 10**18
SERIES = (list, tuple, KeysView, ValuesView, ItemsView)
SPECIFIER = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d+)?(?:\.(\*|\d+))?")
"""A place of `%` formatting with its width and precision."""
FIELD = re.compile(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}")
"""A place of `str.format`, which may name another one in its specification."""


def size_of(value: Any, limit: int) -> int:
    """The size of a value; anything above `limit` if it is larger than that."""
    total, left = 0, [value]
    while left and total <= limit:
        item = left.pop()
        if isinstance(item, str | bytes):
            total += len(item) + 1
        elif isinstance(item, int):
            total += 1 + item.bit_length() // 3  # its digits
        else:
            total += 1
            if isinstance(item, Namespace):
                item = object.__getattribute__(item, "_Namespace__attrs")
            if isinstance(item, Mapping):
                left += [*item.keys(), *item.values()]
            elif isinstance(item, SERIES):
                left += item
    return total


def size_of_operation(operator: str, left: Any, right: Any, limit: int) -> int:
    """The size of `left operator right`."""
    sizes = size_of(left, limit), size_of(right, limit)
    if operator == "%" and isinstance(left, str | bytes):
        return _size_of_printf(str(left), right, limit)
    if operator == "*":
        for sequence, times, size in ((left, right, sizes[0]), (right, left, sizes[1])):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
                return size * max(times, 1)
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return sizes[0] * max(right, 1)
    return sum(sizes)


def _size_of_printf(text: str, values: Any, limit: int) -> int:
    places = SPECIFIER.findall(text)
    widths = sum(_number(part, values) for place in places for part in place)
    return len(text) + widths + len(places) * size_of(values, limit)


def _number(digits: str, values: Any) -> int:
    """A width; that of `*` is among the values."""
    if digits == "*":
        given = values if isinstance(values, tuple) else (values,)
        return max((abs(value) for value in given if isinstance(value, int)), default=0)
    return 0 if not digits else int(digits) if len(digits) < 18 else HUGE


def size_of_format(text: str, values: Any, limit: int) -> int:
    """The size of `text.format(values)`."""
    fields = FIELD.findall(text)
    widths = sum(_number(digits, ()) for field in fields for digits in re.findall(r"\d+", field.partition(":")[2]))
    named = sum(largest_number(values) for field in fields if "{" in field[1:])
    return len(text) + widths + named + len(fields) * size_of(values, limit)


def largest_number(values: Any) -> int:
    """The largest absolute value of the whole numbers among some arguments, which may be in a mapping."""
    left = [*values.values()] if isinstance(values, Mapping) else list(values)
    numbers = [abs(value) for value in left if isinstance(value, int)]
    nested = [largest_number(value) for value in left if isinstance(value, Mapping | list | tuple)]
    return max([*numbers, *nested], default=0)


def _replaced(text: Any, arguments: Sequence[Any], limit: int) -> int:
    n_characters: int = len(text)
    if len(arguments) < 2 or not isinstance(arguments[0], str | bytes):
        return n_characters
    return n_characters + int(text.count(arguments[0])) * size_of(arguments[1], limit)


def _joined(text: Any, arguments: Sequence[Any], limit: int) -> int:
    items = arguments[0] if arguments and isinstance(arguments[0], list | tuple | Mapping) else ()
    return size_of(items, limit) + len(items) * len(text)


def _widened(text: Any, arguments: Sequence[Any], limit: int) -> int:
    return len(text) + largest_number(arguments)


def _tabs(text: Any, arguments: Sequence[Any], limit: int) -> int:
    return len(text) + max(largest_number(arguments), 8) * int(text.count("\t" if isinstance(text, str) else b"\t"))


def _translated(text: Any, arguments: Sequence[Any], limit: int) -> int:
    return len(text) * max((size_of(value, limit) for value in arguments[0].values()), default=1) if arguments else 0


METHODS: dict[str, Callable[[Any, Sequence[Any], int], int]] = {
    "replace": _replaced, "join": _joined, "center": _widened, "ljust": _widened, "rjust": _widened, "zfill": _widened,
    "expandtabs": _tabs, "translate": _translated,
}  # fmt: skip
"""The methods of text whose result may be much larger than the text and the arguments."""


def size_of_filter(name: str, value: Any, arguments: Sequence[Any], limit: int) -> int:
    """The size of `value | name(arguments)`, for the filters whose result may be much larger than both."""
    if name == "format":
        return _size_of_printf(str(value), tuple(arguments), limit)
    if name == "replace" and len(arguments) >= 2:
        return _replaced(str(value), [str(argument) for argument in arguments[:2]], limit)
    sizes = size_of(value, limit), size_of(list(arguments), limit) + largest_number(arguments)
    if name in ("indent", "join", "sum", "tojson", "wordwrap"):
        pieces = {"indent": str(value).count("\n") + 1, "wordwrap": len(str(value))}.get(name, sizes[0])
        if name == "join":
            pieces = len(value) if isinstance(value, str | list | tuple | Mapping) else pieces
        return sizes[0] + pieces * (sizes[1] if arguments else 1)
    return sizes[0] + sizes[1]
