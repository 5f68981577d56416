"""Requests that are made to hurt, readers who go away, a server that is told to stop, and odd names."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import polars as pl
import pytest

pytest.importorskip("fastapi")

from showing import ADDRESS, BATCHTOPK, requests_to, write_run

from crossdiff.dashboard.catalogue import Catalogue
from crossdiff.dashboard.security import MAX_BODY
from crossdiff.dashboard.serve import serving
from crossdiff.files import read_json, write_json

LIVE = f"{BATCHTOPK}/live"
STALLED = 0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def client(run: Path, tmp_path: Path) -> Any:
    return requests_to(run, tmp_path)


@pytest.fixture
def port(run: Path, tmp_path: Path) -> Iterator[int]:
    with serving([run], tmp_path, live=False, stalled=STALLED) as address:
        yield int(address.rpartition(":")[2])


def head(port: int, *headers: str, method: str = "POST", path: str = LIVE) -> bytes:
    """The beginning of a request that its own page could send."""
    own = f"127.0.0.1:{port}"
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {own}", f"Origin: http://{own}", *headers, "", ""]).encode()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def answer_of(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("headers", [("Content-Length: 5", "Transfer-Encoding: chunked"), ("Transfer-Encoding: chunked",)])
def test_a_body_without_a_length_is_refused_and_the_connection_closed(port: int, headers: tuple[str, ...]) -> None:
    with connect(port) as connection:
        connection.sendall(head(port, *headers) + b"5\r\nhello\r\n")
        answer = answer_of(connection)
    assert status_of(answer) == 411 and b"no Transfer-Encoding" in answer


def test_a_body_is_counted_as_it_arrives(port: int) -> None:
    """A length of 100 MB is announced; the answer comes after little more than the limit, and no more is read."""
    with connect(port) as connection:
        connection.sendall(head(port, "Content-Length: 100000000") + b"x" * (MAX_BODY + 1))
        answer = answer_of(connection)
    assert status_of(answer) == 413 and b"connection: close" in answer.lower()


def test_a_body_of_just_the_limit_passes(client: Any) -> None:
    start = "action=add&text="
    for length, status in ((MAX_BODY, 200), (MAX_BODY + 1, 413)):
        content = start + "x" * (length - len(start))
        assert client.post(LIVE, content=content, headers={"origin": ADDRESS}).status_code == status


@pytest.mark.parametrize(
    "beginning",
    [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", head(1, "Content-Length: 9")[:-4] + b"\r\n\r\nabc"],
    ids=["nothing", "headers", "body"],
)
def test_a_request_that_never_ends_is_closed(port: int, beginning: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(beginning.replace(b"127.0.0.1:1", f"127.0.0.1:{port}".encode()))
        started = time.monotonic()
        with pytest.raises((ConnectionResetError, EOFError)):
            _ = connection.recv(100) or (_ for _ in ()).throw(EOFError)
        assert STALLED / 2 < time.monotonic() - started < 5


def test_single_bytes_do_not_prolong_a_request(port: int) -> None:
    with connect(port) as connection, pytest.raises(OSError):
        for _ in range(100):
            connection.sendall(b"X" if _ else b"GET / HTTP/1.1\r\nX: ")
            time.sleep(STALLED / 5)


def test_a_second_request_that_stalls_is_closed(port: int) -> None:
    """The first one is answered; the body of the second, sent with the first, never comes."""
    with connect(port) as connection:
        connection.sendall(head(port, method="GET", path="/report.css") + head(port, "Content-Length: 9"))
        started, answer = time.monotonic(), b""
        with pytest.raises((ConnectionResetError, EOFError)):
            while True:
                answer += connection.recv(65536) or (_ for _ in ()).throw(EOFError)
        assert status_of(answer) == 200 and time.monotonic() - started < 5


@pytest.mark.parametrize(
    "origin", [b"http://[", b"http://[::1", b"http://[x]", b"//[", b"[", b"", b"\xff", b"http://\xe2\x84\x80"]
)
def test_a_malformed_origin_is_refused(client: Any, origin: bytes) -> None:
    assert client.get("/", headers={"origin": origin}).status_code == 403
    assert client.post(LIVE, data={"action": "add"}, headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("host", [b"[", b"[x]", b"a[b", b"\xff", b"//127.0.0.1", b"127.0.0.1/["])
def test_a_malformed_host_is_unknown_and_a_malformed_referer_ignored(client: Any, host: bytes) -> None:
    assert client.get("/", headers={"host": host, "referer": "http://["}).status_code == 421
    assert client.get("/", headers={"referer": "http://["}).status_code == 200


@pytest.mark.parametrize("path", ["/static/%00", "/static/" + "a" * 5000, "/%ff%fe", f"{BATCHTOPK}/latent/%F0", "/run/%00/%00"])
def test_malformed_paths_are_not_found(client: Any, path: str) -> None:
    assert client.get(path).status_code in (404, 422)


def test_a_token_and_cookie_of_any_bytes_are_wrong(run: Path, tmp_path: Path) -> None:
    client = requests_to(run, tmp_path, host="0.0.0.0", token="right")
    for query, cookie in (("token=%ff%00", "a"), ("token", "crossdiff-8321=\xff"), ("%", "=;=;\x01"), ("token=%ED%A0%80", "é")):
        assert client.get(f"/?{query}", headers={"cookie": cookie.encode("latin-1")}).status_code == 401


def started(run: Path, tmp_path: Path) -> tuple[subprocess.Popen[str], int]:
    """The dashboard as a process of its own, and its port."""
    command = [sys.executable, "-m", "crossdiff", "dashboard", str(run), "--no-live", "--port", "0"]
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r":(\d+)/", line)
    assert found is not None, line
    return process, int(found[1])


def test_readers_who_go_away_leave_nothing_in_the_log_and_a_stalled_one_does_not_keep_it(run: Path, tmp_path: Path) -> None:
    process, port = started(run, tmp_path)
    try:
        for beginning in (
            head(port, "Content-Length: 9") + b"abc",
            head(port, "Transfer-Encoding: chunked") + b"ZZ\r\n",
            head(port, "Content-Length: 9", "Expect: 100-continue"),
            head(port, method="GET", path="/"),
            head(port, method="GET", path="/static/vendor/plotly-strict.min.js"),
        ):
            with connect(port) as connection:
                connection.sendall(beginning)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # ends with a reset
        with connect(port) as stalled, connect(port) as silent, connect(port) as asking:
            stalled.sendall(head(port, "Content-Length: 9") + b"abc")
            silent.sendall(b"GET / HTTP/1.1\r\n")
            asking.sendall(head(port, "Connection: close", method="GET", path="/"))
            assert status_of(answer_of(asking)) == 200
            process.send_signal(signal.SIGTERM)
            log, _ = process.communicate(timeout=8)
    finally:
        process.kill()
    assert "Traceback" not in log and "Exception" not in log, log


class Links(HTMLParser):
    """The addresses on a page that a reader or its script can ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "action", "hx-get", "data-href", "data-src", "data-path") and value:
                self.found.add(value)
            if name == "data-latent" and value:
                self.found.add(value + "3")


def with_crosscoder(folder: Path, name: str) -> Path:
    """A run that also has a crosscoder of this name."""
    directory = write_run(folder)
    shutil.copytree(directory / "batchtopk", directory / name)
    manifest = read_json(directory / "manifest.json")
    manifest["stages"][f"train/{name}"] = {"fingerprint": "batchtopk"}
    write_json(directory / "manifest.json", manifest)
    return directory


@pytest.mark.parametrize("name", ["a?b#c", "a%2Fb", "\xe9 & \u4e2d;+'"])
def test_every_link_of_an_oddly_named_crosscoder_works(tmp_path: Path, name: str) -> None:
    """All links from the overview, the concepts and the pages of the crosscoder, of one of its latents, and of live prompts."""
    directory = with_crosscoder(tmp_path, name)
    members = directory / "concepts" / "members.parquet"
    renamed = pl.read_parquet(members).with_columns(pl.col("training").replace("l1", name))
    renamed.write_parquet(members)
    summary = read_json(directory / "concepts" / "concepts.json")
    summary["trainings"][0]["name"] = name
    write_json(directory / "concepts" / "concepts.json", summary)
    own = Catalogue([directory]).coders["a-b-1", name].path
    concept = "/run/a-b-1/concepts/1"
    waiting, seen = ["/", concept], dict[str, set[str]]()
    with serving([directory], tmp_path / "cache") as address:  # the test client would decode an address twice
        while waiting:
            path = waiting.pop()
            if path in seen or "/lens" in path or "/sides/" in path or path == f"{own}/latent" or path.endswith("/with"):
                continue  # those run the models, and the last two are forms that lack their number
            if path.endswith(("/notes", "/directions.safetensors")) and path != "/notes":
                continue  # a form that is posted, and the weights, which this run lacks
            with urllib.request.urlopen(address + path, timeout=10) as answer:  # an error is an exception
                is_page = answer.headers.get_content_type() == "text/html"
                links = Links(answer.read().decode()).found if is_page else set()
            seen[path] = {urljoin(path, link).partition("#")[0] for link in links if link.startswith("/")}
            if path in ("/", own, concept, f"{own}/latent/3") or path.startswith(f"{own}/live"):
                waiting += [link for link in seen[path] if not link.startswith(("/static", "/run/a-b-1/l1", BATCHTOPK))]
    assert {f"{own}/{part}" for part in ("latent/3", "points.json", "latents.csv", "live")} <= set(seen)
    assert f"{own}/latent/4" in seen[concept]  # the first of its latents


@pytest.mark.parametrize("name", ["a?b#c", "\xe9 & +"])
def test_redirects_to_an_oddly_named_crosscoder_arrive(tmp_path: Path, name: str) -> None:
    directory = with_crosscoder(tmp_path, name)
    own = Catalogue([directory]).coders["a-b-1", name].path
    client = requests_to(directory, tmp_path / "cache", host="0.0.0.0", token="right")
    with_token = client.get(f"{own}/latent/3?whitespace=raw&token=right")
    assert with_token.headers["location"] == f"{own}/latent/3?whitespace=raw"
    to_latent = client.get(f"{own}/latent?number=3")
    assert to_latent.headers["location"] == f"{own}/latent/3"
    assert client.get(to_latent.headers["location"]).status_code == 200
    assert client.get(own, headers={"hx-request": "true"}).headers["hx-push-url"] == f"{own}?"
