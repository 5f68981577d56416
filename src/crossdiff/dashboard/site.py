"""Everything that the dashboard's requests share: runs, search indexes, models, templates and threads."""

from __future__ import annotations

import gzip
from collections.abc import Awaitable, Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import HTTPException, Request
from fastapi.responses import HTMLResponse, Response

from crossdiff.dashboard import charts, pages
from crossdiff.dashboard.catalogue import Catalogue, Coder
from crossdiff.dashboard.live import WAITING, Live
from crossdiff.dashboard.search import Search

ROOT = "/run/{run}/{name}"
"""Address of a crosscoder's pages."""
CACHED_POINTS = 8
PAGES_AT_ONCE = 3
"""Threads for pages; more would only compete for the interpreter."""
WAITING_AT_ONCE = 2 * WAITING
"""Threads for pages that wait for the models, or are turned away because too many wait."""

Page = Callable[..., Response]


class Site:
    """What all requests share.

    Attributes:
        in_turn: decorator for pages from memory and disk.
        waits: decorator for pages that run the models.
    """

    def __init__(self, catalogue: Catalogue, live: Live, cache: Path) -> None:
        self.catalogue = catalogue
        self.live = live
        self.templates = pages.templates()
        self.in_turn = own_threads(PAGES_AT_ONCE)
        self.waits = own_threads(WAITING_AT_ONCE)
        self.search = {key: Search(coder, cache) for key, coder in catalogue.coders.items()}
        self.points: Callable[[tuple[str, str], str], bytes] = lru_cache(CACHED_POINTS)(self._points)
        # These do not change while the server runs.
        self.home: Callable[[], dict[str, Any]] = lru_cache(1)(lambda: pages.home(catalogue))
        self.coder_page: Callable[[Coder], dict[str, Any]] = lru_cache(None)(pages.coder_page)

    def coder(self, run: str, name: str) -> Coder:
        """The crosscoder of an address, looked up and never used as a path."""
        found = self.catalogue.coders.get((run, name))
        if found is None:
            raise HTTPException(404, "This dashboard has no such run or crosscoder.")
        return found

    def row(self, coder: Coder, latent: int) -> dict[str, Any]:
        """The latent of an address."""
        row = coder.row(latent)
        if row is None:
            raise HTTPException(404, f"There is no latent {latent}: {coder.title} has {coder.table.height:,}.")
        return row

    def page(self, template: str, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> HTMLResponse:
        """A page from a template."""
        text = self.templates.get_template(template).render(live=self.live.enabled, **values)
        return HTMLResponse(text, status, headers)

    def _points(self, key: tuple[str, str], colour: str) -> bytes:
        return gzip.compress(charts.points(self.catalogue.coders[key], colour).encode(), 5)


def own_threads(n: int) -> Callable[[Page], Callable[..., Awaitable[Response]]]:
    """A decorator for pages that share `n` threads, so that static files and errors never wait for them."""
    limiter = CapacityLimiter(n)

    def decorate(page: Page) -> Callable[..., Awaitable[Response]]:
        @wraps(page)
        async def made(**values: Any) -> Response:
            return await run_sync(lambda: page(**values), limiter=limiter)

        return made

    return decorate


def is_partial(request: Request) -> bool:
    """Whether htmx requests a part of the page."""
    return request.headers.get("hx-request") == "true" and "hx-history-restore-request" not in request.headers
