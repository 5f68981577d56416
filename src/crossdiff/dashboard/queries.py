"""The query of the latent table, kept in the address: search, filters, order, page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.errors import UserError
from crossdiff.latents.ranking import RECONSTRUCTIONS, by_rank

PAGE_SIZE = 50
SHOWN = (
    "latent", "verdict", "delta_norm", "nu_error", *RECONSTRUCTIONS, "decoder_cosine", "frequency", "max_activation",
    "share_template", "rank_sum",
)  # fmt: skip
MAX_FILTERS = 20


@dataclass(frozen=True)
class Filter:
    """`column:low:high` keeps numbers between two ends, of which one may be empty; `column=text` keeps one text."""

    column: str
    low: float | None = None
    high: float | None = None
    equals: str | None = None

    def __str__(self) -> str:
        if self.equals is not None:
            return f"{self.column}={self.equals}"
        return f"{self.column}:{_end(self.low)}:{_end(self.high)}"

    @property
    def words(self) -> str:
        """The filter in words."""
        if self.equals is not None:
            return f"{self.column} is {self.equals.replace('_', ' ')}"
        if self.low is None or self.high is None:
            return f"{self.column} {f'≥ {self.low:g}' if self.high is None else f'≤ {self.high:g}'}"
        return f"{self.column} {self.low:g} to {self.high:g}"

    def expression(self) -> pl.Expr:
        """Which rows are kept. An undefined value is never between the ends."""
        column = pl.col(self.column)
        if self.equals is not None:
            return column.cast(pl.String) == self.equals
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        return column.cast(pl.Float64).is_between(low, high)


@dataclass(frozen=True)
class Query:
    """The query of a table's address."""

    search: str = ""
    sort: str = "rank_sum"
    descending: bool = False
    filters: tuple[Filter, ...] = ()
    page: int = 1
    show: tuple[str, ...] = ()

    def address(self, **changes: Any) -> str:
        """The query part of the address, with changes and without defaults."""
        new = replace(self, **changes)
        pairs = [("q", new.search)] if new.search else []
        if (new.sort, new.descending) != ("rank_sum", False):
            pairs += [("sort", new.sort), ("dir", "desc" if new.descending else "asc")]
        pairs += [("f", str(each)) for each in new.filters] + [("show", column) for column in new.show]
        if new.page > 1:
            pairs.append(("page", str(new.page)))
        return "?" + urlencode(pairs)

    def sorted_by(self, column: str) -> str:
        """The address that sorts by this column, or reverses the order if it already does."""
        turned = not self.descending if column == self.sort else False
        return self.address(sort=column, descending=turned, page=1)

    def without(self, gone: Filter) -> str:
        return self.address(filters=tuple(each for each in self.filters if each != gone), page=1)


@dataclass(frozen=True)
class Page:
    """One page of rows, and the number of all rows and pages."""

    rows: list[dict[str, Any]]
    n_rows: int
    n_pages: int


def parse(pairs: Sequence[tuple[str, str]], schema: Mapping[str, Any]) -> Query:
    """Read the query part of an address."""
    found: dict[str, list[str]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    last = {key: values[-1] for key, values in found.items()}
    filters = [parse_filter(text, schema) for text in found.get("f", []) if text]
    if last.get("column"):
        equals = last.get("equals", "")
        ends = f"={equals}" if equals else f":{last.get('min', '')}:{last.get('max', '')}"
        filters.append(parse_filter(last["column"] + ends, schema))
    if len(filters) > MAX_FILTERS:
        raise UserError(f"the address has {len(filters)} filters; at most {MAX_FILTERS} are allowed, so remove some")
    sort = last.get("sort", "rank_sum")
    show = tuple(dict.fromkeys(found.get("show", [])))
    for column in (sort, *show):
        _check_column(column, schema)
    direction = last.get("dir", "asc")
    if direction not in ("asc", "desc"):
        raise UserError(f"dir is {direction!r}; expected asc or desc")
    page = last.get("page", "1")
    if not (page.isdecimal() and int(page[:9]) >= 1 and len(page) < 10):
        raise UserError(f"page is {page[:40]!r}; expected a whole number from 1")
    search = last.get("q", "").strip()[:200]
    return Query(search, sort, direction == "desc", tuple(dict.fromkeys(filters)), int(page), show)


def parse_filter(text: str, schema: Mapping[str, Any]) -> Filter:
    """Read one filter."""
    column, is_equal, equals = text.partition("=")
    if is_equal and column in schema:
        return Filter(column, equals=equals[:100])
    column, _, ends = text.partition(":")
    _check_column(column, schema)
    low, colon, high = ends.partition(":")
    if not colon or (not low and not high):
        raise UserError(f"the filter {text[:80]!r} has no value; expected column:low:high or column=text")
    if not schema[column].is_numeric():
        raise UserError(f"{column} is not a column of numbers; filter it with {column}=text")
    return Filter(column, _number(low), _number(high))


def _check_column(column: str, schema: Mapping[str, Any]) -> None:
    if column not in schema:
        raise UserError(f"there is no column {column[:60]!r} in the latent table; the list beside Column names them")


def _number(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{text[:40]!r} is not a finite number; write it like 0.25")
    return value


def _end(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def select(table: pl.DataFrame, query: Query, found: npt.NDArray[np.int64] | None) -> pl.DataFrame:
    """The rows of a query in its order, undefined values last. By rank_sum, the default, chat-specific latents come first.
    `found` has the latents that the search found, if any."""
    table = table.filter(*(each.expression() for each in query.filters))
    if found is not None:
        table = table.filter(pl.col("latent").is_in(found.tolist()))
    if (query.sort, query.descending) == ("rank_sum", False):
        return table.sort(pl.col("verdict") != "chat_specific", *by_rank(), nulls_last=True)
    key = pl.col(query.sort)
    if table.schema[query.sort].is_float():
        key = key.fill_nan(None)
    return table.sort(key, "latent", descending=[query.descending, False], nulls_last=True)


def page_of(rows: pl.DataFrame, query: Query) -> Page:
    """The requested page, or the last one if there are fewer."""
    n_pages = max(1, -(-rows.height // PAGE_SIZE))
    at = min(query.page, n_pages) - 1
    return Page(rows.slice(at * PAGE_SIZE, PAGE_SIZE).to_dicts(), rows.height, n_pages)
