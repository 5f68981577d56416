"""The server behind `crossdiff dashboard`."""

from __future__ import annotations

import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from crossdiff.dashboard.app import create_app
from crossdiff.dashboard.catalogue import Catalogue
from crossdiff.dashboard.connections import STALLED, connections
from crossdiff.dashboard.live import Live
from crossdiff.dashboard.search import cache_folder
from crossdiff.dashboard.security import is_loopback
from crossdiff.errors import UserError

GRACE = 5
"""Seconds that requests have to end when the server stops."""


def listen(host: str, port: int) -> socket.socket:
    """A socket on the address; port 0 takes a free one."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --port, or another --host") from None


def _server(
    directories: Sequence[Path],
    host: str,
    token: str | None,
    names: tuple[str, ...],
    live: bool,
    cache: Path,
    stalled: float = STALLED,
    embed_in: tuple[str, ...] = (),
) -> uvicorn.Server:
    app = create_app(Catalogue(directories), Live(live), cache, host, token, names, embed_in)
    # The guard checks addresses itself, so proxy headers are ignored. An access log would contain readers' searches.
    return uvicorn.Server(uvicorn.Config(
        app, http=connections(stalled), ws="none", log_level="warning", access_log=False, proxy_headers=False,
        server_header=False, timeout_graceful_shutdown=GRACE,
    ))  # fmt: skip


def serve(
    directories: Sequence[Path],
    host: str,
    port: int,
    names: tuple[str, ...] = (),
    live: bool = True,
    embed_in: tuple[str, ...] = (),
) -> None:
    """Serve until interrupted. Beyond loopback, readers need a token, which is part of the printed address."""
    listening = listen(host, port)
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    server = _server(directories, host, token, names, live, cache_folder(), embed_in=embed_in)
    shown = names[0] if names else host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{listening.getsockname()[1]}/"
    print(f"The dashboard is at {address}{f'?token={token}' if token else ''}  (Ctrl+C stops it)", flush=True)
    # Ctrl+C then ends the process like SIGTERM, after the grace. Python would wait for the threads of pages without a limit.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    server.run(sockets=[listening])


@contextmanager
def serving(
    directories: Sequence[Path],
    cache: Path,
    live: bool = True,
    stalled: float = STALLED,
    embed_in: tuple[str, ...] = (),
) -> Iterator[str]:
    """Serve on a free port of loopback while the block runs; yields the address.

    Args:
        stalled: seconds in which a request has to arrive.
        embed_in: origins whose pages may show cards in a frame.
    """
    with listen("127.0.0.1", 0) as listening:
        server = _server(directories, "127.0.0.1", None, (), live, cache, stalled, embed_in)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(GRACE)
