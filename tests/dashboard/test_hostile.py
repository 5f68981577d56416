"""Requests that are made to hurt, readers that go away, and runs that change under the server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import polars as pl
import pytest

pytest.importorskip("fastapi")

from showing import ADDRESS, BATCHTOPK, requests_to, write_run

from crossdiff.dashboard.catalogue import Catalogue, Coder
from crossdiff.dashboard.editions import BeingReplaced
from crossdiff.dashboard.live import Live
from crossdiff.dashboard.security import MAX_BODY
from crossdiff.dashboard.serve import serving
from crossdiff.errors import UserError
from crossdiff.files import read_json, write_json
from crossdiff.interp.explanation_table import FILE, SCHEMA
from crossdiff.run import Run, Stage
from report.synthetic_run import latent_table, write_crosscoder

LIVE, LATENT = f"{BATCHTOPK}/live", f"{BATCHTOPK}/latent/3"
NOTICE = re.compile(
    r"The results of this run were replaced at \d\d:\d\d on \d+ [A-Z][a-z]+ \d{4}\. This page shows the new ones\."
)
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


def write_results(folder: Path, edition: str) -> None:
    """Results of a crosscoder that all say which edition they are: an explanation, a dataset, and numbers of neighbours."""
    write_crosscoder(folder, latent_table(0))
    row = {"latent": 3, "explanation": f"said in {edition}", "explainer": "model", "crosscoder": folder.name}
    pl.DataFrame([row], schema=SCHEMA).write_parquet(folder / FILE)
    where = {"dataset": f"data-{edition}", "group": "plain", "role": None, "template_index": None, "token": None}
    counts = {"n_tokens": 100, "n_active": 10, "frequency": 0.1, "share": 1.0, "mean_activation": 1.0, "max_activation": 2.0}
    pl.DataFrame([{"latent": latent, **where, **counts} for latent in range(60)]).write_parquet(folder / "activity.parquet")


def replace(directory: Path, edition: str) -> None:
    """Results of another edition, swapped in as every stage does it. The old ones are deleted, as `crossdiff clean` does it."""
    run = Run.open(directory)
    try:
        with run.working(Stage("analyze/batchtopk", edition, ("batchtopk",))) as folder:
            write_results(folder / "batchtopk", edition)
            (folder / "batchtopk" / "model.safetensors").touch()
    finally:
        run.close()
    shutil.rmtree(directory / "old")


def editions_in(page: str) -> set[str]:
    return set(re.findall(r"(?:said in|data-)\W*(first|second|third)", page))


@pytest.fixture
def changing(tmp_path: Path) -> Path:
    directory = write_run(tmp_path)
    replace(directory, "first")
    return directory


def test_replaced_results_are_shown_with_a_notice(changing: Path, tmp_path: Path) -> None:
    client = requests_to(changing, tmp_path / "cache")
    before = client.get(LATENT).text
    assert editions_in(before) == {"first"} and not NOTICE.search(before)
    replace(changing, "second")
    for path in (LATENT, BATCHTOPK, "/", "/nothing"):
        assert NOTICE.search(client.get(path).text), path
    assert editions_in(client.get(LATENT).text) == {"second"}


def test_a_report_replaces_no_results(changing: Path, tmp_path: Path) -> None:
    client = requests_to(changing, tmp_path / "cache")
    manifest = read_json(changing / "manifest.json")
    manifest["stages"]["report"] = {"fingerprint": "x"}
    write_json(changing / "manifest.json", manifest)
    assert not NOTICE.search(client.get("/").text)


def test_a_page_under_way_keeps_its_results(changing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page stops between the latent's row and its examples and activity, and the results are replaced and deleted."""
    client = requests_to(changing, tmp_path / "cache")
    arrived, go_on, real = threading.Event(), threading.Event(), Coder.latent

    def waiting(*arguments: Any, **options: Any) -> Any:
        arrived.set()
        assert go_on.wait(20)
        return real(*arguments, **options)

    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patched:
        patched.setattr(Coder, "latent", waiting)
        page = pool.submit(client.get, LATENT)
        try:
            assert arrived.wait(20)
            replace(changing, "second")
        finally:
            go_on.set()
        answer = page.result()
    assert answer.status_code == 200 and editions_in(answer.text) == {"first"} and "data-first" in answer.text
    assert "No examples are stored" not in answer.text
    assert editions_in(client.get(LATENT).text) == {"second"}


def test_no_page_mixes_results_while_they_are_replaced(changing: Path, tmp_path: Path) -> None:
    with serving([changing], tmp_path / "cache", live=False) as address, ThreadPoolExecutor(4) as pool:
        stop = threading.Event()

        def read() -> list[set[str]]:
            found = []
            while not stop.is_set():
                with urllib.request.urlopen(address + LATENT, timeout=30) as answer:
                    found.append(editions_in(answer.read().decode()))
            return found

        readers = [pool.submit(read) for _ in range(3)]
        try:
            for edition in ("second", "third", "first", "second", "third"):
                replace(changing, edition)
                time.sleep(0.1)
        finally:
            stop.set()
        pages = [page for reader in readers for page in reader.result()]
    assert {len(page) for page in pages} == {1} and len(pages) > 5


def test_a_swap_that_was_killed_leaves_the_old_results_on_show(changing: Path, tmp_path: Path) -> None:
    client = requests_to(changing, tmp_path / "cache")
    manifest = read_json(changing / "manifest.json")
    manifest["stages"]["analyze/batchtopk"]["fingerprint"] = "second"
    write_json(changing / "manifest.json", manifest | {"swap": [["work/new/batchtopk", "batchtopk"]]})
    (changing / "batchtopk").rename(changing / "gone")
    page = client.get(LATENT)
    assert page.status_code == 200 and editions_in(page.text) == {"first"} and "data-first" in page.text
    assert client.get(f"{BATCHTOPK}?q=data").status_code in (200, 422) and not NOTICE.search(page.text)
    with pytest.raises(BeingReplaced, match="are being replaced; try again in a moment"):
        Catalogue([changing])


def test_results_that_are_gone_are_named(changing: Path, tmp_path: Path) -> None:
    client = requests_to(changing, tmp_path / "cache")
    manifest = read_json(changing / "manifest.json")
    del manifest["stages"]["analyze/batchtopk"]
    write_json(changing / "manifest.json", manifest)
    (changing / "batchtopk" / "latents.parquet").unlink()
    answer = client.get(LATENT)
    assert answer.status_code == 404 and f"{changing.name[0]}" in answer.text
    assert "batchtopk has been trained, but has no results yet. Run `crossdiff analyze" in answer.text
    assert client.get("/run/a-b-1/l1").status_code == 200
    del manifest["stages"]["train/l1"]
    write_json(changing / "manifest.json", manifest)
    (changing / "l1" / "latents.parquet").unlink()
    answer = client.get("/")
    assert answer.status_code == 422 and "run `crossdiff analyze` first" in answer.text
    shutil.rmtree(changing)
    answer = client.get(LATENT)
    assert answer.status_code == 422 and "there is no run directory" in answer.text
    assert client.get("/static/dashboard.js").status_code == 200


def test_a_part_for_a_page_of_replaced_results_is_refused(changing: Path, tmp_path: Path) -> None:
    client = requests_to(changing, tmp_path / "cache")
    told = re.search(r"""<body hx-headers='{"crossdiff-edition": "([^"]+)"}'>""", client.get(BATCHTOPK).text)
    assert told is not None
    own = {"crossdiff-edition": told[1], "hx-request": "true", "origin": ADDRESS}
    assert client.get(BATCHTOPK, headers=own).status_code == 200
    replace(changing, "second")
    for path in (BATCHTOPK, f"{BATCHTOPK}/points.json"):
        answer = client.get(path, headers=own)
        assert answer.status_code == 409 and "Reload the page" in answer.text and "<html" not in answer.text
    answer = client.post(LIVE, data={"action": "add"}, headers=own)
    assert (answer.status_code, answer.headers["hx-retarget"]) == (409, "#result")
    assert client.get(BATCHTOPK, headers={"hx-request": "true"}).status_code == 200


def test_models_read_with_the_crosscoder_of_the_page(tmp_path: Path, analysed_run: Path) -> None:
    directory = shutil.copytree(analysed_run, tmp_path / "run")
    old, live = Catalogue([directory]).coders["run", "batchtopk"], Live()
    reading = live.read(old, "hi the sea is cold")
    assert live.recall(old, reading.key) is reading
    manifest = read_json(directory / "manifest.json")
    manifest["stages"]["analyze/batchtopk"]["fingerprint"] = "another"
    write_json(directory / "manifest.json", manifest)
    assert (live.read(old, "hi the sea is cold").v == reading.v).all()  # it is held
    with pytest.raises(UserError, match="were replaced after this page was opened; load it again"):
        Live().read(old, "hi the sea is cold")
    new = Catalogue([directory]).coders["run", "batchtopk"]
    assert live.recall(new, reading.key) is None and live.recall(old, reading.key) is reading
    pair = live._diff(old).pair
    assert live.read(new, "hi the sea is cold").texts == reading.texts
    assert live._diff(new).pair is pair  # only the crosscoder was loaded again
    with pytest.raises(UserError, match="load it again"):
        live.read(old, "hi the sea is cold")


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
            if path in seen or "/lens" in path or "/sides/" in path or path == f"{own}/latent":
                continue  # those run the models, and the last one is a form that lacks its number
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
