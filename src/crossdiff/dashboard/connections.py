"""Connections with a limit in time: uvicorn waits for ever for a request that has begun and does not end."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

STALLED = 30.0
"""Seconds in which a request has to arrive, with its headers and its body."""


class Connection(H11Protocol):
    """A connection that is closed when a request takes too long to arrive, or has not arrived when the server stops."""

    limit: ClassVar[float] = STALLED
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()  # the next request may have arrived in part

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def shutdown(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()  # nothing has been done for a request that is not complete
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        if self.cycle is not None:
            self.cycle.disconnected = True  # the application's answer to the broken request would be a second one

    def _watch(self) -> None:
        """Give each request its time once: single bytes that keep coming do not prolong it."""
        is_arriving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not is_arriving or self.transport.is_closing():
            self._stop_watching()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.limit, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connections(stalled: float) -> type[Connection]:
    """Connections with another limit in seconds."""
    return type("Limited", (Connection,), {"limit": stalled})
