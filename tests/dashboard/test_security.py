"""Who may ask: names of the server, origins, the token; and the policy of every answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from showing import ADDRESS, BATCHTOPK, requests_to, write_run

from crossdiff.cli import run_command
from crossdiff.errors import UserError

TOKEN = "let-me-in"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def client(run: Path, tmp_path: Path) -> Any:
    return requests_to(run, tmp_path)


@pytest.mark.parametrize("path", ["/", BATCHTOPK, "/nothing", "/static/dashboard.js", f"{BATCHTOPK}?page=x"])
def test_every_answer_has_the_policy(client: Any, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["connect-src"] == "'self'"
    assert "unsafe-eval" not in headers["content-security-policy"] and "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8321", 200), ("localhost:1", 200), ("[::1]:8321", 200), ("evil.example", 421), ("127.0.0.1.evil.example", 421),
     ("", 421), ("10.0.0.1", 421), ("[::1", 421), ("127.0.0.1@evil.example", 421)],
)  # fmt: skip
def test_only_its_own_names_are_served(client: Any, host: str, status: int) -> None:
    assert client.get("/", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": ADDRESS}, 200), ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9"}, 403), ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200), ({"sec-fetch-site": "same-origin"}, 200),
    ],
)  # fmt: skip
def test_other_pages_are_refused(client: Any, headers: dict[str, str], status: int) -> None:
    assert client.get("/", headers=headers).status_code == status


def test_a_post_has_to_say_its_origin_and_length(client: Any) -> None:
    live = f"{BATCHTOPK}/live"
    assert client.post(live, data={"action": "add"}).status_code == 403
    assert client.post(live, data={"action": "add"}, headers={"origin": ADDRESS}).status_code == 200
    assert client.post(live, content=b"x" * 300_000, headers={"origin": ADDRESS}).status_code == 413
    assert client.post(live, content=iter([b"x"]), headers={"origin": ADDRESS}).status_code == 411


def test_the_token_moves_into_a_cookie(run: Path, tmp_path: Path) -> None:
    client = requests_to(run, tmp_path, host="0.0.0.0", token=TOKEN)
    assert client.get("/").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    answer = client.get(f"{BATCHTOPK}?q=you&token={TOKEN}&page=1")
    assert (answer.status_code, answer.headers["location"]) == (303, f"{BATCHTOPK}?q=you&page=1")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    page = client.get(BATCHTOPK)
    assert page.status_code == 200 and TOKEN not in page.text
    client.cookies.clear()
    assert client.get(BATCHTOPK).status_code == 401


def test_a_token_does_not_lead_to_another_host(run: Path, tmp_path: Path) -> None:
    client = requests_to(run, tmp_path, host="0.0.0.0", token=TOKEN)
    assert client.get(f"{ADDRESS}//evil.example/?token={TOKEN}").headers["location"] == "/evil.example/"


def test_on_all_addresses_a_foreign_name_is_refused(run: Path, tmp_path: Path) -> None:
    client = requests_to(run, tmp_path, host="0.0.0.0", token=TOKEN, names=("lab.example",))
    statuses = [
        client.get("/", headers={"host": host}).status_code for host in ("10.0.0.7:8321", "lab.example", "evil.example")
    ]
    assert statuses == [401, 401, 421]


def test_bad_commands_say_what_to_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        run_command(["dashboard", str(tmp_path / "none"), "--port", "0"])
    with pytest.raises(UserError, match=r"cannot listen on .*:70000"):
        run_command(["dashboard", str(run), "--port", "70000"])
