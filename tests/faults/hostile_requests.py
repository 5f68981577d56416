"""Hostile requests to a dashboard: each is refused, and the server stays alive, small and stoppable."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import quote

from tiny import FINISHED, Tally, Tiny

WAIT = 40
NO_ANSWER = b"no answer in time"
STOPS_IN = 10
MEGABYTES = 50
"""How much the server may grow over all requests."""
TRAVERSALS = (
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "....//",
    "\0",
    "%00",
    "..\\..\\x",
    "a" * 5000,
    "\N{PILE OF POO}",
    "'\"<x>",
)


class Server:
    """A dashboard in a process of its own."""

    def __init__(self, run: Path, log: Path) -> None:
        self.log: IO[bytes] = log.open("w+b")
        words = [sys.executable, "-m", "crossdiff", "dashboard", str(run), "--port", "0"]
        self.process = subprocess.Popen(words, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while not (found := re.search(rb"127\.0\.0\.1:(\d+)/", log.read_bytes())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"the dashboard did not start: {log.read_text()}")
            time.sleep(0.1)
        self.path, self.port = log, int(found[1])

    @property
    def megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)

    def send(self, *pieces: bytes) -> bytes:
        """Send bytes and return what comes back: the answer, or nothing if the server closes the connection."""
        answer = b""
        with self.connect() as connection, suppress(ConnectionError):
            try:
                for piece in pieces:
                    connection.sendall(piece)
                while b"\r\n\r\n" not in answer and (part := connection.recv(65536)):
                    answer += part
            except TimeoutError:
                return NO_ANSWER
        return answer

    def get(self, path: str, *headers: str, method: str = "GET") -> bytes:
        lines = [f"{method} {path} HTTP/1.1", *(headers or [self.host]), "Connection: close", "", ""]
        return self.send("\r\n".join(lines).encode("latin-1"))

    @property
    def host(self) -> str:
        return f"Host: 127.0.0.1:{self.port}"

    def stop(self) -> float | None:
        """Seconds until the server has stopped after SIGTERM; None if it had to be killed."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOPS_IN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None
        return time.monotonic() - started


def _status(answer: bytes) -> int:
    """The status of an answer; 0 for a closed connection."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0


def _attacks(server: Server, root: str) -> Iterator[tuple[str, str, bytes, bool]]:
    """Kind, name and answer of each attack, and whether the answer may be a page (2xx, 3xx)."""
    post = [f"POST {root}/live HTTP/1.1", server.host, f"Origin: http://127.0.0.1:{server.port}"]
    form = [*post, "Content-Type: application/x-www-form-urlencoded"]

    def request(*lines: str) -> bytes:
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    chunk = b"%x\r\n%s\r\n" % (65536, b"x" * 65536)
    yield "bodies", "chunked with a small length", server.send(
        request(*form, "Content-Length: 5", "Transfer-Encoding: chunked"), *[chunk] * 3200, b"0\r\n\r\n"
    ), False  # fmt: skip
    yield "bodies", "chunked", server.send(request(*form, "Transfer-Encoding: chunked"), *[chunk] * 3200, b"0\r\n\r\n"), False
    yield "bodies", "200 MB", server.send(request(*form, "Content-Length: 200000000"), *[b"x" * 10**6] * 200), False
    for length in ("-1", "x", "1e3", "+5", "99999999999999999999", "5, 6"):
        yield "bodies", f"Content-Length {length}", server.send(request(*form, f"Content-Length: {length}"), b"hello"), False
    yield "bodies", "two lengths", server.send(request(*form, "Content-Length: 5", "Content-Length: 6"), b"hello!"), False
    fields = "&".join(f"a{n}=1" for n in range(10_000)).encode()
    yield "bodies", "10,000 fields", server.send(request(*form, f"Content-Length: {len(fields)}"), fields), False
    multipart = [*post, "Content-Type: multipart/form-data; boundary=x"]
    for name, body in {
        "unfinished": b"--x\r\nContent-Disp",
        "many parts": b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n\r\n" * 4000,
    }.items():
        yield "bodies", f"multipart, {name}", server.send(request(*multipart, f"Content-Length: {len(body)}"), body), False
    for host in (
        "",
        "evil.example",
        "[",
        "[::1",
        "127.0.0.1:x",
        "a" * 9000,
        "127.0.0.1@evil.example",
        "127.0.0.1, evil.example",
    ):
        yield "headers", f"Host {host[:20]!r}", server.get("/", f"Host: {host}"), host == "127.0.0.1:x"
    yield "headers", "no Host", server.get("/", "X: y"), False
    yield "headers", "two Hosts", server.get("/", server.host, "Host: evil.example"), False
    for origin in (
        "null",
        "http://evil.example",
        "http://[",
        "x",
        "http://127.0.0.1:x",
        f"http://127.0.0.1:{server.port}.evil.example",
    ):
        lines = [*form[:2], f"Origin: {origin}", form[3], "Content-Length: 3"]
        yield "headers", f"Origin {origin}", server.send(request(*lines), b"a=b"), False
    yield "headers", "a header of 1 MB", server.get("/", server.host, f"X: {'x' * 10**6}"), False
    yield "headers", "10,000 headers", server.get("/", server.host, *(f"X{n}: y" for n in range(10_000))), True
    yield "headers", "a stray CR", server.send(f"GET / HTTP/1.1\r\n{server.host}\rX: y\r\n\r\n".encode()), False
    yield "headers", "not HTTP", server.send(os.urandom(4096) + b"\r\n\r\n"), False
    for value in TRAVERSALS:
        for place in ("/{}", "/run/{}/batchtopk", f"{root.rsplit('/', 1)[0]}/{{}}", f"{root}/latent/{{}}",
                      f"{root}/latents.{{}}", f"{root}/live/{{}}/token/0", f"{root}/latent/1/sides/{{}}",
                      "/static/{}", f"{root}/latent?number={{}}", f"{root}/points.json?colour={{}}"):  # fmt: skip
            answer = server.get(place.format(quote(value, safe="")))
            yield "paths", f"{place} with {value[:20]!r}", answer, value in (".", "..") and place in ("/{}", "/static/{}")
    for value in TRAVERSALS:
        for field in ("q", "sort", "f", "page", "show"):
            yield "queries", f"{field} with {value[:20]!r}", server.get(f"{root}?{field}={quote(value)}"), True
    for value in ("1e999", "nan", "-1", "9" * 5000, "verdict=\0", "delta_norm:x:y", "delta_norm:1e400:"):
        for field in ("q", "sort", "f", "page", "show"):
            yield "queries", f"{field} with {value[:20]!r}", server.get(f"{root}?{field}={quote(value)}"), True
    yield "queries", "10,000 parameters", server.get(f"{root}?{'&'.join(f'f=x{n}' for n in range(10_000))}"), False
    yield "queries", "3,000 equal filters", server.get(f"{root}?{'&'.join(['f=latent:1:'] * 3000)}"), False
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "POST", "BREW"):
        yield "methods", method, server.get("/", method=method), False


def _problem(server: Server, answer: bytes, may_pass: bool) -> str | None:
    status = _status(answer)
    here = re.search(rb"(?mi)^location: (?:/[^/]|http://127\.0\.0\.1:%d/)" % server.port, answer)
    if answer == NO_ANSWER:
        return f"neither an answer nor a closed connection within {WAIT} s"
    if status == 307 and here:
        return None  # the same page without the slash at its end
    if server.process.poll() is not None:
        return f"the server ended with {server.process.returncode}"
    if status >= 500 or (0 < status < 400 and not may_pass):
        return f"answered {answer[:60].splitlines()[0].decode('latin-1')}"
    return None


def _stalled(tiny: Tiny, name: str, pieces: bytes) -> str | None:
    """Stop a server while a client is in the middle of a request."""
    server = Server(tiny.run, tiny.folder / "server.txt")
    with server.connect() as connection:
        connection.sendall(pieces.replace(b"PORT", str(server.port).encode()))
        time.sleep(1)
        others = _status(server.get("/"))
        seconds = server.stop()
    if others != 200:
        return f"another reader got {others} meanwhile"
    if "Traceback" in server.path.read_text(errors="replace"):
        return "a traceback is in the log"
    return f"the server still runs {STOPS_IN} s after SIGTERM" if seconds is None else None


def requests(tiny: Tiny, every: int = 1) -> Iterator[Tally]:
    """All attacks in order (`every` leaves out none, since they take seconds), then stalled clients."""
    tiny.restore(tiny.state(FINISHED))
    server = Server(tiny.run, tiny.folder / "server.txt")
    tallies: dict[str, Tally] = {}
    try:
        root = _root(server)
        _use(server, root)
        before = server.megabytes
        for kind, name, answer, may_pass in _attacks(server, root):
            tallies.setdefault(kind, Tally("requests", kind)).add(name, _problem(server, answer, may_pass))
            if server.process.poll() is not None:
                break
        yield from tallies.values()
        after = Tally("requests", "the server afterwards")
        is_up = server.process.poll() is None
        after.add("it answers", None if is_up and _status(server.get("/")) == 200 else "it does not")
        growth = server.megabytes - before if is_up else 0.0
        after.add("its memory", f"grew by {growth:.0f} MB" if growth > MEGABYTES else None)
        after.add("its log", "has a traceback" if "Traceback" in server.path.read_text(errors="replace") else None)
        after.add("SIGTERM", None if server.stop() is not None else f"it runs {STOPS_IN} s later")
        yield after
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
    stalled = Tally("requests", "stalled clients, then SIGTERM")
    head = b"POST " + root.encode() + b"/live HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nOrigin: http://127.0.0.1:PORT\r\n"
    head += b"Content-Type: application/x-www-form-urlencoded\r\n"
    clients = {
        "in the header": b"GET / HTTP/1.1\r\nHost: 127",
        "in the body": head + b"Content-Length: 1000\r\n\r\na=b",
        "after a request": b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n",
    }
    for name, pieces in clients.items():
        stalled.add(name, _stalled(tiny, name, pieces))
    yield stalled


def _use(server: Server, root: str) -> None:
    """Use every page once, as a reader does, so that whatever the server loads when it is first needed is in memory."""
    text = b"kind=text&text=the+sea&action=read"
    origin = f"Origin: http://127.0.0.1:{server.port}"
    form = (f"POST {root}/live HTTP/1.1", server.host, origin, "Content-Type: application/x-www-form-urlencoded")
    answers = [server.send("\r\n".join([*form, f"Content-Length: {len(text)}", "", ""]).encode() + text)]
    for page in ("", "?q=sea", "/latent/1", "/latents.csv", "/latents.parquet", "/points.json", "/live"):
        answers.append(server.get(root + page))
    if refused := [answer for answer in answers if _status(answer) != 200]:
        raise RuntimeError(f"the dashboard does not work: {refused[0][:500]!r}")


def _root(server: Server) -> str:
    """The path of the first crosscoder's page."""
    with server.connect() as connection:
        connection.sendall(f"GET / HTTP/1.1\r\n{server.host}\r\nConnection: close\r\n\r\n".encode())
        page = b""
        while part := connection.recv(65536):
            page += part
    found = re.search(rb'href="(/run/[^"/]+/batchtopk)["?]', page)
    if found is None:
        raise RuntimeError(f"the first page links to no crosscoder: {page[:2000]!r}")
    return found[1].decode()
