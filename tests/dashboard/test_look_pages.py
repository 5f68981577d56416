"""The pages of a first look: texts tinted by KL, prompts, and a run that has nothing else."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

pytest.importorskip("fastapi")

from showing import ADDRESS, BATCHTOPK, CONCEPTS, DANGER, requests_to, write_run
from test_pages import Elements

from crossdiff.dashboard.catalogue import Catalogue
from crossdiff.dashboard.live import Live
from crossdiff.dashboard.look_predictions import predicted
from crossdiff.dashboard.looks import RunLook, after
from crossdiff.errors import UserError
from crossdiff.text.token_texts import TokenText
from crossdiff.text_activations import read_text
from report.synthetic_run import write_look, write_overlap

LOOK = "/run/a-b-1/look"


@pytest.fixture(scope="module")
def client(looked: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return requests_to(looked, tmp_path_factory.mktemp("cache"), live=True)


def look_of(run: Path) -> RunLook:
    (found,) = Catalogue([run]).looks.values()
    return found


def letter(token_id: int) -> TokenText:
    return TokenText(chr(token_id))


def letters(look: RunLook) -> RunLook:
    """A look whose tokens are the characters of their ids: 70 is F, 71 G, 72 H, 75 K, 76 L."""
    look.__dict__["decode"] = letter
    return look


def test_the_pages_of_a_run_with_crosscoders_link_to_its_look(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert requests_to(run, tmp_path / "cache").get(LOOK).status_code == 404
    write_look(run)
    client = requests_to(run, tmp_path / "cache")
    for path in ("/", BATCHTOPK):
        assert f'href="{LOOK}"' in client.get(path).text
    page = client.get(LOOK).text
    assert "The earliest layer worth trying is 1" in page and f'href="{LOOK}/texts?document=7"' in page
    assert DANGER not in page and not [tag for tag, found in Elements(page).found if "onerror" in found]
    assert "--no-live" in client.get(f"{LOOK}/prompt").text


def test_the_pages_of_latents_and_concepts_say_what_the_look_says_of_them(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    pages = (f"{BATCHTOPK}/latent/0", f"{CONCEPTS}/0", f"{CONCEPTS}/1")
    client = requests_to(run, tmp_path / "cache")
    assert not any("First look" in client.get(path).text for path in pages)
    write_look(run)
    write_overlap(run / "batchtopk", 60)
    write_overlap(run / "concepts", 5, "concept")
    client = requests_to(run, tmp_path / "cache")
    latent, concept, other = (client.get(path).text for path in pages)
    for page in (latent, concept):
        assert "First look: the mean difference over plain tokens points the same way (cosine 0.75)" in page
    assert "The first look has no such direction (closest: the mean difference over plain tokens, cosine 0.25" in other
    assert "0.75" in client.get(f"{BATCHTOPK}?show=look_cosine").text


def test_a_published_look_has_no_texts(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_look(run)
    (run / "look" / "tokens.parquet").unlink()
    client = requests_to(run, tmp_path / "cache")
    page = client.get(LOOK).text
    assert "The earliest layer worth trying is 1" in page and f"{LOOK}/texts" not in page + client.get("/").text
    assert "does not publish it, since it holds whole texts" in unescape(client.get(f"{LOOK}/texts").text)


def test_documents_come_by_their_mean_kl_and_by_number(client: Any, looked: Path) -> None:
    tokens = look_of(looked).tokens
    means = tokens.group_by("document").agg(pl.col("kl").cast(pl.Float64).mean()).sort("kl", descending=True)
    first = client.get("/run/run/look/texts").text
    assert [f"document {number} " in first for number in means["document"][:6]] == [True] * 5 + [False]
    assert f"document {means['document'][5]} " in client.get("/run/run/look/texts?page=2").text
    assert "document 3 " in client.get("/run/run/look/texts?document=3").text
    for query, message in (("document=100000", "did not read document 100000"), ("document=x", "expected a whole number")):
        answer = client.get(f"/run/run/look/texts?{query}")
        assert answer.status_code in (404, 422) and message in answer.text
    assert client.get("/run/run/look/texts?page=99999").status_code == 200


def test_a_text_is_tinted_and_each_part_stands_by_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_look(run)
    look = letters(look_of(run))
    first, second = look.text(7)
    # The mean of 1.5, 2.5 and 1.5. The strongest tint is at the quantile 0.99: of 0, 0, 0.5, 1.5, 1.5 and 2.5, 2.45.
    assert look.highest == pytest.approx(2.45)
    assert first.origin == "document 7 \N{MIDDLE DOT} prose \N{MIDDLE DOT} 3 tokens \N{MIDDLE DOT} mean KL 1.833 nats"
    assert [piece.classes for piece in first.pieces] == ["t bos a5", "t a8"]
    assert first.pieces[1].speaker == "user" and len(second.pieces) == 1
    (plain,) = look.text(0)
    assert [piece.classes for piece in plain.pieces] == ["t bos", "t a2", "t"]  # 0, 0.5 and 0 of 2.45


def test_what_both_models_expect_is_said(tmp_path: Path) -> None:
    row = {"token_id": 72, "kl": 2.5, "top_base": 70, "p_base": 0.25, "top_chat": 71, "p_chat": 0.75, "next_id": 75}
    assert after(row | {"log_base": -np.log(2), "log_chat": float("nan")}, letter) == (
        "After “H”, KL 2.50 nats\nbase model expects “F” 25%\nchat model expects “G” 75%\n"
        "what follows: “K” (base 50%, chat does not have it)"
    )
    assert after(row | {"next_id": -1, "log_base": 0.0, "log_chat": 0.0}, letter).count("\n") == 2


def test_another_tokenizer_is_refused(looked: Path, tmp_path: Path) -> None:
    look = look_of(looked)
    known = look.found.words.filter(~pl.col("token").str.contains("\N{REPLACEMENT CHARACTER}"))
    assert [look.decode(token_id).text for token_id in known["token_id"]] == known["token"].to_list()
    changed = shutil.copytree(looked, tmp_path / "run")
    (changed / "manifest.json").unlink()
    words = look.found.words.with_columns(token=pl.lit("elsewhere"))
    words.write_parquet(changed / "look" / "words.parquet")
    with pytest.raises(UserError, match=r"is not the one of this look: token \d+ is .* was 'elsewhere'"):
        look_of(changed).text(0)


def test_a_prompt_gives_what_the_look_found_on_the_same_text(looked: Path) -> None:
    look = look_of(looked)
    rows = look.tokens.filter(document=0)
    rows = rows.filter(sequence=rows["sequence"][0])
    text = "".join(look.decode(token).text for token in rows["token_id"].to_list()[1:])
    found = Live().predictions(look, text).table
    assert found["token_id"].to_list() == rows["token_id"].to_list()
    np.testing.assert_allclose(found["kl"], rows["kl"], rtol=1e-3, atol=1e-5)
    assert found["top_chat"].to_list() == rows["top_chat"].to_list()
    assert found["next_id"].to_list() == rows["next_id"].to_list()


def test_a_prompt_is_tinted_on_the_page(client: Any) -> None:
    def post(**fields: str) -> Any:
        return client.post("/run/run/look/prompt", data=fields, headers={"origin": ADDRESS})

    page = post(role="user", content="the sea", action="read").text
    found = [tag for name, tag in Elements(page).found if name == "span" and "tabindex" in tag]
    assert len(found) == 11  # BOS, <|user|>, 7 letters, <|end|> and <|assistant|>
    assert found[-1]["title"] in unescape(page).split('<p class="after">')[1]
    assert str(found[-1]["title"]).startswith("After “<|assistant|>”, KL ")
    assert post(role="user", content="a", action="add").text.count('name="content"') == 2
    for fields, message in (({"content": " "}, "the conversation is empty"), ({"content": "a" * 30_000}, "at most 20,000")):
        answer = post(role="user", action="read", **fields)
        assert answer.status_code == 422 and message in answer.text


def test_overflowing_models_are_refused(pair: Any) -> None:
    broken = copy.deepcopy(pair.base)
    broken.lm_head.weight.data[3, 0] = float("nan")
    sequence = read_text(pair.tokenizer, "the sea", 48)
    assert predicted(pair, sequence).table["kl"].is_finite().all()
    with pytest.raises(UserError, match="a model gives NaN or infinite logits on this text; set model_dtype to float32"):
        predicted(replace(pair, base=broken), sequence)


def test_the_overview_shows_a_run_that_has_a_look_only(client: Any) -> None:
    page = client.get("/").text
    assert 'href="/run/run/look"' in page and "No crosscoder has been analysed yet" in page
    assert "All crosscoders together" not in page


def test_rounding_errors_have_no_tint(tmp_path: Path) -> None:
    """Models that differ at one token of 1,000: the quantile is of the other tokens, and a tenth of the largest KL counts."""
    write_look(write_run(tmp_path))
    look = look_of(next(tmp_path.iterdir()))
    kl = [1e-6] * 999 + [5.0]
    rows = pl.concat([look.tokens.head(1)] * 1000).with_columns(kl=pl.Series(kl))
    look.found.__dict__["tokens"] = rows
    assert look.highest == 0.5
