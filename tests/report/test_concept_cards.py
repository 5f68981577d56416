"""The concepts of a run on its page, on the terminal and in the model card; the run is synthetic."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import polars as pl
import pytest
from synthetic_run import (
    DANGER,
    concepts_record,
    latent_table,
    write_activations,
    write_concept_causal,
    write_concepts,
    write_crosscoder,
)
from test_report import Page, summary

from crossdiff.config import HarvestConfig
from crossdiff.errors import UserError
from crossdiff.interp.explanation_table import SCHEMA
from crossdiff.latents.settings import verdict_settings
from crossdiff.report import concept_wording, wording
from crossdiff.report.concept_cards import concept_card, groups
from crossdiff.report.concept_reading import check_concept, read_concepts
from crossdiff.report.concept_records import RunConcepts
from crossdiff.report.html import render_html
from crossdiff.report.model_card import markdown, model_card
from crossdiff.report.reading import read_run
from crossdiff.report.tables import estimate


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for seed, name in enumerate(("l1", "batchtopk", "batchtopk-seed1")):
        write_crosscoder(tmp_path / name, latent_table(seed))
    (tmp_path / "config.yaml").write_text("base: demo/base\nchat: demo/<chat>\n")
    write_activations(tmp_path)
    write_concepts(tmp_path)
    return tmp_path


def concepts_of(run: Path) -> RunConcepts:
    found = read_concepts(run)
    assert found is not None
    return found


def states(run: Path, concept: int) -> list[str]:
    found = concepts_of(run)
    return [rung.state for rung in concept_wording.rungs(next(c for c in found.shown if c.number == concept), found)]


def test_the_first_sentence_counts_concepts(run: Path) -> None:
    """0 and 2 are chat-specific and replicate, 1 is rotated; the replicated ones account for 10, 15, 20 and 25%."""
    sentence = (
        "The chat model has 2 concepts that its base model lacks: of 5 concepts found in 4 independent trainings, 3 came back "
        "in at least 3 of them, and together they account for 10% to 25% of the difference between the two models' activations"
    )
    assert concept_wording.headline(concepts_of(run)) == sentence + "."
    write_concept_causal(run)
    closed = " and close 25% of the gap between their outputs when added to the base model."
    assert concept_wording.headline(concepts_of(run)) == sentence + closed
    controls = " ".join(concept_wording.controls(concepts_of(run)))
    assert "shuffled against each other, none comes back" in controls
    assert "find 50% to 100% of the concepts of the other half" in controls
    assert controls.endswith("Random ones close 25% of the gap between the outputs, and all latents 25%.")


def test_the_page_begins_with_the_concepts_and_explains_each_term_before_its_use(run: Path) -> None:
    rendered = render_html(read_run(run))
    page = Page(rendered)
    assert page.stack == [] and DANGER not in rendered and html.escape(DANGER) in rendered
    places = [page.text.index(part) for part in (
        "The chat model has 2 concepts", "Only the chat model has them (2)", "A concept is a group of latents",
        "An AUROC of 1 is",
        "Both models have them, in different directions (1)", "What they predict", "AUROC is the chance",
        "How to read the concepts", "Are the crosscoders any good?",
    )]  # fmt: skip
    assert places == sorted(places)
    cards = [card["id"] for card in page.with_class("concept")]
    # Those of the chat model alone, then the rotated one; not the two that did not replicate.
    assert cards == ["concept-0", "concept-2", "concept-1"]
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {(a["href"] or "")[1:] for a in page.of("a")} <= anchors
    # A title is the text around the strongest token, which alone is marked; never a number.
    titles = re.findall(r"<article class=\"card concept\".*?<h4>(.*?)</h4>", rendered, re.DOTALL)
    assert len(titles) == 3 and all(title.count("peak") == 1 and "Who" in title for title in titles)


def test_repetitions_with_other_seeds_appear_within_concepts_only(run: Path) -> None:
    assert [coder.name for coder in read_run(run).crosscoders] == ["l1", "batchtopk"]
    names = ("batchtopk", "batchtopk-seed1")  # now a crosscoder of its own
    settings = "crosscoders:\n" + "".join(f"  {name}: {{sparsity: {{kind: batchtopk}}}}\n" for name in names)
    (run / "config.yaml").write_text(f"base: demo/base\nchat: demo/chat\n{settings}")
    assert [coder.name for coder in read_run(run).crosscoders] == ["batchtopk", "batchtopk-seed1", "l1"]


def test_the_rungs_are_passed_failed_or_not_measured(run: Path) -> None:
    missing = "not measured"
    # differs, replicates, null diff, acts, predicts, explained
    assert states(run, 0) == ["passed", "passed", missing, missing, "passed", missing]
    write_concept_causal(run)
    assert [states(run, concept)[3] for concept in (0, 1, 2)] == ["passed", "failed", missing]
    # The interval of concept 1 for refusals, 0.52 [0.47, 0.54], includes chance.
    assert [states(run, concept)[4] for concept in (0, 1, 2)] == ["passed", "failed", "passed"]
    (run / "manifest.json").write_text(json.dumps({"format": 1, "swap": [], "stages": {"concepts": {"fingerprint": "f"}}}))
    explained = {"latent": [2], "explanation": [f"greets {DANGER}"], "crosscoder": ["f"]}
    empty = {name: [None] for name in SCHEMA if name not in explained}
    pl.DataFrame(explained | empty, schema=SCHEMA).write_parquet(run / "concepts" / "interpretation.parquet")
    assert [states(run, concept)[5] for concept in (0, 2)] == [missing, "passed"]
    rendered = render_html(read_run(run))
    assert "<h4>greets &lt;script&gt;" in rendered  # the explanation takes the place of the title


@pytest.mark.parametrize(("there", "state"), [(0.001, "passed"), (0.1, "failed")])
def test_a_verdict_that_the_null_diff_gives_as_well_is_no_evidence(run: Path, there: float, state: str) -> None:
    """7 of 57 live latents of batchtopk are chat-specific, 12%; the null diff may give a tenth of that, 1.2%."""
    rates = {"n_live": 100, "rates": {"chat_specific": there}, "analysis": verdict_settings(run / "batchtopk")}
    (run / "null.json").write_text(json.dumps({"crosscoders": {"batchtopk": rates}}))
    assert states(run, 0)[2] == state
    assert states(run, 1)[2] == "not measured"  # nothing is known of rotated latents
    text = Page(render_html(read_run(run))).text
    assert "of latents get this verdict there, 12% here" in text


def test_without_concepts_the_page_says_how_to_get_them(run: Path) -> None:
    shutil.rmtree(run / "concepts")
    report = read_run(run)
    text = Page(render_html(report)).text
    assert "This run has no concepts yet" in text and "crossdiff concepts RUN" in text
    assert "crossdiff concepts RUN" in summary(report) and "What they predict" not in text


def test_one_training_has_concepts_whose_replication_is_not_measured(run: Path) -> None:
    record = concepts_record()
    one = [entry for entry in record["completeness"] if entry["training"] == "batchtopk"]
    record |= {"trainings": record["trainings"][1:2], "needed": None, "halves": None, "completeness": one}
    (run / "concepts" / "concepts.json").write_text(json.dumps(record))
    table = pl.read_parquet(run / "concepts" / "concepts.parquet").with_columns(replicated=pl.lit(False), n_trainings=pl.lit(1))
    table.write_parquet(run / "concepts" / "concepts.parquet")
    found = concepts_of(run)
    assert len(found.shown) == 5 and states(run, 3)[1] == "not measured"
    sentence = concept_wording.headline(found)
    assert sentence.startswith("The chat model has 3 concepts that its base model lacks, among 5 concepts")
    assert "nobody knows which of them would be found again" in Page(render_html(read_run(run))).text
    assert concept_wording.controls(found) == []


def test_no_candidate_at_all_is_said(run: Path) -> None:
    for name in ("concepts", "members"):
        path = run / "concepts" / f"{name}.parquet"
        pl.read_parquet(path).clear().write_parquet(path)
    pl.read_parquet(run / "concepts" / "behaviours.parquet").clear().write_parquet(run / "concepts" / "behaviours.parquet")
    report = read_run(run)
    assert "there is no concept to report" in Page(render_html(report)).text and "no concept to report" in summary(report)


def test_few_words_say_the_verdict(run: Path) -> None:
    cards = {card.number: card for group in groups(concepts_of(run)) for card in group.cards}
    assert cards[0].verdict.startswith("New in the chat model. Of its chat direction, the base model has ")
    row = pl.read_parquet(run / "concepts" / "concepts.parquet").row(0, named=True)
    judges, other = (wording.interval(estimate(row, nu)) for nu in ("nu_reconstruction_nobias", "nu_reconstruction"))
    assert judges != other
    assert f"and {judges} in what other latents explain (nu_reconstruction without bias; {other} with bias)" in cards[0].verdict
    assert cards[1].verdict.startswith("Changed (rotated): both models have it, in another direction (cosine of the two 0.90)")
    assert cards[0].chips == (
        "replicated in 3 of 4 trainings",
        "predicts identity before the answer, AUROC 0.97 [0.92, 0.99]",
    )
    assert cards[1].chips == ("replicated in 4 of 4 trainings",)  # at chance it predicts nothing


def test_the_terminal_begins_with_the_concepts(run: Path) -> None:
    text = summary(read_run(run), width=100)
    assert text.startswith("The chat model has 2 concepts") and text.index("3 of 4") < text.index("FVE")
    assert "«" in text and "identity before the answer" in text and "\x1b" not in text


def test_the_model_card_lists_the_concepts_as_text(run: Path) -> None:
    (run / "l1" / "config.json").write_text("{}")
    card = model_card(read_run(run), "me/x", "mit", HarvestConfig(), {})
    assert card.index("The chat model has 2 concepts") < card.index("## What single latents show")
    assert "(chat-specific; replicated in 3 of 4 trainings; predicts identity" in card and "run.concept(0)" in card
    assert DANGER not in card and markdown("a*b <i>|[x]") == r"a\*b \<i\>\|\[x\]"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("concepts.json", '{"trainings": 3}', "trainings"),
        ("concepts.parquet", "PAR1", "cannot be read as Parquet"),
        ("members.parquet", "PAR1", "run `crossdiff concepts` again"),
        ("examples.sqlite", "no database" * 100, "file is not a database); run `crossdiff concepts` again"),
    ],
)
def test_damage_is_named(run: Path, file: str, text: str, message: str) -> None:
    (run / "concepts" / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_run(run)


def test_a_table_of_an_earlier_version_is_refused(run: Path) -> None:
    path = run / "concepts" / "concepts.parquet"
    table = pl.read_parquet(path)
    for column in ("words", "rank_sum_paper"):  # verdicts of a table without the latter rest on another nu
        table.drop(column).write_parquet(path)
        with pytest.raises(UserError, match=f"lacks the columns {column}; run `crossdiff concepts` again with this version"):
            read_run(run)


def test_latents_with_a_nu_out_of_range_are_not_ranked(run: Path) -> None:
    """Latent 0 has the lowest rank_sum, but its nu is out of range. With bias, every nu may be."""
    path = run / "batchtopk" / "latents.parquet"
    low = pl.when(pl.col("latent") == 0).then(-0.2).otherwise("nu_reconstruction_nobias")
    pl.read_parquet(path).with_columns(nu_reconstruction=pl.lit(-9.0), nu_reconstruction_nobias=low).write_parquet(path)
    assert [latent.latent for latent in read_run(run).primary.top.latents] == [1, 2, 3, 4, 5, 6]


def test_a_card_needs_no_report(run: Path) -> None:
    found = concepts_of(run)
    assert concept_card(found.shown[0], found).number == 0


@pytest.mark.parametrize("number", ["x", None, 1.5, True])
def test_what_is_not_the_number_of_a_concept_is_refused(run: Path, number: object) -> None:
    found = read_concepts(run, with_examples=False)
    assert found is not None
    with pytest.raises(UserError, match="is not the number of a concept; expected a whole number, such as 0"):
        check_concept(found, number)
