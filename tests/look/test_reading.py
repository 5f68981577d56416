"""A finished first look: as `run.look`, and as a section of the report."""

from __future__ import annotations

import json
import shutil
from html import unescape
from pathlib import Path

import polars as pl
import pytest
import yaml

import crossdiff
from crossdiff.config import RunConfig
from crossdiff.errors import UserError
from crossdiff.look.reading import read_look
from crossdiff.report.html import render_html
from crossdiff.report.look import depth_figure, look_section, notebook_look
from crossdiff.report.reading import read_run
from crossdiff.run import Run
from crossdiff.stages.definitions import report_stage
from report.synthetic_run import DANGER, latent_table, write_crosscoder, write_look


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_crosscoder(tmp_path / "batchtopk", latent_table(0))
    write_look(tmp_path)
    return tmp_path


def test_a_run_with_a_first_look_only_is_opened(looked: Path) -> None:
    run = crossdiff.open(looked)
    look = run.look
    assert run.names == () and "first look only" in repr(run)
    assert look.tokens.height == look.summary.n_tokens
    assert look.tokens["kl"].cast(pl.Float64).to_numpy().mean() == pytest.approx(look.summary.kl)
    assert look.places["kl"][0] == look.tokens["kl"].max()
    assert look.depth.height == 3 and repr(look) == "\n".join(look.sentences)
    assert f"On {look.summary.n_tokens:,} tokens" in look.sentences[0]
    assert look.sentences[0] in unescape(look._repr_html_())
    with pytest.raises(UserError, match=r"no trained crosscoder yet; run `crossdiff train"):
        _ = run.latents
    with pytest.raises(UserError, match="there are none"):
        crossdiff.open(looked, crosscoder="l1")


def test_a_small_difference_is_said_with_what_to_do(run: Path) -> None:
    """The synthetic difference has 0.2, at the limit; here it has a quarter of that."""
    advice = "set (recipes/narrow.yaml)"
    assert advice not in repr(notebook_look(run))
    path = run / "look" / "depth.parquet"
    pl.read_parquet(path).with_columns(pl.col("relative_norm") / 4).write_parquet(path)
    assert "after layer 1 the difference has 0.05 of the norm" in repr(notebook_look(run)) and advice in repr(
        notebook_look(run)
    )


def test_what_is_missing_or_of_another_version_is_said(tmp_path: Path) -> None:
    assert read_look(tmp_path / "look") is None
    with pytest.raises(UserError, match=r"has no first look; run `crossdiff look .*` first"):
        notebook_look(tmp_path)
    write_look(tmp_path)
    depth = tmp_path / "look" / "depth.parquet"
    table = pl.read_parquet(depth)
    table.drop("kl_low").write_parquet(depth)
    with pytest.raises(UserError, match=r"depth.parquet lacks the columns kl_low; run `crossdiff look` again"):
        notebook_look(tmp_path)
    table.write_parquet(depth)
    (tmp_path / "look" / "look.json").write_text(json.dumps({"n_tokens": 6}))
    with pytest.raises(UserError, match=r"look.json: n_documents: Field required; run `crossdiff look` again"):
        notebook_look(tmp_path)


def test_the_section_shows_what_the_tables_have(run: Path) -> None:
    section = look_section(notebook_look(run))
    assert [each.title for each in section.words] == [
        "Tokens that the chat model expects more often", "Phrases of the texts that it finds more probable",
        "Tokens that the chat model expects less often",  # no phrase falls
    ]  # fmt: skip
    assert section.words[0].table.rows == ((("K",), "+500.00", "2"),)
    assert section.words[2].table.rows == ((("L",), "\N{MINUS SIGN}333.00", "1"),)
    assert section.places[0][1:] == (f"tell me {DANGER}", (DANGER, "25%"), (" yes", "75%"), "2.50")
    assert section.layers is not None and section.layers.rows[1][:2] == ("1", "0.750 [0.500, 1.000]")
    assert section.directions is not None
    assert section.directions.rows[0][2:5] == ("50%", "0.95", "9.0 / 5.0")
    assert section.directions.rows[1][2:4] == ("40% of the variance", "")
    assert section.probes is not None  # the bag of words, the differences of means, the probes: 0.50, 0.55, ...
    assert section.probes.rows == (("small talk", *(f"{0.5 + i / 20:.2f} [0.40, 0.90]" for i in range(7))),)


def test_the_figure_marks_the_recommended_layer(run: Path) -> None:
    marked, others = depth_figure(notebook_look(run)).series
    assert (marked.name, list(marked.x), list(marked.y)) == ("earliest layer worth trying", [1], [0.75])
    assert list(others.x) == [0, 2] and "0.125 [0.000, 0.250] nats" in others.hover[0]


def test_the_report_has_the_section_if_there_is_a_look(run: Path) -> None:
    page = render_html(read_run(run))
    assert 'href="#look"' in page and "The earliest layer worth trying is 1: it is (on 6 tokens)." in page
    assert DANGER not in page and "&lt;script&gt;alert(1)&lt;/script&gt;</span> 25%" in page
    for path in (run / "look").iterdir():
        path.unlink()
    (run / "look").rmdir()
    assert 'id="look"' not in render_html(read_run(run))


def test_equal_models_have_a_sentence_and_no_tables(tmp_path: Path) -> None:
    write_look(tmp_path, identical=True)
    look = notebook_look(tmp_path)
    assert look.sentences == ["No difference: on 6 tokens of 2 documents, both models predict exactly the same."]
    assert "<table" not in look._repr_html_()


def test_the_report_is_made_again_after_a_look(looked: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(yaml.safe_load((looked / "config.yaml").read_text()))
    run = Run.open(shutil.copytree(looked, tmp_path / "run"))
    try:
        before = report_stage(config, (), run).fingerprint
        assert report_stage(config, (), run).fingerprint == before
        del run.manifest.stages["look"]
        assert report_stage(config, (), run).fingerprint != before
    finally:
        run.close()
