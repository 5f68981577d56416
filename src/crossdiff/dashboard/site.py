"""Everything that the dashboard's requests share: runs, search indexes, models, templates and threads."""

from __future__ import annotations

import gzip
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from functools import lru_cache, wraps
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel

from crossdiff.dashboard import charts, pages
from crossdiff.dashboard.catalogue import Catalogue, Coder
from crossdiff.dashboard.kept import Kept
from crossdiff.dashboard.lists import Lists
from crossdiff.dashboard.live import WAITING, Live
from crossdiff.dashboard.search import Search
from crossdiff.files import fingerprint

ROOT = "/run/{run}/{name}"
"""Address of a crosscoder's pages."""
DATA = "data"
"""Tag of the addresses that are for programs."""
EDITION = "crossdiff-edition"
"""Header by which a page says which results it shows when it asks for a part."""
CACHED_POINTS = 8
NOTICE_HOURS = 1
"""For how long a notice of replaced results stands on pages without JavaScript; with it, `notices.js` decides."""
PAGES_AT_ONCE = 3
"""Threads for pages; more would only compete for the interpreter."""
WAITING_AT_ONCE = 2 * WAITING
"""Threads for pages that wait for the models, or are turned away because too many wait."""

Page = Callable[..., Response]


class Notice(NamedTuple):
    """Results that were replaced: which ones, when (milliseconds since 1970), whether that is recent, and in words."""

    key: str
    time: int
    is_recent: bool
    text: str


class Site:
    """What all requests share that are answered from one set of results.

    Attributes:
        edition: names this set of results.
        kept: live prompts with their results.
        replaced: runs whose results were replaced since the server started, with the time of each.
        in_turn: decorator for pages from memory and disk.
        waits: decorator for pages that run the models.
    """

    def __init__(self, catalogue: Catalogue, live: Live, cache: Path, replaced: Mapping[str, datetime] | None = None) -> None:
        self.catalogue = catalogue
        self.live = live
        self.cache = cache
        self.replaced = dict(replaced or {})
        self.edition = fingerprint([edition.digest for edition in catalogue.editions.values()])
        self.templates = pages.templates()
        self.in_turn = own_threads(PAGES_AT_ONCE)
        self.waits = own_threads(WAITING_AT_ONCE)
        self.kept = Kept(cache / "live")
        self.search = {key: Search(coder, cache / "search") for key, coder in catalogue.coders.items()}
        self.lists = Lists({catalogue.coders[key].path: search for key, search in self.search.items()})
        self.points: Callable[[tuple[str, str], str], bytes] = lru_cache(CACHED_POINTS)(self._points)
        self.home: Callable[[], dict[str, Any]] = lru_cache(1)(lambda: pages.home(catalogue))
        self.coder_page: Callable[[Coder], dict[str, Any]] = lru_cache(None)(pages.coder_page)

    def renewed(self) -> Site | None:
        """The site of the results that have replaced some of these; None if nothing was replaced."""
        if self.catalogue.is_current:
            return None
        new = Catalogue(self.catalogue.directories)
        changed = {slug: edition for slug, edition in new.editions.items() if edition != self.catalogue.editions[slug]}
        times = {slug: datetime.fromtimestamp(edition.written) for slug, edition in changed.items()}
        return Site(new, self.live, self.cache, self.replaced | times)

    def coder(self, run: str, name: str) -> Coder:
        """The crosscoder of an address, looked up and never used as a path."""
        found = self.catalogue.coders.get((run, name))
        if found is None:
            report = self.catalogue.reports.get(run)
            if report is not None and name in report.not_analysed:
                again = f"Run `crossdiff analyze {report.directory}`, then load this page again."
                raise HTTPException(404, f"{name} has been trained, but has no results yet. {again}")
            raise HTTPException(404, "This dashboard has no such run or crosscoder. The overview has links to all of them.")
        return found

    def row(self, coder: Coder, latent: int) -> dict[str, Any]:
        """The latent of an address."""
        row = coder.row(latent)
        if row is None:
            raise HTTPException(404, f"There is no latent {latent}: {coder.title} has {coder.table.height:,}.")
        return row

    def page(self, template: str, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> HTMLResponse:
        """A page from a template."""
        own = values.get("coder") or values.get("concepts") or values.get("look")
        notices = self._notices(None if own is None else own.run)
        shared = {"live": self.live.enabled, "edition": self.edition, "notices": notices}
        text = self.templates.get_template(template).render(**shared, **values)
        return HTMLResponse(text, status, headers)

    def problem(self, request: Request, status: int, message: str) -> Response:
        """What went wrong, as a page or as a part of one; or as JSON where that was asked for."""
        if request.url.path.endswith(".json") and EDITION not in request.headers:  # pages of the dashboard send it
            return JSONResponse({"error": message}, status)
        # The page tells htmx to swap errors in as well, so that the message appears where the error happened.
        template = "problem.html.j2" if is_partial(request) else "error.html.j2"
        return self.page(template, status, phrase=HTTPStatus(status).phrase, message=message)

    def _notices(self, run: str | None) -> list[Notice]:
        """Which results were replaced, of those on the pages of a run, or of all."""
        return [
            Notice(
                f"{slug} {self.catalogue.editions[slug].digest}",
                int(time.timestamp() * 1000),
                datetime.now() - time < timedelta(hours=NOTICE_HOURS),
                f"The results of {'this run' if run or len(self.catalogue.reports) == 1 else slug} were replaced at "
                f"{time:%H:%M} on {time.day} {time:%B %Y}. This page shows the new ones.",
            )
            for slug, time in self.replaced.items()
            if run in (None, slug)
        ]

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


def json_body(model: type[BaseModel], kind: str = "application/json") -> dict[str, Any]:
    """What the description of an address says of the body of its requests, which it reads by itself."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": model.model_json_schema()}}}}


def is_partial(request: Request) -> bool:
    """Whether htmx requests a part of the page."""
    return request.headers.get("hx-request") == "true" and "hx-history-restore-request" not in request.headers
