"""Characters of several tokens in live texts and in lists: shown whole, found by the search, kept with their bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")

from showing import BATCHTOPK, add_strengths, requests_to, write_run

from crossdiff.dashboard.briefs import briefs
from crossdiff.dashboard.catalogue import Catalogue, Coder
from crossdiff.dashboard.lists import Place, kept
from crossdiff.dashboard.live_actions import Done, as_json
from crossdiff.dashboard.live_form import Form
from crossdiff.dashboard.live_views import Shared, shared_character, show, view_of
from crossdiff.dashboard.readings import Part, Reading
from crossdiff.dashboard.search import Search
from crossdiff.report.cards import Display

READING = Reading(
    texts=("<s>", "caf<0xC3>", "<0xA9>", " is", " <0xF0><0x9F>"),
    data=(b"", b"caf\xc3", b"\xa9", b"", b" \xf0\x9f"),
    ids=(0, 70, 71, 72, 73),
    flags=(1, 4, 4, 8, 8),
    token=np.array([2, 2, 3]),
    latent=np.array([3, 5, 3]),
    v=np.array([2.0, 1.0, 0.5], np.float32),
    answer_from=3,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_run(tmp_path_factory.mktemp("runs"))
    add_strengths(directory / "batchtopk")
    return directory


@pytest.fixture(scope="module")
def coder(run: Path) -> Coder:
    return next(coder for coder in Catalogue([run]) if coder.name == "batchtopk")


def test_a_kept_reading_has_its_bytes() -> None:
    again = Reading.from_json(json.loads(json.dumps(READING.as_json())))
    assert again.data == READING.data and again.texts == READING.texts and again.ids == READING.ids


def test_a_live_text_has_one_link_per_character(coder: Coder) -> None:
    shown = show(coder, Done(Form(order="active"), "answer-chat", (Part(READING, "chat model", " is"),)), "key")
    (text,) = shown.texts
    assert [(piece.text, piece.first, piece.n) for piece in text.prompt] == [("<s>", 0, 1), ("café", 1, 2)]
    assert "<0xA9>\n2 latents active · token id 71 · position 2" in text.prompt[1].title
    assert text.answer is not None and [piece.text for piece in text.answer] == [" is", " <0xF0><0x9F>"]


def test_only_the_tokens_of_the_answer_are_marked_as_written(coder: Coder) -> None:
    """The third token is the second half of a character: the third piece is the fourth token."""
    view = view_of(coder, READING, 3)
    assert [("written" in piece.classes, piece.first) for piece in view.pieces] == [
        (False, 0),
        (False, 1),
        (True, 3),
        (True, 4),
    ]
    assert view.pieces[1].is_peak


def test_the_page_of_a_part_names_the_character() -> None:
    assert [shared_character(READING, at) for at in (0, 1, 2, 4)] == [None, Shared("café", 1, 2), Shared("café", 1, 2), None]


def test_programs_get_the_bytes_of_parts(coder: Coder) -> None:
    (text,) = as_json(coder, Done(Form(), "read", (Part(READING),)), "/address")["texts"]
    assert [token.get("bytes") for token in text["tokens"]] == [None, "636166c3", "a9", None, "20f09f"]


def test_lists_show_and_find_whole_words(run: Path, coder: Coder, tmp_path: Path) -> None:
    found = briefs(coder, [3], "café")[3]
    assert found.snippet is not None and found.matches
    assert next(piece.text for piece in found.snippet.pieces if piece.is_peak) == "café"
    search = Search(coder, tmp_path)
    search.build()
    assert 3 in search.find("café").latents and not len(search.find("0xC3").latents)
    page = requests_to(run, tmp_path).get(BATCHTOPK).text
    assert "<0x" not in page and "&lt;0x" not in page and "\N{REPLACEMENT CHARACTER}" not in page


@pytest.mark.parametrize(("listed", "changes", "expected"), [
    ("", {}, ""), ("", {"raw": True}, "?whitespace=raw"), ("?q=a&list=1", {}, "?q=a&list=1"),
    ("?q=a&list=1", {"whole": True, "each": True}, "?q=a&list=1&context=whole&tint=each"),
])  # fmt: skip
def test_links_keep_the_list_and_the_display(listed: str, changes: dict[str, Any], expected: str) -> None:
    place = Place(1, 2, None, 5, "/list", listed) if listed else None
    assert kept(place, Display(), **changes) == expected
