"""Notes in the dashboard: forms without scripts, texts that were changed elsewhere, lists, export and import, other results."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import polars as pl
import pytest

pytest.importorskip("fastapi")

from showing import ADDRESS, BATCHTOPK, CONCEPTS, DANGER, requests_to, write_run
from test_pages import HTMX, Elements, latents_of

from crossdiff.dashboard.catalogue import Catalogue
from crossdiff.dashboard.note_views import read_posted
from crossdiff.errors import UserError
from crossdiff.notes.store import Notes, notes_path

ORIGIN = {"origin": ADDRESS}
LATENT, CONCEPT = f"{BATCHTOPK}/latent/3", f"{CONCEPTS}/1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def client(run: Path, tmp_path: Path, home: Path) -> Iterator[Any]:
    yield requests_to(run, tmp_path / "cache")


def post(client: Any, path: str, *pairs: tuple[str, str], **headers: str) -> Any:
    from urllib.parse import urlencode

    kind = {"content-type": "application/x-www-form-urlencoded"}
    return client.post(f"{path}/notes", content=urlencode(pairs), headers={**ORIGIN, **kind, **headers})


def hidden(page: str, name: str) -> str:
    """The value of a field of the form of a note."""
    found = [each for tag, each in Elements(page).found if tag == "input" and each.get("name") == name]
    return found[-1].get("value") or ""


def test_a_page_has_a_form_that_needs_no_script(client: Any) -> None:
    for path in (LATENT, CONCEPT):
        page = client.get(path).text
        answer = post(
            client, path, ("label", DANGER), ("comment", "one\r\n\r\ntwo"), ("new_list", "to check"),
            ("of", hidden(page, "of")), ("seen_label", "0"), ("seen_comment", "0"), ("back", "?list=1&noted=list%3Ato+check"),
        )  # fmt: skip
        assert answer.status_code == 303
        assert answer.headers["location"] == f"{path}?list=1&noted=list%3Ato+check#notes"
        page = client.get(path).text
        assert DANGER not in page and DANGER in unescape(page)
        assert [each for tag, each in Elements(page).found if tag == "input" and each.get("value") == "to check"]
        assert '<p class="my-comment">one\n\ntwo</p>' in page


def test_a_star_is_set_and_taken_away(client: Any) -> None:
    assert post(client, LATENT, ("star", "yes")).status_code == 303
    assert 'aria-pressed="true"' in client.get(LATENT).text
    assert latents_of(client.get(f"{BATCHTOPK}?noted=starred").text) == [3]
    assert post(client, LATENT, ("star", "no")).status_code == 303
    assert latents_of(client.get(f"{BATCHTOPK}?noted=starred").text) == []


def test_a_part_of_the_page_and_json_are_answered_where_asked_for(client: Any) -> None:
    part = post(client, LATENT, ("star", "yes"), **HTMX)
    assert part.status_code == 200 and part.text.lstrip().startswith("<section") and "Starred" in part.text
    data = post(client, LATENT, ("label", "greets"), ("list", "a"), accept="application/json")
    assert data.json() == {"label": "greets", "star": True, "comment": "", "lists": ["a"]}


def test_requests_of_other_pages_are_refused(client: Any) -> None:
    for headers in ({}, {"origin": "http://evil.example"}):
        assert client.post(f"{LATENT}/notes", data={"star": "yes"}, headers=headers).status_code == 403
        assert client.post("/notes/import", data={"notes": "{}"}, headers=headers).status_code == 403
    assert not notes_path().exists()


def test_a_text_that_was_changed_elsewhere_is_shown_beside_mine(client: Any) -> None:
    page = client.get(LATENT).text
    seen = ("seen_label", hidden(page, "seen_label")), ("seen_comment", hidden(page, "seen_comment"))
    assert post(client, LATENT, ("label", "theirs"), ("comment", "their text"), *seen).status_code == 303
    answer = post(client, LATENT, ("label", ""), ("comment", "my text"), ("new_list", "kept"), *seen)
    assert answer.status_code == 409 and "<h1>Latent 3</h1>" in answer.text
    shown = answer.text
    assert "The comment was changed elsewhere" in shown and "their text" in shown and ">\nmy text</textarea>" in shown
    assert 'value="theirs"' in shown  # I had not touched the label, so theirs stays
    assert 'value="kept" checked' in shown
    again = ("seen_label", hidden(shown, "seen_label")), ("seen_comment", hidden(shown, "seen_comment"))
    assert post(client, LATENT, ("label", "theirs"), ("comment", "both texts"), *again).status_code == 303
    page = client.get(LATENT).text
    assert '<p class="my-comment">both texts</p>' in page and "Earlier texts (1)" in page and "their text" in page


def test_what_cannot_be_written_stays_in_the_form(client: Any) -> None:
    answer = post(client, LATENT, ("label", "x" * 201), ("comment", "a long thought"))
    assert answer.status_code == 422 and "201 characters; at most 200" in answer.text
    assert ">\na long thought</textarea>" in answer.text and "x" * 201 in answer.text
    assert not client.get("/notes.json").json()["notes"]


def test_two_servers_and_python_see_each_other(run: Path, client: Any, tmp_path: Path) -> None:
    other = requests_to(run, tmp_path / "other")
    for number in range(5):
        post(client, f"{BATCHTOPK}/latent/{number}", ("list", "one"))
        post(other, f"{BATCHTOPK}/latent/{number}", ("list", "two"))
    for each in (client, other):
        assert latents_of(each.get(f"{BATCHTOPK}?noted=list:one&sort=latent").text) == [0, 1, 2, 3, 4]
        assert latents_of(each.get(f"{BATCHTOPK}?noted=list:two&sort=latent").text) == [0, 1, 2, 3, 4]
    Catalogue([run]).coders["a-b-1", "batchtopk"].notes.edit(1, {"label": "written in Python"})
    assert "written in Python" in client.get(BATCHTOPK + "?noted=any").text


def test_labels_stand_in_tables_and_lists_go_through_them(client: Any) -> None:
    for number, label in ((2, "the second"), (7, "the seventh"), (20, "")):
        post(client, f"{BATCHTOPK}/latent/{number}", ("label", label), ("star", "yes"), ("list", "b ü"))
    page = client.get(f"{BATCHTOPK}?noted=list:b ü&sort=latent").text
    assert latents_of(page) == [2, 7, 20] and "the second" in page and page.count('class="star"') == 3
    link = next(each["href"] for tag, each in Elements(page).found if tag == "a" and "/latent/7?" in (each.get("href") or ""))
    assert "2 of 3 in" in client.get(link).text
    csv = client.get(f"{BATCHTOPK}/latents.csv?noted=starred").text
    assert len(csv.splitlines()) == 4
    assert latents_of(client.get(f"{BATCHTOPK}?noted=starred&f=verdict=chat_specific").text) == [2]
    assert "the seventh" in client.get(f"{BATCHTOPK}/latent/7/brief").text
    assert client.get(f"{BATCHTOPK}?noted=nonsense").status_code == 422


def test_labels_of_concepts(client: Any) -> None:
    post(client, CONCEPT, ("label", "what the sea does"), ("star", "yes"))
    page = client.get(f"{CONCEPTS}?noted=starred").text
    assert "what the sea does" in page and "1 concept, page 1 of 1" in page
    assert "first of all" not in client.get("/").text
    post(client, f"{CONCEPTS}/0", ("label", "first of all"))
    assert "first of all" in client.get("/").text
    link = next(each["href"] for tag, each in Elements(page).found if tag == "a" and "/concepts/1?" in (each.get("href") or ""))
    assert "1 of 1 in" in client.get(link).text and "noted=starred" in link
    member = client.get(f"{BATCHTOPK}?f=latent:4:4").text  # latent 4 is part of concept 1 and has no label of its own
    assert "what the sea does" in member
    assert client.get(f"{CONCEPTS}?noted=x").status_code == 422


def test_the_page_of_notes_and_the_exchange(client: Any, home: Path) -> None:
    assert "There are no notes" in client.get("/notes").text and not home.exists()
    post(client, LATENT, ("label", DANGER), ("star", "yes"), ("list", "x"))
    post(client, CONCEPT, ("comment", "unclear"))
    page = client.get("/notes").text
    assert DANGER not in page and f'href="{LATENT}"' in page and f'href="{CONCEPT}"' in page and "unclear" in page
    exported = client.get("/notes.json").text
    assert len(json.loads(exported)["notes"]) == 2 and len(client.get("/notes.json?run=a-b-1").json()["notes"]) == 2
    assert client.get("/notes.json?run=other").status_code == 404
    notes_path().unlink()
    answer = client.post("/notes/import", data={"notes": exported}, headers=ORIGIN)
    assert answer.status_code == 303 and "4 new values were merged" in client.get(answer.headers["location"]).text
    assert client.get("/notes.json").json() == json.loads(exported)
    answer = client.post("/notes/import", content=exported, headers=ORIGIN | {"content-type": "application/json"})
    assert answer.json() == {"subjects": 2, "new": 0}
    answer = client.post("/notes/import", data={"notes": "</textarea><b>"}, headers=ORIGIN)
    assert answer.status_code == 422 and "is not JSON" in answer.text and "&lt;/textarea&gt;" in answer.text
    answer = client.post("/notes/import", content="[]", headers=ORIGIN | {"content-type": "application/json"})
    assert answer.status_code == 422 and "error" in answer.json()


def test_other_results_do_not_inherit_notes_and_say_so(run: Path, tmp_path: Path, home: Path) -> None:
    own = shutil.copytree(run, tmp_path / run.name)
    (own / "batchtopk" / "model.safetensors").write_bytes(b"weights")
    client = requests_to(own, tmp_path / "cache")
    of = hidden(client.get(LATENT).text, "of")
    post(client, LATENT, ("label", "of the first training"), ("star", "yes"))
    (own / "batchtopk" / "model.safetensors").write_bytes(b"other weights")
    client = requests_to(own, tmp_path / "cache")
    page = client.get(BATCHTOPK).text
    assert "of the first training" not in page and "1 of your notes are about earlier results" in page
    assert "1 more are about earlier results" in client.get("/notes").text
    late = post(client, LATENT, ("label", "typed on the old page"), ("of", of))
    assert late.status_code == 409 and "results were replaced" in late.text and "typed on the old page" in late.text
    assert 'class="my-label"' not in client.get(LATENT).text
    (exported,) = client.get("/notes.json").json()["notes"]
    assert exported["of"] == of  # nothing is lost


def test_a_damaged_file_of_notes_leaves_the_pages(client: Any) -> None:
    post(client, LATENT, ("star", "yes"))
    notes_path().write_bytes(b"x" * 5000)
    for path in ("/", BATCHTOPK, CONCEPTS, LATENT, CONCEPT, "/notes"):
        assert client.get(path).status_code == 200, path
    assert "is damaged" in client.get(LATENT).text and "is damaged" in client.get("/notes").text
    assert post(client, LATENT, ("star", "yes")).status_code == 422
    assert client.get("/notes.json").status_code == 422


def test_the_form_is_read_field_by_field() -> None:
    pairs = [
        ("list", "a"),
        ("list", "b"),
        ("was", "b"),
        ("was", "c"),
        ("new_list", " new  one "),
        ("back", "//evil"),
        ("star", "no"),
    ]
    sent = read_posted(pairs)
    assert sent.values == {"star": "", "list/a": "yes", "list/new one": "yes", "list/c": ""}
    assert sent.back == "" and sent.seen == {}
    with pytest.raises(UserError, match="expected yes"):
        read_posted([("star", "maybe")])


def test_a_page_with_5000_notes_is_quick(run: Path, home: Path, tmp_path: Path) -> None:
    """The notes are read again after a change: 5,000 of them, with three fields each."""
    import time

    coder = Catalogue([run]).coders["a-b-1", "batchtopk"]
    from crossdiff.notes.store import Subject, Value

    values = [Value("label", 1, "x"), Value("star", 1, "yes"), Value("comment", 1, "y" * 100)]
    Notes().merge({Subject("latent", coder.notes.of, number): values for number in range(5000)}, {})
    started = time.process_time()
    assert len(Notes().all()) == 5000
    assert time.process_time() - started < 1.5
    assert re.search(r'class="star"', requests_to(run, tmp_path / "cache").get(BATCHTOPK).text)
    assert pl.Series(sorted(coder.notes.numbers("starred"))).len() == 5000
