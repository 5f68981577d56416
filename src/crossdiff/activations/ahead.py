"""Iterators that make the next items while the last ones are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T], n_items: int) -> Iterator[T]:
    """Yield the items in order, while a thread makes the next `n_items`. An error comes in place of the `n_items` around it."""
    stream = iter(items)

    def make() -> list[T]:
        return list(islice(stream, n_items))

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        following = thread.submit(make)
        while made := following.result():
            following = thread.submit(make)
            yield from made


def after_next(items: Iterable[T]) -> Iterator[T]:
    """Yield each item once the next one is made: work that a device begins when an item is made is never waited for alone."""
    last: list[T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last
