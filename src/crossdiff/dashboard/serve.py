"""The server behind `crossdiff dashboard`."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from crossdiff.dashboard.app import create_app
from crossdiff.dashboard.catalogue import Catalogue
from crossdiff.dashboard.live import Live
from crossdiff.dashboard.search import cache_folder
from crossdiff.dashboard.security import is_loopback
from crossdiff.errors import UserError

THREADS_STOP = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket on the address; port 0 takes a free one.

    Raises:
        UserError: the address does not exist here, or the port is taken.
    """
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
) -> uvicorn.Server:
    app = create_app(Catalogue(directories), Live(live), cache, host, token, names)
    # The guard checks addresses itself, so no proxy's headers are believed; the log would hold what readers search for.
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, proxy_headers=False, server_header=False))


def serve(directories: Sequence[Path], host: str, port: int, names: tuple[str, ...] = (), live: bool = True) -> None:
    """Serve until interrupted. Beyond loopback readers have to show a token, which the printed address holds.

    Raises:
        UserError: a directory is no analysed run, or the address cannot be listened on.
    """
    listening = listen(host, port)
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    server = _server(directories, host, token, names, live, cache_folder())
    shown = names[0] if names else host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{listening.getsockname()[1]}/"
    print(f"The dashboard is at {address}{f'?token={token}' if token else ''}  (Ctrl+C ends it)", flush=True)
    server.run(sockets=[listening])


@contextmanager
def serving(directories: Sequence[Path], cache: Path, live: bool = True) -> Iterator[str]:
    """A server on a free port of loopback while the block runs; gives its address."""
    with listen("127.0.0.1", 0) as listening:
        server = _server(directories, "127.0.0.1", None, (), live, cache)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(THREADS_STOP)
