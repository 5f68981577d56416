"""Threads of pages of one kind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi.responses import Response

Page = Callable[..., Response]


def own_threads(n: int) -> Callable[[Page], Callable[..., Awaitable[Response]]]:
    """A decorator for pages that are made in at most `n` threads, which they share; files and errors go on beside them."""
    limiter = CapacityLimiter(n)

    def decorate(page: Page) -> Callable[..., Awaitable[Response]]:
        @wraps(page)
        async def made(**values: Any) -> Response:
            return await run_sync(lambda: page(**values), limiter=limiter)

        return made

    return decorate
