"""Lists: what a row says of its latent, searches that weigh active tokens, the place in a list, and fields that are wrong."""

from __future__ import annotations

import re
import shutil
import time
from html import unescape
from pathlib import Path
from typing import Any

import polars as pl
import pytest

pytest.importorskip("fastapi")

from showing import BATCHTOPK, CONCEPTS, requests_to, write_run
from test_pages import HTMX, Elements, latents_of

from crossdiff.dashboard.pages import match_words
from crossdiff.dashboard.queries import page_numbers, parse
from crossdiff.dashboard.search import EXPLAINED, FULL, Found, Search, spans, words
from crossdiff.report.examples import ExampleDatabase
from report.synthetic_run import write_examples

LIST = f"{BATCHTOPK}?f=verdict=chat_specific&sort=latent&dir=desc"
TURNS = [("The", 1), (" know", 1), ("ledge", 1), (" of", 1), (" tides", 1), *[(".", 1)] * 6]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def client(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ready(requests_to(run, tmp_path_factory.mktemp("cache")))


def ready(client: Any) -> Any:
    for _ in range(100):
        if "index is being built" not in client.get(BATCHTOPK).text:
            return client
        time.sleep(0.05)
    raise AssertionError("no search index after 5 s")


def links(page: str, name: str) -> list[str]:
    found = [attributes.get("href") or "" for tag, attributes in Elements(page).found if tag == "a"]
    return [link for link in found if name in link]


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", "", html)))


def cells(page: str, latent: int) -> str:
    """The text of a latent's row."""
    row = page[page.index(f'data-href="{BATCHTOPK}/latent/{latent}?') :]
    return text_of(row[: row.index("</tr>")])


def test_a_row_says_what_its_latent_is_about(run: Path, client: Any) -> None:
    page = client.get(BATCHTOPK).text
    assert "greetings in the morning" in cells(page, 5)
    database = ExampleDatabase(run / "batchtopk" / "examples.sqlite")
    example = database.examples(6, 1, 0)[0]
    token = example.tokens[example.position].text
    assert text_of(token.replace("<", "&lt;")).strip() in cells(page, 6)
    n = len(database.strongest(latents_of(page), 1))
    assert 0 < n < 25 and page.count('class="brief') == n and page.count('peak">') == n  # one token is marked in each


def test_the_strongest_tokens_are_those_of_the_peaks_the_strongest_first(run: Path, tmp_path: Path) -> None:
    """The examples of `write_examples` peak at tokens 8, 9, 10, then 8 again."""
    database = ExampleDatabase(run / "batchtopk" / "examples.sqlite")
    found = database.strongest([3, 2, 59], 5)
    assert set(found) == {2, 3}
    for latent, examples in found.items():
        assert [example.position for example in examples] == [8, 9, 10, 8]
        one = database.examples(latent, 4, 0)
        assert [example.activation for example in examples] == [example.activation for example in one]


def test_a_concept_that_is_explained_labels_its_latents(run: Path, tmp_path: Path) -> None:
    from crossdiff.dashboard.catalogue import Catalogue

    coder = Catalogue([run]).coders["a-b-1", "batchtopk"]
    assert coder.label(4) is None and coder.label(5) == "greetings in the morning"
    assert coder.concepts is not None and coder.concepts.of_latent("batchtopk", 4) == 1
    coder.concepts.__dict__["labels"] = {1: "the end of a list"}
    assert (coder.label(4), coder.label(5), coder.label(30)) == ("the end of a list", "greetings in the morning", None)


def test_words_of_tokens() -> None:
    """ "Knowledge" is one word of two tokens; an accent does not count."""
    where = spans([text for text, _ in TURNS])
    assert where.words == ["the", "knowledge", "of", "tides"]
    assert [list(where.at(at, len(text))) for at, (text, _) in enumerate(TURNS)] == [[0], [1], [1], [2], [3], *[[]] * 6]
    assert words("Caf\u00e9 CAFE\u0301 x_y 3\u00bd") == ["cafe", "cafe", "x", "y", "31\u20442"]


@pytest.fixture
def index(run: Path, tmp_path: Path) -> Search:
    """Of 60 latents, 0 and 1 are given the text of `TURNS`, with the peak on `ledge` in 0 and on `The` in 1."""
    from contextlib import closing
    from sqlite3 import connect

    import numpy as np

    from crossdiff.dashboard.catalogue import Catalogue

    own = shutil.copytree(run, tmp_path / run.name)
    path = own / "batchtopk" / "examples.sqlite"
    path.unlink()
    write_examples(path, [0, 1, 2], TURNS)
    active = {0: ([2, 4], [4.0, 1.0]), 1: ([0], [2.0]), 2: ([3], [1.0])}
    with closing(connect(path)) as database, database:
        for latent, (positions, values) in active.items():
            arrays = np.array(positions, "<i4").tobytes(), np.array(values, "<f4").tobytes()
            change = "UPDATE examples SET position = ?, positions = ?, activations = ? WHERE latent = ?"
            database.execute(change, (positions[0], *arrays, latent))
    search = Search(Catalogue([own]).coders["a-b-1", "batchtopk"], tmp_path / "cache" / "search")
    search.build()
    assert search.state == "ready"
    return search


def test_a_word_counts_by_how_active_the_latent_is_on_it(index: Search) -> None:
    """Latent 0 is fully active on a token of `knowledge` and a quarter as active on `tides`; 1 and 2 only have the words."""
    found = index.find("know")
    assert (found.latents.tolist(), found.weights.tolist()) == ([0, 1, 2], [FULL, 0, 0])
    assert (found.n_explained, found.n_active) == (0, 1)
    both = index.find("tides knowledge")
    assert (both.latents.tolist(), both.weights.tolist()) == ([0, 1, 2], [FULL + FULL // 4, 0, 0])
    assert index.find("greetings MORN").weights.tolist() == [2 * EXPLAINED]
    assert index.find("know greetings").latents.tolist() == []  # the first word is not a beginning
    assert index.find("...").latents.tolist() == []


def test_a_search_is_ordered_by_its_matches_unless_a_column_is(index: Search, tmp_path: Path) -> None:
    client = requests_to(index.coder.directory, tmp_path / "cache")
    page = client.get(f"{BATCHTOPK}?q=the+").text
    assert latents_of(page) == [5, 1, 0, 2]  # in its explanation, on an active token, and elsewhere
    words_of = "4 latents with these words: 1 in their explanation, 1 on tokens on which they are active, 2 only elsewhere"
    assert words_of in text_of(page)
    assert latents_of(client.get(f"{BATCHTOPK}?q=the&sort=latent&dir=desc").text) == [5, 2, 1, 0]
    assert latents_of(client.get(f"{BATCHTOPK}?q=the&f=latent:1:4").text) == [1, 2]
    assert "of which the filters leave 2" in client.get(f"{BATCHTOPK}?q=the&f=latent:1:4").text
    # The snippet marks the word that was looked for, and not the strongest token.
    snippet = re.search(r'class="brief matched">(.*?)</td>', client.get(f"{BATCHTOPK}?q=tides").text, re.S)
    assert snippet is not None and re.search(r'peak">\s*tides<', snippet[1])


def test_what_a_search_has_found_in_words() -> None:
    import numpy as np

    found = Found(np.arange(7), np.zeros(7, np.int64), 0, 7)
    assert match_words(found, 7) == "7 latents with these words: 7 on tokens on which they are active"
    assert match_words(Found(np.arange(0), np.arange(0), 0, 0), 0) == ""


def test_a_latent_of_a_list_leads_to_the_next_of_the_list(client: Any) -> None:
    """The chat-specific latents are 0 to 6, here from high to low."""
    first = links(client.get(LIST).text, "/latent/")[0]
    assert first.startswith(f"{BATCHTOPK}/latent/6?")
    page = client.get(first).text
    assert "1 of 7 in this list" in text_of(page) and 'rel="prev"' not in page
    following = next(link for link in links(page, "/latent/5?"))
    page = client.get(following).text
    assert "2 of 7 in this list" in text_of(page)
    assert [link.partition("?")[0] for link in links(page, "list=1")][:2] == [f"{BATCHTOPK}/latent/{n}" for n in (6, 4)]
    back = next(link for link in links(page, "sort=latent") if "/latent" not in link)
    assert latents_of(client.get(back).text) == [6, 5, 4, 3, 2, 1, 0]
    assert "list=1" in links(page, "context=whole")[0]  # a change of the examples' form stays in the list


def test_the_list_of_a_latent_on_the_second_page_leads_back_to_it(client: Any) -> None:
    page = client.get(f"{BATCHTOPK}?page=2").text
    latent = latents_of(page)[0]
    opened = client.get(f"{BATCHTOPK}/latent/{latent}?list=1").text
    assert "26 of 60 in this list" in text_of(opened) and f"{BATCHTOPK}?page=2#row-{latent}" in links(opened, "page=2")


def test_without_a_list_or_outside_of_it_latents_follow_by_number(client: Any) -> None:
    for path in (f"{BATCHTOPK}/latent/20", f"{BATCHTOPK}/latent/20?f=verdict=chat_specific&list=1"):
        page = client.get(path).text
        assert "in this list" not in text_of(page)
        assert {f"{BATCHTOPK}/latent/19", f"{BATCHTOPK}/latent/21"} <= set(links(page, "/latent/"))
    assert client.get(f"{BATCHTOPK}/latent/20?f=nope:1:&list=1").status_code == 422


def test_a_concept_of_a_list_leads_to_the_next_of_the_list(client: Any) -> None:
    """The replicated ones are 0, 2 and 1 in this order; of all, the chat-specific ones are 0, 2 and 3."""
    page = client.get(links(client.get(CONCEPTS).text, f"{CONCEPTS}/2?")[0]).text
    assert "2 of 3 in this list" in text_of(page)
    assert [link.partition("?")[0] for link in links(page, f"{CONCEPTS}/")][:2] == [f"{CONCEPTS}/0", f"{CONCEPTS}/1"]
    page = client.get(f"{CONCEPTS}/2?verdict=chat_specific&every=true").text
    assert "2 of 3 in this list" in text_of(page) and links(page, f"{CONCEPTS}/3?verdict=chat_specific&every=true")
    assert "in this list" not in text_of(client.get(f"{CONCEPTS}/2").text)
    assert client.get(f"{CONCEPTS}/2?verdict=x&every=true").status_code == 422


@pytest.mark.parametrize(
    ("query", "field", "message"),
    [
        ("column=delta_norm&min=abc", "min", "'abc' is not a finite number; write it like 0.25"),
        ("column=delta_norm&min=0&max=nan", "max", "'nan' is not a finite number"),
        ("column=delta_norm", "min", "give the smallest or largest delta_norm"),
        ("min=0.5", "column", "choose the column of the new filter"),
        ("column=nope&min=1", "column", "there is no column 'nope'"),
        ("column=verdict&min=1", "equals", "verdict is not a column of numbers"),
    ],
)
def test_a_wrong_field_is_marked_and_the_table_stays(client: Any, query: str, field: str, message: str) -> None:
    for headers in ({}, HTMX):
        answer = client.get(f"{LIST}&{query}", headers=headers)
        assert answer.status_code == 422 and message in unescape(answer.text)
        assert latents_of(answer.text) == [6, 5, 4, 3, 2, 1, 0]
        marked = [attributes["name"] for _, attributes in Elements(answer.text).found if "aria-invalid" in attributes]
        assert marked == [field]
        if headers:
            assert "abc" not in answer.headers["hx-push-url"] and "Unprocessable" not in answer.text
    assert client.get(f"{BATCHTOPK}/latents.csv?{query}").status_code == 422  # and never a file without the filter


def test_what_was_typed_is_still_there(client: Any) -> None:
    page = client.get(f"{BATCHTOPK}?column=delta_norm&min=abc&max=0.7").text
    typed = {attributes.get("name"): attributes.get("value") for tag, attributes in Elements(page).found if tag == "input"}
    assert (typed["min"], typed["max"]) == ("abc", "0.7") and "<option selected>delta_norm" in page


def test_pages_by_their_numbers() -> None:
    assert page_numbers(1, 1) == [1]
    assert page_numbers(5, 9) == [1, None, 3, 4, 5, 6, 7, None, 9]
    assert page_numbers(2, 4) == [1, 2, 3, 4]


def test_a_search_without_sort_has_no_sort_in_its_address(run: Path) -> None:
    schema = pl.read_parquet(run / "batchtopk" / "latents.parquet").schema
    query = parse([("q", "know"), ("dir", "asc")], schema)
    assert query.column == "" and query.address() == "?q=know"
    assert parse([], schema).column == "rank_sum" and parse([("sort", "rank_sum")], schema).address() == "?"
    assert query.address(search="", sort="rank_sum", descending=True) == "?sort=rank_sum&dir=desc"


def test_what_a_point_is_about(client: Any) -> None:
    page = client.get(f"{BATCHTOPK}/latent/5/brief").text
    assert "greetings in the morning" in page and "strongest tokens" in page and "<html" not in page
    assert client.get(f"{BATCHTOPK}/latent/60/brief").status_code == 404


def test_stored_promoted_tokens_need_no_model(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / run.name)
    row = {"latent": 3, "direction": "chat direction, chat model", "side": "up", "rank": 1, "token": " tide", "logit": 2.5}
    rows = [row, row | {"rank": 0, "token": "<b>"}, row | {"side": "down", "token": "shore"}, row | {"latent": 4}]
    pl.DataFrame(rows).write_parquet(own / "batchtopk" / "promoted.parquet")
    client = requests_to(own, tmp_path / "cache")
    page = client.get(f"{BATCHTOPK}/latent/3").text
    assert page.index("&lt;b&gt;") < page.index(" tide") < page.index("shore") and "Show the tokens" not in page
    assert "Logit lens" not in client.get(f"{BATCHTOPK}/latent/5").text  # not stored, and no models without --live
    (own / "batchtopk" / "promoted.parquet").write_bytes(b"PAR1 and no more")
    answer = requests_to(own, tmp_path / "cache").get(f"{BATCHTOPK}/latent/3")
    assert answer.status_code == 422 and "run `crossdiff analyze` again" in unescape(answer.text)


def chip(page: str, verdict: str) -> str:
    """The address of a verdict's chip, whose text begins with its glyph."""
    found = re.findall(r'<a class="chip[^"]*" href="([^"]*)"[^>]*><span class="sign"[^>]*>[^<]*</span>&nbsp;([^<]*)</a>', page)
    return next(unescape(link) for link, name in found if name == verdict)


def test_a_verdict_is_added_to_the_query_and_removed_again(client: Any) -> None:
    """Latents 0 to 6 are chat-specific; the others of the first twenty have other verdicts."""
    asked = f"{BATCHTOPK}?q=the&sort=latent&dir=desc&f=latent%3A%3A20&page=1"
    one = chip(client.get(asked).text, "chat-specific")
    assert one == f"{BATCHTOPK}?q=the&sort=latent&dir=desc&f=latent%3A%3A20&f=verdict%3Dchat_specific"
    assert "verdict is chat-specific" in text_of(client.get(one).text)
    assert chip(client.get(one).text, "chat-specific") == asked.removesuffix("&page=1")


def test_several_verdicts_combine(run: Path, client: Any) -> None:
    table = pl.read_parquet(run / "batchtopk" / "latents.parquet")
    other = next(verdict for verdict in table["verdict"].to_list() if verdict != "chat_specific")
    both = table.filter(pl.col("verdict").is_in(["chat_specific", other]), pl.col("latent") >= 3)
    page = client.get(f"{BATCHTOPK}?f=verdict=chat_specific&f=verdict={other}&f=latent:3:&sort=latent").text
    assert latents_of(page) == sorted(both["latent"].to_list())[:25] and both["verdict"].n_unique() == 2


def test_words_in_quotes_stay_together(index: Search, tmp_path: Path) -> None:
    """The texts are "The knowledge of tides". "of knowledge" is nowhere, and `greetings in the morning` explains latent 5."""
    assert index.find('"knowledge of"').latents.tolist() == [0, 1, 2]
    assert index.find('"knowledge tides"').latents.tolist() == index.find('"of knowledge"').latents.tolist() == []
    assert index.find('"in the" greetings').latents.tolist() == [5] and not len(index.find('"the in" greetings').latents)
    assert index.find('"knowledge of ti').latents.tolist() == [0, 1, 2]  # the open end may be the beginning of a word
    assert index.find('"knowledge of ti"').latents.tolist() == []
    client = requests_to(index.coder.directory, tmp_path / "cache")
    page = client.get(BATCHTOPK, params={"q": '"of tides"'}).text
    assert latents_of(page) == [2, 0, 1]  # as active as anywhere on `of`, a quarter as active on `tides`, on neither
    opened = client.get(f"{BATCHTOPK}/latent/0", params={"q": '"of tides"', "list": "1"}).text
    outlined = {text_of(text).strip() for text in re.findall(r'class="t[^"]*found"[^>]*>([^<]*)<', opened)}
    assert outlined == {"of", "tides", "outlined"}
    assert 'found"' not in client.get(f"{BATCHTOPK}/latent/0").text


def test_words_side_by_side_come_first(index: Search) -> None:
    """Without quotes all three have both words; adjacent ones count more than any weight of words apart."""
    apart, adjacent = index.find("tides knowledge"), index.find("knowledge of")
    assert (apart.n_adjacent, adjacent.n_adjacent) == (0, 3)
    assert adjacent.weights.min() > 12 * EXPLAINED >= apart.weights.max()
    assert "3 have them side by side" in match_words(adjacent, 3)


def test_the_list_leads_back_to_its_row(client: Any) -> None:
    for opened, row in (
        (links(client.get(LIST).text, "/latent/5?")[0], "row-5"),
        (f"{CONCEPTS}/2?verdict=&every=false", "row-2"),
    ):
        up = next(
            at["href"] for tag, at in Elements(client.get(opened).text).found if at.get("data-key") == "u" and "#" in at["href"]
        )
        assert up.endswith(f"#{row}")
        assert [at["id"] for _, at in Elements(client.get(up).text).found if at.get("id") == row] == [row]


def test_a_number_that_is_none_is_refused_in_plain_words(client: Any) -> None:
    answer = client.get(f"{BATCHTOPK}/latent?number=abc")
    assert answer.status_code == 422 and "number is 'abc': expected a whole number." in unescape(answer.text)


def test_concepts_that_were_replaced_are_out_of_date(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / run.name)
    shutil.rmtree(own / "concepts")
    client = requests_to(own, tmp_path / "cache")
    assert "has no concepts yet" in client.get("/").text
    (own / "old" / "20260101-000000-1-2-causal-concepts").mkdir(parents=True)
    assert "has no concepts yet" in requests_to(own, tmp_path / "cache").get("/").text
    (own / "old" / "20260101-000000-1-2-concepts").mkdir()
    page = text_of(requests_to(own, tmp_path / "cache").get("/").text)
    assert "out of date: made from an earlier analysis" in page and "has no concepts yet" not in page


def test_reasons_have_true_minus_signs() -> None:
    from crossdiff.report.wording import reason

    stored = "nu_error -0.00 [-0.01, 0.00] and chat-specific 0.5-0.6"
    assert reason(stored) == "nu_error 0.00 [\N{MINUS SIGN}0.01, 0.00] and chat-specific 0.5-0.6"
