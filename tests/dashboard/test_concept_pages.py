"""The list of a run's concepts, the page of each, and how latents lead to them; runs without concepts."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import polars as pl
import pytest

pytest.importorskip("fastapi")

from showing import BATCHTOPK, CONCEPTS, requests_to, write_run
from test_pages import Elements

from crossdiff.cli import run_command
from crossdiff.errors import UserError
from crossdiff.report.tables import estimate
from crossdiff.report.wording import interval
from report.synthetic_run import concepts_record


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def client(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return requests_to(run, tmp_path_factory.mktemp("cache"))


def links(client: Any, path: str) -> list[str]:
    page = client.get(path)
    assert page.status_code == 200
    return [attributes.get("href") or "" for tag, attributes in Elements(page.text).found if tag == "a"]


def concepts_in(client: Any, path: str) -> list[int]:
    """The concepts that a page links to, in their order."""
    found = (re.fullmatch(CONCEPTS + r"/(\d+)(?:\?.*)?", link) for link in links(client, path))
    return list(dict.fromkeys(int(match[1]) for match in found if match))


def test_the_first_page_begins_with_the_concepts_of_the_chat_model(client: Any) -> None:
    page = client.get("/").text
    assert (
        page.index("The chat model has 2 concepts") < page.index("What it has learned") < page.index("counts of single latents")
    )
    assert concepts_in(client, "/") == [0, 2] and CONCEPTS in links(client, "/")


def test_a_concept_has_both_variants_in_each_training(run: Path, client: Any) -> None:
    page = client.get(f"{CONCEPTS}/0").text
    row = pl.read_parquet(run / "concepts" / "trainings.parquet").row(0, named=True)
    cells = re.findall(r'<td data-label="(nu_[^"]*)">([^<]*)</td>', page)[:3]
    names = ("nu_error", "nu_reconstruction_nobias", "nu_reconstruction")
    assert [name for name, _ in cells] == ["nu_error", "nu_reconstruction (without bias)", "nu_reconstruction (with bias)"]
    assert [value for _, value in cells] == [interval(estimate(row, name)) for name in names]


def test_the_list_has_the_replicated_ones_then_all(client: Any) -> None:
    """Chat-specific ones first, by energy: of 0, 2 and the unconfirmed 3, then the rotated 1, then the artifact 4."""
    assert concepts_in(client, CONCEPTS) == [0, 2, 1]
    assert concepts_in(client, f"{CONCEPTS}?every=true") == [0, 2, 1, 3, 4]
    assert concepts_in(client, f"{CONCEPTS}?every=true&verdict=chat_specific") == [0, 2, 3]
    assert concepts_in(client, f"{CONCEPTS}?verdict=base_specific") == []
    assert concepts_in(client, f"{CONCEPTS}?page=99") == [0, 2, 1]


def test_a_concept_leads_to_its_crosscoders_and_to_steering(run: Path, tmp_path: Path) -> None:
    """Concept 1 is in both crosscoders as latent 4. Concept 0 lacks what `live` needs only where it has no latent."""
    live = requests_to(run, tmp_path, live=True)
    found = links(live, f"{CONCEPTS}/1")
    for path in ("/run/a-b-1/l1", BATCHTOPK):
        assert path in found and f"{path}/live?concept=1" in found
        page = live.get(f"{path}/live?concept=1").text
        assert re.search(r'name="concept" value="1"', page)
        named = page.partition('id="named-concept"')[2].partition("<select")[0]
        assert f'href="{CONCEPTS}/1"' in named and "latent 4" in named
        assert "latent 4" in live.get(f"{path}/live/concept?concept=1").text
    assert "there is no concept 99" in live.get(f"{BATCHTOPK}/live/concept?concept=99").text
    assert live.get(f"{BATCHTOPK}/live?concept=99").status_code == 422
    assert live.get(f"{BATCHTOPK}/live/concept?concept=").text.strip() == ""


def test_a_concept_links_its_latents_where_they_have_a_page(client: Any) -> None:
    """Concept 1 is in all four trainings, as latent 4 of each; the two repetitions have no pages."""
    found = [link for link in links(client, f"{CONCEPTS}/1") if "/latent/" in link]
    assert found == ["/run/a-b-1/l1/latent/4", f"{BATCHTOPK}/latent/4"]
    page = unescape(client.get(f"{CONCEPTS}/1").text)
    for part in ("batchtopk-seed2", "In each training alone", "chat minus base direction, chat model", "more likely", "prose"):
        assert part in page
    assert page.index(" up0") < page.index(" up1")  # promoted tokens in order of their rank, without a model


def test_a_latent_leads_to_its_concept(client: Any) -> None:
    assert concepts_in(client, f"{BATCHTOPK}/latent/4") == [1]
    assert concepts_in(client, f"{BATCHTOPK}/latent/30") == []
    assert "It belongs to no concept" in client.get(f"{BATCHTOPK}/latent/30").text
    assert CONCEPTS in links(client, BATCHTOPK)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"{CONCEPTS}/5", 404), (f"{CONCEPTS}/-1", 404), (f"{CONCEPTS}/x", 422), ("/run/none/concepts", 404),
        ("/run/none/concepts/0", 404), (f"{CONCEPTS}?verdict=%3Cb%3E", 422), (f"{CONCEPTS}?page=x", 422),
        (f"{CONCEPTS}?every=perhaps", 422),
    ],
)  # fmt: skip
def test_malformed_addresses_say_so(client: Any, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status and "Traceback" not in answer.text and "<b>" not in answer.text.split("<main")[1]


def test_without_concepts_every_page_works_and_says_how_to_get_them(run: Path, tmp_path: Path) -> None:
    old = shutil.copytree(run, tmp_path / run.name)
    shutil.rmtree(old / "concepts")
    client = requests_to(old, tmp_path / "cache")
    for path in ("/", BATCHTOPK, f"{BATCHTOPK}/latent/3"):
        page = client.get(path)
        assert page.status_code == 200 and "The command crossdiff concepts RUN groups them" in page.text, path
        assert CONCEPTS not in links(client, path)
    assert client.get(CONCEPTS).headers["location"] == "/"
    assert client.get(f"{CONCEPTS}/0").status_code == 404


def test_one_training_alone_lists_all_concepts(run: Path, tmp_path: Path) -> None:
    single = shutil.copytree(run, tmp_path / run.name)
    record = concepts_record() | {"needed": None, "halves": None}
    (single / "concepts" / "concepts.json").write_text(json.dumps(record | {"trainings": record["trainings"][:1]}))
    path = single / "concepts" / "concepts.parquet"
    pl.read_parquet(path).with_columns(replicated=pl.lit(False)).write_parquet(path)
    client = requests_to(single, tmp_path / "cache")
    # By energy: 3 has 0.3, 0 has 0.2, 2 has 0.05.
    assert concepts_in(client, CONCEPTS) == [3, 0, 2, 1, 4]
    assert "all, including those not replicated" not in client.get(CONCEPTS).text
    assert "one training only" in client.get(f"{CONCEPTS}/0").text


@pytest.mark.parametrize("name", ["activity", "trainings", "promoted"])
def test_damaged_side_tables_say_what_to_do(run: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(run, tmp_path / run.name)
    (copy / "concepts" / f"{name}.parquet").write_bytes(b"PAR1 and no more")
    answer = requests_to(copy, tmp_path / "cache").get(f"{CONCEPTS}/0")
    assert answer.status_code == 422 and "run `crossdiff concepts` again" in unescape(answer.text)


def test_export_writes_the_replicated_concepts_unless_told_otherwise(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    (own / "config.yaml").write_text("base: demo/base\nchat: demo/<chat>\n")
    for name in ("l1", "batchtopk"):
        (own / name / "model.safetensors").touch()
    page = tmp_path / "page.html"

    def cards(*options: str) -> list[str]:
        run_command(["export", str(own), *options, "-o", str(page)])
        return [attributes["id"] or "" for tag, attributes in Elements(page.read_text()).found if tag == "article"]

    assert cards() == ["concept-0", "concept-2", "concept-1"]
    assert cards("--concepts", "3-4", "rotated") == ["concept-3", "concept-4", "concept-1"]
    assert cards("--concepts", "0", "--latents", "3") == ["concept-0", "batchtopk-3"]
    with pytest.raises(UserError, match="--concepts 5: expected concepts from 0 to 4"):
        cards("--concepts", "5")
    shutil.rmtree(own / "concepts")
    assert cards("--latents", "3") == ["batchtopk-3"]
    with pytest.raises(UserError, match="has no concepts; run `crossdiff concepts"):
        cards()
