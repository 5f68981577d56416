"""The results that requests are answered from: those that are complete when a request arrives, until its answer is sent."""

from __future__ import annotations

from collections.abc import Callable

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from crossdiff.dashboard.editions import BeingReplaced
from crossdiff.dashboard.site import EDITION, Site
from crossdiff.errors import UserError

SAME_IN_ALL = ("/static/", "/report.css", "/popover.js")
"""Paths of files that do not depend on a run."""
REPLACED = "The results were replaced while this page was open."


class Current:
    """An application per set of results. A request keeps the one that it began with; the next request finds the new one.

    Args:
        site: the results that were opened first.
        application: makes the application that shows a site.
    """

    def __init__(self, site: Site, application: Callable[[Site], ASGIApp]) -> None:
        self._now = site, application(site)
        self._application = application
        self._in_turn = CapacityLimiter(1)  # results are opened once, and the requests after the first wait for them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(SAME_IN_ALL):
            await self._now[1](scope, receive, send)
            return
        try:
            site, answer = await run_sync(self._renewed, limiter=self._in_turn)
        except UserError as error:
            site = self._now[0]
            answer = site.problem(Request(scope), 422, f"{error}.")
        else:
            # Part of a page must be of the same results as the page that it is put into.
            if Headers(scope=scope).get(EDITION, site.edition) != site.edition:
                answer = site.problem(Request(scope), 409, REPLACED)
                if scope["method"] == "POST":  # what was typed stays on the page
                    answer.headers.update({"hx-retarget": "#problem", "hx-reswap": "innerHTML"})
        await answer(scope, receive, send)

    def _renewed(self) -> tuple[Site, ASGIApp]:
        try:
            site = self._now[0].renewed()
        except BeingReplaced:
            return self._now  # which is complete, unlike what is on disk
        if site is not None:
            self._now = site, self._application(site)
        return self._now
