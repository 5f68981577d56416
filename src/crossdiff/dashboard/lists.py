"""The list that a query of the latent table stands for, which its pages, its downloads and its latents' pages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.queries import PAGE_SIZE, Query, select
from crossdiff.dashboard.search import Found, Search
from crossdiff.report.cards import Display

KEPT = 32
"""Lists that are kept, so that going through one does not sort the table again and again."""


class Page(NamedTuple):
    """One page of rows, its number, and the number of all rows and pages."""

    rows: list[dict[str, Any]]
    number: int
    n_rows: int
    n_pages: int


class Place(NamedTuple):
    """Where a latent is in a list, counted from 1, with the latents beside it and the address of its page of the list."""

    number: int
    n_rows: int
    previous: int | None
    following: int | None
    list_path: str
    carried: str


def kept(place: Place | None, display: Display, **changes: bool) -> str:
    """The query part of an address that keeps a place in a list and how examples are shown, with some changes of these."""
    listed, shown = ("" if place is None else place.carried), urlencode(display._replace(**changes).pairs)
    if not listed or not shown:
        return listed or (f"?{shown}" if shown else "")
    return f"{listed}&{shown}"


class Listed(NamedTuple):
    """The latents of a list in its order, and what the search found, if there is one."""

    latents: npt.NDArray[np.int64]
    found: Found | None


class Lists:
    """The lists of all crosscoders; `search` has the search index of each by the address of its pages."""

    def __init__(self, search: Mapping[str, Search]) -> None:
        self._search = search
        self._listed = lru_cache(KEPT)(self._made)

    def of(self, coder: Coder, query: Query) -> Listed:
        """The list of a query. Notes may change at any time, so what they leave out is not kept."""
        latents, found = self._listed(coder, replace(query.of_list, noted=""))
        if query.noted:
            latents = latents[np.isin(latents, list(coder.notes.numbers(query.noted)))]
        return Listed(latents, found)

    def _made(self, coder: Coder, query: Query) -> Listed:
        found = self._search[coder.path].find(query.search) if query.search else None
        return Listed(select(coder.table, query, found)["latent"].to_numpy(), found)

    def page(self, coder: Coder, query: Query) -> Page:
        """The requested page, or the last one if there are fewer."""
        latents = self.of(coder, query).latents
        n_pages = max(1, -(-len(latents) // PAGE_SIZE))
        at = min(query.page, n_pages)
        rows = [coder.row(latent) for latent in latents[(at - 1) * PAGE_SIZE : at * PAGE_SIZE].tolist()]
        return Page([row for row in rows if row is not None], at, len(latents), n_pages)

    def place(self, coder: Coder, query: Query, latent: int) -> Place | None:
        """Where a latent is in the list; None if the list does not have it."""
        latents = self.of(coder, query).latents
        found = np.flatnonzero(latents == latent)
        if not len(found):
            return None
        at = int(found[0])
        return Place(
            at + 1, len(latents),
            int(latents[at - 1]) if at else None,
            int(latents[at + 1]) if at + 1 < len(latents) else None,
            coder.path + query.of_list.address(page=at // PAGE_SIZE + 1) + f"#row-{latent}",
            query.carried,
        )  # fmt: skip
