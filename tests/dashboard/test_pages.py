"""Pages of a synthetic run: what they show, how the table is asked, and that no text of a run becomes markup."""

from __future__ import annotations

import io
import json
import re
import shutil
import sqlite3
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

pytest.importorskip("fastapi")

from showing import BATCHTOPK, CONCEPTS, DANGER, requests_to, write_run

from crossdiff.cli import run_command
from crossdiff.dashboard.catalogue import slugs
from crossdiff.dashboard.live import Live
from crossdiff.dashboard.queries import Query, parse, select
from crossdiff.dashboard.search import phrases
from crossdiff.errors import UserError
from crossdiff.report.examples import ExampleDatabase

HTMX = {"hx-request": "true"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def client(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = requests_to(run, tmp_path_factory.mktemp("cache"))
    for _ in range(100):  # the search index is built in the background
        if "index is being built" not in made.get(BATCHTOPK).text:
            return made
        time.sleep(0.05)
    raise AssertionError("no search index after 5 s")


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def latents_of(page: str) -> list[int]:
    """The latents of the table's rows, in their order."""
    rows = [
        attributes["data-href"] or "" for tag, attributes in Elements(page).found if tag == "tr" and "data-href" in attributes
    ]
    return [int(href.partition("?")[0].rpartition("/")[2]) for href in rows]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        BATCHTOPK,
        f"{BATCHTOPK}?q=script",
        f"{BATCHTOPK}/latent/3",
        f"{BATCHTOPK}/latent/3?context=whole&whitespace=raw",
        CONCEPTS,
        f"{CONCEPTS}?every=true&verdict=chat_specific",
        f"{CONCEPTS}/0",
        f"{CONCEPTS}/0?context=whole&whitespace=raw",
    ],
)
def test_no_text_of_a_run_becomes_markup(client: Any, path: str) -> None:
    page = client.get(path)
    assert page.status_code == 200
    for tag, attributes in Elements(page.text).found:
        assert tag != "img"
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "script":  # scripts come from this server; what is inline is data
            own = attributes.get("src", "").startswith(("/static/", "/popover.js"))
            assert own or attributes["type"] == "application/json"
        for name in ("src", "href", "action", "hx-get"):
            assert (attributes.get(name) or "/").startswith(("/", "#", "data:,")) and not (
                attributes.get(name) or ""
            ).startswith("//")
    assert "alert(1)" not in page.text.replace("&lt;script&gt;alert(1)", "") and "4011" not in page.text


def test_the_danger_is_shown_as_text(client: Any) -> None:
    page = client.get(f"{BATCHTOPK}/latent/3").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 1337 * 3 }}" in page
    assert DANGER not in page


def test_a_query_is_text_as_well(client: Any) -> None:
    page = client.get(BATCHTOPK, params={"q": DANGER, "f": f"verdict={DANGER}"})
    assert page.status_code == 200
    assert DANGER not in page.text and latents_of(page.text) == []
    assert "No latent matches." in page.text


def test_filters_sorting_and_pages(client: Any) -> None:
    """Of 60 latents the first 7 are chat-specific; rank_sum is 2 * latent + 2; 3 are undecided and 3 dead (NaN)."""
    page = client.get(f"{BATCHTOPK}?f=verdict=chat_specific&sort=latent&dir=desc").text
    assert latents_of(page) == [6, 5, 4, 3, 2, 1, 0]
    assert latents_of(client.get(f"{BATCHTOPK}?f=rank_sum:10:14").text) == [4, 5, 6]
    first, last = (latents_of(client.get(f"{BATCHTOPK}?page={number}").text) for number in (1, 3))
    assert len(first) == 25 and len(last) == 10
    assert last[-6:] == [11, 12, 13, 14, 15, 16]  # undefined values come last
    assert latents_of(client.get(f"{BATCHTOPK}?page=99").text) == last


def test_the_table_ranks_and_shows_both_variants_the_one_that_ranks_first(run: Path, client: Any) -> None:
    """With bias every nu is 2 lower; latent 20 has a nu_error of 7.5, so that it comes after all that may be ranked."""
    page = client.get(BATCHTOPK).text
    assert page.index("nu_reconstruction (without bias)</a>") < page.index("nu_reconstruction (with bias)</a>")
    assert 'data-x="nu_error" data-y="nu_reconstruction_nobias"' in page
    table = pl.read_parquet(run / "batchtopk" / "latents.parquet")
    assert select(table, Query(), None)["latent"].to_list() == [*range(11), *range(17, 20), *range(21, 60), 20, *range(11, 17)]
    low = pl.when(pl.col("latent") == 2).then(-0.2).otherwise("nu_reconstruction_nobias")
    ranked = select(table.with_columns(nu_reconstruction_nobias=low), Query(), None)["latent"].to_list()
    assert ranked[:7] == [0, 1, 3, 4, 5, 6, 2]  # still before those that are not chat-specific
    latent = client.get(f"{BATCHTOPK}/latent/3").text
    assert latent.index("<dt>nu_reconstruction (without bias)</dt>") < latent.index("<dt>nu_reconstruction (with bias)</dt>")


def test_a_form_without_script_adds_its_filter(client: Any) -> None:
    page = client.get(f"{BATCHTOPK}?f=verdict=chat_specific&column=latent&min=5&max=&equals=").text
    assert latents_of(page) == [5, 6]


@pytest.mark.parametrize("direction", ["asc", "desc"])
def test_every_column_sorts_and_filters(run: Path, direction: str) -> None:
    table = pl.read_parquet(run / "batchtopk" / "latents.parquet")
    for column, kind in table.schema.items():
        rows = select(table, parse([("sort", column), ("dir", direction)], table.schema), None)
        assert rows.height == 60
        if kind.is_numeric():
            median = table[column].drop_nans().median()
            if isinstance(median, float):
                query = parse([("f", f"{column}:{median!r}:")], table.schema)
                expected = sum(1 for value in table[column] if value is not None and value >= median)
                assert select(table, query, None).height == expected, column


def test_search_finds_explanations_and_examples(client: Any) -> None:
    assert latents_of(client.get(f"{BATCHTOPK}?q=morning greet").text) == [5]
    assert len(latents_of(client.get(f"{BATCHTOPK}?q=thanks").text)) == 20  # those with examples
    assert latents_of(client.get(f"{BATCHTOPK}?q=sailing").text) == []
    assert latents_of(client.get(f"{BATCHTOPK}?q=outdated").text) == []  # said of a crosscoder that is gone
    for odd in ('"', "a OR", "NEAR(", "*", "explanation:x", "\x00"):
        assert client.get(BATCHTOPK, params={"q": odd}).status_code == 200


def test_the_last_word_may_be_the_beginning_of_one() -> None:
    assert [phrase.ranges for phrase in phrases('Who "Caf\u00e9')] == [[("who", "who\0")], [("cafe", "cafe\U0010ffff")]]
    assert phrases("*()") == []


def test_htmx_gets_the_table_alone_and_its_address(client: Any) -> None:
    part = client.get(f"{BATCHTOPK}?f=latent:3:4&page=1", headers=HTMX)
    assert "<html" not in part.text and part.headers["hx-push-url"] == f"{BATCHTOPK}?f=latent%3A3%3A4"
    whole = client.get(BATCHTOPK, headers=HTMX | {"hx-history-restore-request": "true"})
    assert "<html" in whole.text


def test_downloads_hold_the_rows_that_are_asked_for(client: Any, run: Path) -> None:
    rows = pl.read_parquet(io.BytesIO(client.get(f"{BATCHTOPK}/latents.parquet?f=latent:3:4").content))
    assert rows["latent"].to_list() == [3, 4]
    answer = client.get(f"{BATCHTOPK}/latents.csv?f=verdict=dead")
    assert answer.headers["content-disposition"] == 'attachment; filename="a-b-1-batchtopk-latents.csv"'
    assert pl.read_csv(answer.content)["latent"].to_list() == [14, 15, 16]


def test_points_are_all_there(client: Any) -> None:
    """54 of 60 latents have both nu."""
    for colour, n_traces in (("verdict", 3), ("template", 1)):
        figure = json.loads(client.get(f"{BATCHTOPK}/points.json?colour={colour}").content)
        assert len(figure["data"]) == n_traces
        assert sorted(latent for trace in figure["data"] for latent in trace["customdata"]) == [*range(11), *range(17, 60)]
    assert client.get(f"{BATCHTOPK}/points.json?colour=x").status_code == 422


def test_latent_page_links_its_neighbours_and_twins(client: Any) -> None:
    for latent, linked in ((0, (1, 9, 20)), (20, (0, 19, 21))):
        links = {attributes.get("href") for tag, attributes in Elements(client.get(f"{BATCHTOPK}/latent/{latent}").text).found}
        assert {f"{BATCHTOPK}/latent/{other}" for other in linked} <= links
    assert 'rel="prev"' not in client.get(f"{BATCHTOPK}/latent/0").text


def test_percentile_among_shared_latents(client: Any, run: Path) -> None:
    table = pl.read_parquet(run / "batchtopk" / "latents.parquet")
    shared = table.filter(pl.col("verdict") == "shared")["delta_norm"]
    smaller = sum(value < table["delta_norm"][30] for value in shared) / len(shared)
    assert f"{100 * smaller:.0f}% of them in delta_norm" in client.get(f"{BATCHTOPK}/latent/30").text


def test_white_space_raw_and_as_signs(client: Any) -> None:
    pages = (client.get(f"{BATCHTOPK}/latent/3?whitespace={kind}").text for kind in ("signs", "raw"))
    # What a token's title says of it has signs in both.
    signs, raw = (re.sub(r'title="[^"]*"', "", page[page.index('id="examples"') :]) for page in pages)
    assert "\N{RIGHTWARDS ARROW TO BAR}" in signs and "\N{RIGHTWARDS ARROW TO BAR}" not in raw


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/run/none/batchtopk", 404),
        ("/run/a-b-1/none", 404),
        ("/run/..%2f..%2fetc/passwd", 404),
        ("/static/..%2fapp.py", 404),
        ("/static/../app.py", 404),
        (f"{BATCHTOPK}/latent/60", 404),
        (f"{BATCHTOPK}/latent/-1", 404),
        (f"{BATCHTOPK}/latent/1e3", 422),
        (f"{BATCHTOPK}/latent/99999999999999999999", 404),
        (f"{BATCHTOPK}/latents.exe", 404),
        (f"{BATCHTOPK}?sort=nope", 422),
        (f"{BATCHTOPK}?dir=up", 422),
        (f"{BATCHTOPK}?page=0", 422),
        (f"{BATCHTOPK}?page=x", 422),
        (f"{BATCHTOPK}?f=verdict:1:2", 422),
        (f"{BATCHTOPK}?f=latent:a:b", 422),
        (f"{BATCHTOPK}?f=latent:nan:", 422),
        (f"{BATCHTOPK}?f=latent", 422),
        (f"{BATCHTOPK}?show=none", 422),
        (f"{BATCHTOPK}/latent?number=x", 422),
        (f"{BATCHTOPK}/live/none/text/0/token/0", 404),
        (f"{BATCHTOPK}/latent/3/lens", 422),
        (f"{BATCHTOPK}/latent/3/sides/99", 404),
    ],
)
def test_malformed_addresses_say_so(client: Any, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert "Traceback" not in answer.text


def test_going_to_a_latent_by_its_number(client: Any) -> None:
    answer = client.get(f"{BATCHTOPK}/latent?number=7")
    assert (answer.status_code, answer.headers["location"]) == (303, f"{BATCHTOPK}/latent/7")


def test_the_run_is_only_read(run: Path, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(run.rglob("*"))}

    before = state()
    client = requests_to(run, tmp_path)
    assert client.get(f"{BATCHTOPK}/latent/3").status_code == 200
    assert state() == before
    database = ExampleDatabase(run / "l1" / "examples.sqlite")
    with database._reading() as connection, pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM examples")


def test_addresses_of_runs_are_plain_and_each_once() -> None:
    assert slugs([Path("x/a b"), Path("y/a&b"), Path("z/<>")]) == ["a-b", "a-b-2", "run"]


def test_export_is_one_self_contained_page(run: Path, tmp_path: Path) -> None:
    (run / "config.yaml").write_text("base: demo/base\nchat: demo/<chat>\n")
    for name in ("l1", "batchtopk"):
        (run / name / "model.safetensors").touch()
    page = tmp_path / "page.html"
    run_command(["export", str(run), "--latents", "3", "5-6", "rotated", "-o", str(page)])
    text = page.read_text()
    cards = [attributes["id"] for tag, attributes in Elements(text).found if tag == "article"]
    assert cards == [f"batchtopk-{latent}" for latent in (3, 5, 6, 7, 8, 9, 10)]
    # Explanations are shown, their tags as text: no element of the page has a source, and its one script is its own.
    assert not any("src" in attributes for _, attributes in Elements(text).found)
    assert [attributes for tag, attributes in Elements(text).found if tag == "script"] == [{}] and "sha256-" in text
    assert "http://" not in text and "https://" not in text
    for wrong, message in (
        ("x", "is not a number"),
        ("60", "expected latents from 0 to 59"),
        ("9-3", "expected latents from 0 to 59"),
    ):
        with pytest.raises(UserError, match=message):
            run_command(["export", str(run), "--latents", wrong, "-o", str(page)])


def test_a_coder_with_one_decoder_has_no_figures_of_two(
    tmp_path: Path, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tiny_settings["crosscoders"]["batchtopk"]
    tiny_settings["crosscoders"] = {"sae": training | {"inputs": {"kind": "single", "source": "base"}}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tiny_settings))
    run_command(["run", str(tmp_path / "run"), "--config", str(tmp_path / "settings.yaml")])
    client = requests_to(tmp_path / "run", tmp_path / "cache")
    page = client.get("/run/run/sae").text
    assert "One decoder: delta_norm and the verdicts need a crosscoder" in page and "How often latents are active" in page
    assert 'class="canvas cloud"' not in page and 'class="brush"' not in page
    home = client.get("/").text
    assert "Explore" in home and "delta_norm of the latents of" not in home
    live = requests_to(tmp_path / "run", tmp_path / "cache", live=True)
    latent = live.get("/run/run/sae/latent/0").text
    assert "Nearest by the decoder direction" in latent
    assert not [
        part for part in ("norm base, chat", "share to base", "No twin", "Logit lens", "Show each model") if part in latent
    ]
    with monkeypatch.context() as patched:
        patched.setattr(Live, "_models", lambda *_: pytest.fail("the models were waited for"))
        for part in ("lens", "sides/0"):
            answer = live.get(f"/run/run/sae/latent/0/{part}")
            assert answer.status_code == 422 and "one decoder" in answer.text


def test_damaged_side_tables_say_what_to_do(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / run.name)
    for name in ("activity", "neighbours", "twins"):
        path = copy / "batchtopk" / f"{name}.parquet"
        whole = path.read_bytes() if path.exists() else None
        for damage in (b"PAR1 and no more", None):
            if damage is None:
                pl.DataFrame({"latent": [0]}).write_parquet(path)
            else:
                path.write_bytes(damage)
            answer = requests_to(copy, tmp_path / "cache").get(f"{BATCHTOPK}/latent/0")
            assert answer.status_code == 422 and "run `crossdiff analyze` again" in unescape(answer.text), (name, damage)
        path.unlink() if whole is None else path.write_bytes(whole)
