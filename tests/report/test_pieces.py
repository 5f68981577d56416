"""The pieces of an example: characters of several tokens, values below 0, the tint of each example or of all, old databases."""

from __future__ import annotations

import base64
import hashlib
import re
import sqlite3
from pathlib import Path

import numpy as np

from crossdiff.latents.example_database import write_database
from crossdiff.report.cards import Display, example_views, pieces
from crossdiff.report.examples import Context, Example, ExampleDatabase, Histogram, Token, Tokens, read_examples
from crossdiff.report.histogram import BOTTOM, HEIGHT, histogram_view
from crossdiff.report.templating import environment, fragment

CAFE = (Token(" caf<0xC3>", 4, 0.0, 70, b" caf\xc3"), Token("<0xA9>", 4, 2.0, 71, b"\xa9"), Token(" is", 4, -1.0, 72))


def test_tokens_of_one_character_are_one_piece_with_every_value() -> None:
    first, second = pieces(Context(CAFE, 1, False, False, start=30), 2.0)
    assert (first.text, first.classes, first.first, first.n) == (" café", "t a8 peak", 0, 2)
    assert first.title == (
        " café is 2 tokens\n caf<0xC3>\nnot active · token id 70 · position 30\n<0xA9>\nvalue 2.00 · token id 71 · position 31"
    )
    assert (second.text, second.classes, second.first, second.speaker) == (" is", "t n4", 2, None)
    assert "value \N{MINUS SIGN}1.00 · token id 72 · position 32" in second.title


def test_a_part_whose_neighbour_is_cut_off_shows_its_bytes() -> None:
    (only,) = pieces(Context(CAFE[1:2], 0, True, True), 2.0)
    assert only.text == "<0xA9>"
    assert "\N{REPLACEMENT CHARACTER}" not in fragment(views=example_views([example((1.0, 2.0))], 2.0, Display()))


def example(values: tuple[float, ...]) -> Example:
    n = len(values)
    tokens = Tokens(np.arange(n, dtype=np.int32), np.zeros(n, np.uint8), np.array(values, np.float32), {0: "a"}, {})
    return Example("top", None, None, None, None, int(np.argmax(values)), max(values), tokens)


def test_the_tint_is_relative_to_all_examples_or_to_each() -> None:
    both = [example((4.0, 1.0)), example((0.5, 1.0))]
    over_all, each = (example_views(both, 4.0, Display(each=each)) for each in (False, True))
    assert [[piece.classes for piece in view.pieces] for view in over_all] == [["t a8 peak", "t a2"], ["t a1", "t a2 peak"]]
    assert [[piece.classes for piece in view.pieces] for view in each] == [["t a8 peak", "t a2"], ["t a4", "t a8 peak"]]
    assert Display(raw=True)._replace(each=True).pairs == [("whitespace", "raw"), ("tint", "each")] and not Display().pairs


def test_an_older_database_shows_the_number_of_a_token_without_text(tmp_path: Path) -> None:
    class Parts:
        def decode(self, ids: list[int]) -> str:
            return "\N{REPLACEMENT CHARACTER}" if ids[0] == 1 else "x"

        def convert_ids_to_tokens(self, token_id: int) -> str:
            return "Ã"

    path = tmp_path / "examples.sqlite"
    ids, flags = np.array([0, 1], "<i4").tobytes(), bytes(2)
    active = np.array([1], "<i4").tobytes(), np.array([2.0], "<f4").tobytes()
    write_database(path, [(0, None, None, None, ids, flags)], iter([(0, "top", None, 0, 0, 1, 2.0, *active)]), Parts(), 1)
    (new,) = read_examples(path, [0])[0]
    assert [(token.text, token.data) for token in new.tokens] == [("x", b""), ("<0xC3>", b"\xc3")]
    with sqlite3.connect(path) as database:
        database.executescript(
            "UPDATE vocabulary SET text = char(0xFFFD) WHERE token_id = 1; ALTER TABLE vocabulary DROP COLUMN bytes; "
            "DROP TABLE histograms; DROP TABLE correlated"
        )
    (old,) = read_examples(path, [0])[0]
    assert [token.text for token in old.tokens] == ["x", "[token 1]"]
    opened = ExampleDatabase(path)
    assert not opened.has_strengths and opened.histogram(0) is None and opened.correlated(0) == []
    assert [text for _, text in opened.characters([0, 1, 0])] == ["x", "[token 1]", "x"]


def test_the_bars_stand_on_a_logarithmic_axis() -> None:
    view = histogram_view(Histogram(0.5, (1000, 0, 10)), 0.02)
    # A power of ten is room / (3 + 0.25) high, and a quarter of one is below the first.
    room = HEIGHT - BOTTOM - 8
    assert [bar.height for bar in view.bars] == [room, round(room * 1.25 / 3.25, 2)]
    assert [(bar.span, bar.tokens) for bar in view.bars] == [("0 to 0.500", "1,000"), ("1.00 to 1.50", "10")]
    assert [tick.text for tick in view.up] == ["1", "10", "100", "1,000"] and view.across[-1].text == "1.50"
    assert view.summary.startswith("1,010 tokens with v above 0, which are 2.0% of the analysed ones")


def test_the_export_runs_its_one_script_and_no_other() -> None:
    page = environment().get_template("export.html.j2").render(title="t", concepts=[], cards=[])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in page and "unsafe-inline'; img" in page
