"""The query of the latent table, kept in the address: search, filters, order, page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

import polars as pl

from crossdiff.dashboard.search import Found
from crossdiff.errors import UserError
from crossdiff.latents.ranking import RECONSTRUCTIONS, by_rank
from crossdiff.report import wording

PAGE_SIZE = 25
BESIDE = 2
"""Pages on either side of the present one that are linked by their numbers."""
SHOWN = (
    "latent", "verdict", "delta_norm", "nu_error", *RECONSTRUCTIONS, "decoder_cosine", "frequency", "max_activation",
    "share_template", "rank_sum",
)  # fmt: skip
MINOR = ("nu_reconstruction", "decoder_cosine", "max_activation", "share_template", "rank_sum")
"""Columns that a narrow window leaves out, unless they sort the table or were asked for: latents' pages have them."""
MAX_FILTERS = 20
LIST = "list"
"""Field in the address of a latent that was opened from a list, beside the query of the list."""


@dataclass(frozen=True)
class Filter:
    """`column:low:high` keeps numbers between two ends, of which one may be empty; `column=text` keeps one text.

    Several texts of one column are alternatives, see `Query.expressions`.
    """

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
            return f"{self.column} is {wording.words(self.equals)}"
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
class Entry:
    """A new filter as it was typed, if it could not be applied: `problem` says why, and `wrong` names the field to correct."""

    column: str = ""
    low: str = ""
    high: str = ""
    equals: str = ""
    wrong: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Query:
    """The query of a table's address. Without `sort`, the latents of a search come in the order of their matches, and all
    others by rank_sum. `noted` keeps those with a note, see `Notebook.numbers`."""

    search: str = ""
    sort: str = ""
    descending: bool = False
    filters: tuple[Filter, ...] = ()
    page: int = 1
    show: tuple[str, ...] = ()
    noted: str = ""
    entry: Entry = field(default=Entry(), compare=False)

    @property
    def column(self) -> str:
        """The column that the rows are sorted by; "" if they come in the order of their matches."""
        return self.sort or ("" if self.search else "rank_sum")

    @property
    def of_list(self) -> Query:
        """What decides which latents the list has, and in which order."""
        return replace(self, page=1, show=(), entry=Entry())

    def address(self, **changes: Any) -> str:
        """The query part of the address, with changes and without defaults."""
        return "?" + urlencode(self._pairs(**changes))

    @property
    def carried(self) -> str:
        """The query part of the address of a latent that was opened from this list. It is never empty."""
        return "?" + urlencode([*self._pairs(page=1, show=()), (LIST, "1")])

    def _pairs(self, **changes: Any) -> list[tuple[str, str]]:
        new = replace(self, **changes)
        pairs = [("q", new.search)] if new.search else []
        if new.sort:
            pairs += [("sort", new.sort), ("dir", "desc" if new.descending else "asc")]
        pairs += [("f", str(each)) for each in new.filters] + [("show", column) for column in new.show]
        if new.noted:
            pairs.append(("noted", new.noted))
        if new.page > 1:
            pairs.append(("page", str(new.page)))
        return pairs

    def sorted_by(self, column: str) -> str:
        """The address that sorts by this column, or reverses the order if it already does."""
        turned = not self.descending if column == self.column else False
        return self.address(sort=column, descending=turned, page=1)

    def without(self, gone: Filter) -> str:
        return self.address(filters=tuple(each for each in self.filters if each != gone), page=1)

    def toggled(self, column: str, text: str) -> str:
        """The address with `column=text` added to the filters, or removed from them."""
        wanted = Filter(column, equals=text)
        return self.without(wanted) if wanted in self.filters else self.address(filters=(*self.filters, wanted), page=1)

    def has(self, column: str, text: str) -> bool:
        """Whether a filter asks for this text of a column."""
        return Filter(column, equals=text) in self.filters

    def expressions(self) -> list[pl.Expr]:
        """Which rows the filters keep. Of several `column=text` of one column a row has to meet one, of all others each."""
        texts: dict[str, list[pl.Expr]] = {}
        for each in self.filters:
            if each.equals is not None:
                texts.setdefault(each.column, []).append(each.expression())
        ends = [each.expression() for each in self.filters if each.equals is None]
        return [*ends, *map(pl.any_horizontal, texts.values())]


def parse(pairs: Sequence[tuple[str, str]], schema: Mapping[str, Any]) -> Query:
    """Read the query part of an address. What is wrong with a filter that is being typed is in the query's `entry`."""
    found: dict[str, list[str]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    last = {key: values[-1] for key, values in found.items()}
    filters = [parse_filter(text, schema) for text in found.get("f", []) if text]
    entry = _entry(last, schema)
    if entry.column and not entry.problem:
        ends = f"={entry.equals}" if entry.equals else f":{entry.low}:{entry.high}"
        filters.append(parse_filter(entry.column + ends, schema))
        entry = Entry()
    if len(filters) > MAX_FILTERS:
        raise UserError(f"the address has {len(filters)} filters; at most {MAX_FILTERS} are allowed, so remove some")
    direction = last.get("dir", "asc")
    if direction not in ("asc", "desc"):
        raise UserError(f"dir is {direction!r}; expected asc or desc")
    sort = last.get("sort") or ("rank_sum" if direction == "desc" else "")
    show = tuple(dict.fromkeys(found.get("show", [])))
    for column in (*filter(None, [sort]), *show):
        _check_column(column, schema)
    page = last.get("page", "1")
    if not (page.isdecimal() and int(page[:9]) >= 1 and len(page) < 10):
        raise UserError(f"page is {page[:40]!r}; expected a whole number from 1")
    search = last.get("q", "").strip()[:200]
    if (sort, direction, search) == ("rank_sum", "asc", ""):
        sort = ""  # as without it
    return Query(search, sort, direction == "desc", tuple(dict.fromkeys(filters)), int(page), show, parse_noted(last), entry)


def parse_noted(last: Mapping[str, str]) -> str:
    """Which notes a list is about: `starred`, `any`, `list:NAME`, or "" for all rows."""
    noted = last.get("noted", "")
    if noted not in ("", "starred", "any") and not noted.startswith("list:"):
        raise UserError(f"noted is {noted[:40]!r}; expected starred, any, or list: followed by the name of a list")
    return noted


def _entry(last: Mapping[str, str], schema: Mapping[str, Any]) -> Entry:
    """The fields of the new filter, checked one by one."""
    typed = {name: last.get(key, "").strip()[:100] for name, key in (
        ("column", "column"), ("low", "min"), ("high", "max"), ("equals", "equals"),
    )}  # fmt: skip
    column = typed["column"]

    def wrong(name: str, problem: str) -> Entry:
        return Entry(**typed, wrong=name, problem=problem)

    if not any(typed.values()):
        return Entry()
    if column not in schema:
        return wrong("column", f"there is no column {column[:60]!r}" if column else "choose the column of the new filter")
    if typed["equals"]:
        return Entry(**typed)
    if not typed["low"] and not typed["high"]:
        return wrong("low", f"give the smallest or largest {column}, or the text that it is equal to")
    if not schema[column].is_numeric():
        return wrong("equals", f"{column} is not a column of numbers; give the text that it is equal to")
    for name in ("low", "high"):
        try:
            _number(typed[name])
        except UserError as error:
            return wrong(name, str(error))
    return Entry(**typed)


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


def select(table: pl.DataFrame, query: Query, found: Found | None) -> pl.DataFrame:
    """The rows of a query in its order, undefined values last. By rank_sum, the default, chat-specific latents come first; the
    latents of a search, `found`, come in the order of their matches, and equal ones by rank_sum."""
    rows = table.lazy().with_row_index("row").filter(*query.expressions())
    first: list[pl.Expr] = []
    if found is not None:
        matches = pl.LazyFrame({"latent": found.latents, "match": found.weights}).cast({"latent": table.schema["latent"]})
        rows = rows.join(matches, on="latent")
        first = [] if query.sort else [-pl.col("match")]
    if query.column in ("", "rank_sum") and not query.descending:
        rows = rows.sort(*first, pl.col("verdict") != "chat_specific", *by_rank(), nulls_last=True)
    else:
        key = pl.col(query.sort)
        if table.schema[query.sort].is_float():
            key = key.fill_nan(None)
        rows = rows.sort(key, "latent", descending=[query.descending, False], nulls_last=True)
    return table[rows.select("row").collect()["row"]]


def page_numbers(at: int, n_pages: int) -> list[int | None]:
    """The pages that are linked by their numbers: the first, the last and those beside the present one; None is a gap."""
    shown = sorted({1, n_pages, *range(max(1, at - BESIDE), min(n_pages, at + BESIDE) + 1)})
    found: list[int | None] = []
    for page in shown:
        if found and page - (found[-1] or 0) > 1:
            found.append(None)
        found.append(page)
    return found
