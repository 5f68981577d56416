"""What the directions of a first look say of latents and concepts, against a slow oracle in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml

import crossdiff
from conftest import tiny_config
from crossdiff.activations.store import Store
from crossdiff.cli import run_command
from crossdiff.concepts.coder import ConceptCoder
from crossdiff.config import L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.look.overlap import Reader, Sums, overlaps, reader_of, sampled_rows
from crossdiff.look.reading import OVERLAP_COLUMNS, with_overlap
from crossdiff.report.html import render_html
from crossdiff.report.overlap import overlap_words, shown_already
from crossdiff.report.reading import read_run
from crossdiff.report.records import Overlap
from crossdiff.report.tables import overlap_of
from crossdiff.run_manifest import RunManifest
from report.synthetic_run import latent_table, write_concepts, write_crosscoder, write_look, write_overlap
from stores import make_store

D = 4
NAMES = pl.Series(["mean over user tokens", "principal direction 1"])


def coder_of(rows: list[list[float]], bias: float = 0.0) -> Crosscoder:
    """Latents that read and write these vectors `[base, chat]`."""
    decoder = torch.tensor(rows)
    return Crosscoder(
        encoder=decoder.clone(), encoder_bias=torch.full((len(rows),), bias), decoder=decoder, decoder_bias=torch.zeros(2 * D),
        mean=torch.zeros(2, D), scale=1.0, sparsity=L1Config(),
    )  # fmt: skip


def oracle(f: np.ndarray[Any, Any], h: np.ndarray[Any, Any], vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Correlations `[latent, direction]` by a dense loop."""
    found = np.full((f.shape[1], len(vectors)), np.nan)
    for j in range(f.shape[1]):
        for u, vector in enumerate(vectors):
            if f[:, j].std() > 0:
                projection = [(row[1] - row[0]).astype(np.float64) @ vector.astype(np.float64) for row in h]
                found[j, u] = np.corrcoef(f[:, j].astype(np.float64), projection)[0, 1]
    return found


def strongest(values: np.ndarray[Any, Any], names: pl.Series) -> tuple[list[float], list[str | None]]:
    best = [None if np.isnan(row).all() else int(np.nanargmax(np.abs(row))) for row in values]
    chosen = [math.nan if at is None else float(row[at]) for row, at in zip(values, best, strict=True)]
    return chosen, [None if at is None else names[at] for at in best]


@pytest.mark.parametrize("batch_tokens", [7, 1000])
def test_sums_over_batches_give_the_correlations_of_the_dense_activations(tmp_path: Path, batch_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(300, 2, D, generator=generator) + torch.tensor([0.0, 3.0]).view(1, 2, 1)
    make_store(tmp_path, h)
    store = Store(tmp_path)
    rows = sampled_rows(store, 10**6)
    assert rows.tolist() == store.rows("heldout").tolist() and len(rows) > 30
    coder = coder_of(torch.randn(6, 2 * D, generator=generator).tolist(), bias=-1.0)
    coder.encoder_bias[5] = -1e6  # never active
    vectors = torch.randn(2, D, generator=generator).numpy()
    (found,) = overlaps([reader_of(coder)], store, NAMES, vectors, rows, batch_tokens)

    chosen = store.gather(rows)
    f = torch.relu(chosen.flatten(1).double() @ coder.encoder.double().T + coder.encoder_bias).numpy()
    correlation, direction = strongest(oracle(f, chosen.numpy(), vectors), NAMES)
    np.testing.assert_allclose(found["look_correlation"], correlation, atol=1e-6)
    assert found["look_correlation_direction"].to_list() == direction and direction[5] is None
    chat = coder.directions()[1].double().numpy()
    cosines = np.array([[d @ v / np.linalg.norm(d) / np.linalg.norm(v) for v in vectors.astype(np.float64)] for d in chat])
    cosine, direction = strongest(cosines, NAMES)
    np.testing.assert_allclose(found["look_cosine"], cosine, atol=1e-6)
    assert found["look_cosine_direction"].to_list() == direction


def test_a_latent_that_is_the_projection_correlates_perfectly(tmp_path: Path) -> None:
    """Latent 0 is <h^chat - h^base, u> plus a bias that keeps it above 0, 1 the opposite, and 2 has no chat direction."""
    make_store(tmp_path, torch.randn(200, 2, D, generator=torch.Generator().manual_seed(1)))
    up = [-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    coder = coder_of([up, [-x for x in up], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], bias=50.0)
    vectors = np.array([[5.0, 0, 0, 0], [0, 1, 0, 0]], dtype=np.float32)
    store = Store(tmp_path)
    (found,) = overlaps([reader_of(coder)], store, NAMES, vectors, sampled_rows(store), 64)
    np.testing.assert_allclose(found["look_correlation"][:2], [1, -1], atol=1e-9)
    np.testing.assert_allclose(found["look_cosine"], [1, -1, math.nan], atol=1e-9)
    assert found["look_cosine_direction"].to_list() == [NAMES[0], NAMES[0], None]
    (without,) = overlaps([reader_of(coder)], store, NAMES[:0], vectors[:0], sampled_rows(store), 64)
    assert without["look_cosine"].is_nan().all() and without["look_correlation_direction"].null_count() == 3


def test_a_constant_side_has_no_correlation() -> None:
    from crossdiff.crosscoder.kernels import SparseCode

    n = 1000
    sums = Sums(1, 2)
    code = SparseCode(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.full((n,), 0.1), n, 1)
    sums.add(code, np.random.default_rng(0).normal(size=(n, 2)))
    assert np.isnan(sums.correlations()).all()


def test_the_sample_is_of_whole_held_out_sequences(tmp_path: Path) -> None:
    make_store(tmp_path, torch.randn(500, 2, D, generator=torch.Generator().manual_seed(2)))
    store = Store(tmp_path)
    heldout, rows = store.rows("heldout"), sampled_rows(store, 30)
    sequence = store.column("sequence")
    assert 30 <= len(rows) < len(heldout) and set(rows) <= set(heldout)
    assert set(heldout[np.isin(sequence[heldout], sequence[rows])]) == set(rows)
    assert rows.tolist() != sampled_rows(store, 30, seed=1).tolist()


def test_the_sentence_says_what_counts() -> None:
    mean, other = "mean over assistant tokens", "principal direction 2"
    both = overlap_words(Overlap(0.62, mean, 0.71, mean), "concept")
    assert both == (
        "First look: the mean difference over assistant tokens points the same way (cosine 0.62); the difference along it "
        "rises and falls with the concept (correlation 0.71)."
    )
    one = overlap_words(Overlap(-0.5, mean, 0.49, other), "latent")
    assert "the mean difference over assistant tokens points the opposite way (cosine \N{MINUS SIGN}0.50)" in one
    assert "along no direction does the difference rise and fall with the latent (largest correlation 0.49)" in one
    against = overlap_words(Overlap(0.2, mean, -0.7, other), "latent")
    assert "no direction points the same way (largest cosine 0.20)" in against
    assert "principal direction 2 falls where the latent is active (correlation \N{MINUS SIGN}0.70)" in against
    neither = overlap_words(Overlap(0.21, mean, 0.18, other), "latent")
    assert neither == (
        "The first look has no such direction (closest: the mean difference over assistant tokens, cosine 0.21; principal "
        "direction 2, correlation 0.18; 0.5 would count)."
    )
    silent = overlap_words(Overlap(0.21, mean, math.nan, None), "latent")
    assert "the latent is not active in the sample of held-out tokens" in silent
    absent = overlap_words(Overlap(math.nan, None, 0.1, mean), "latent")
    assert "the latent has no direction in the chat model" in absent
    assert overlap_words(Overlap(math.nan, None, math.nan, None), "latent") == ""


def test_how_many_concepts_the_look_shows_already() -> None:
    """Of three replicated chat-specific concepts, one points the same way, that one and another correlate, one does neither."""
    names = ("look_cosine", "look_cosine_direction", "look_correlation", "look_correlation_direction")
    assert tuple(OVERLAP_COLUMNS) == names
    rows = [(0.6, "a", -0.5, "b"), (0.1, "a", 0.9, "b"), (0.4, "a", 0.4, "b"), (1.0, "a", 1.0, "b"), (1.0, "a", 1.0, "b")]
    table = pl.DataFrame(rows, schema=names, orient="row").with_columns(
        replicated=pl.Series([True, True, True, False, True]), verdict=pl.Series([*["chat_specific"] * 4, "rotated"])
    )
    found = shown_already(table)
    assert found.startswith(
        "Of the 3 concepts that replicate and are chat-specific, 2 overlap with one of these directions: 1 by where"
    )
    assert ", 2 by when they are active" in found and found.endswith(", 1 by both.")
    nothing = with_overlap(table.drop(names).with_row_index("concept"), Path("nowhere"), "concept")
    assert shown_already(nothing) == "" and math.isnan(overlap_of(nothing.row(0, named=True)).cosine)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> Path:
    """A run of the tiny pair with two kinds of crosscoder, an SAE, a look and a report."""
    folder = tmp_path_factory.mktemp("overlap")
    settings = tiny_config(tiny_pair, tiny_texts, look={"depth_tokens": 500})
    coders = settings["crosscoders"]
    coders["sae"] = {**coders["batchtopk"], "inputs": {"kind": "single", "source": "base"}}
    coders["diff"] = {**coders["batchtopk"], "inputs": {"kind": "difference"}}
    coders["batchtopk"]["seeds"] = 2
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    for command in ("look", "run"):
        run_command([command, str(folder / "run"), "--config", str(folder / "settings.yaml")])
    return folder / "run"


def test_each_training_that_reads_both_models_and_the_concepts_have_a_table(run: Path) -> None:
    found = {path.parent.name for path in run.glob("*/overlap.parquet")}
    assert found == {"l1", "batchtopk", "batchtopk-seed1", "diff", "concepts"}
    needs = {name: RunManifest.read(run).stages[f"overlap/{name}"].needs for name in ("l1", "concepts")}
    assert needs == {"l1": ["look", "train/l1"], "concepts": ["look", "concepts"]}
    opened = crossdiff.open(run, "l1")
    table = pl.read_parquet(run / "l1" / "overlap.parquet")
    assert opened.latents.select("latent", *OVERLAP_COLUMNS).equals(table.cast({"latent": pl.Int64}), null_equal=True)
    directions = opened.look.directions["direction"].to_list()
    assert set(table["look_cosine_direction"].drop_nulls()) <= set(directions) and table["look_cosine"].abs().max() <= 1.0


def test_the_activation_of_a_concept_is_that_of_its_members(tmp_path: Path) -> None:
    """Concept 0: latents 0 and 1 of one training and 2 of another, v summed within a training, then the mean over both."""
    make_store(tmp_path, torch.randn(400, 2, D, generator=torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(4)
    one, other = (coder_of(torch.randn(3, 2 * D, generator=generator).tolist()) for _ in range(2))
    members = pl.DataFrame({"concept": [0, 0, 0, 1], "training": ["a", "a", "b", "b"], "latent": [0, 1, 2, 0]})
    coder = ConceptCoder({"a": one, "b": other}, members)
    store, vectors = Store(tmp_path), np.eye(2, D, dtype=np.float32)
    rows = sampled_rows(store)
    (found,) = overlaps([Reader(torch.eye(2, D), coder.reads, coder.sparse_code)], store, NAMES, vectors, rows, 50)
    h = store.gather(rows)
    v_one, v_other = (
        torch.relu(h.flatten(1).double() @ each.encoder.double().T) * each.norm_sums().double() for each in (one, other)
    )
    f = torch.stack([(v_one[:, 0] + v_one[:, 1] + v_other[:, 2]) / 2, v_other[:, 0]], 1).numpy()
    correlation, direction = strongest(oracle(f, h.numpy(), vectors), NAMES)
    np.testing.assert_allclose(found["look_correlation"], correlation, atol=1e-6)
    assert found["look_correlation_direction"].to_list() == direction


def test_cards_and_report_say_it(tmp_path: Path) -> None:
    write_crosscoder(tmp_path / "batchtopk", latent_table(0))
    write_concepts(tmp_path)
    write_look(tmp_path)
    assert "The first look has" not in render_html(read_run(tmp_path))
    write_overlap(tmp_path / "batchtopk", 60)
    write_overlap(tmp_path / "concepts", 5, "concept")
    page = render_html(read_run(tmp_path))
    # Concepts 0 and 2 replicate and are chat-specific; 0 has a cosine of 0.75.
    assert "Of the 2 concepts that replicate and are chat-specific, 1 overlap with one of these directions: 1 by where" in page
    points = "First look: the mean difference over plain tokens points the same way (cosine 0.75); along no direction does the"
    assert f"{points} difference rise and fall with the concept (largest correlation \N{MINUS SIGN}0.25)." in page
    assert f"{points} difference rise and fall with the latent" in page
    assert page.count("The first look has no such direction (closest: the mean difference over plain tokens, cosine 0.25") >= 2


def test_what_is_done_is_skipped_and_another_look_makes_it_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    run_command(["report", str(copy)])
    assert "overlap/l1: already done" in capsys.readouterr().out
    run_command(["look", str(copy), "--look.components", "2"])
    assert not list(copy.glob("*/overlap.parquet")) and "overlap/l1" not in RunManifest.read(copy).stages
    assert crossdiff.open(copy, "l1").latents["look_cosine"].null_count() == crossdiff.open(copy, "l1").latents.height
    run_command(["report", str(copy)])
    assert "overlap/l1 done" in capsys.readouterr().out
    assert len(list(copy.glob("*/overlap.parquet"))) == 5


def test_without_a_look_of_these_settings_nothing_is_shown(analysed_run: Path, looked: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(analysed_run, tmp_path / "run", symlinks=True)
    run_command(["report", str(copy)])
    assert not list(copy.glob("*/overlap.parquet"))
    # A look of another layer, with its record, is as good as none.
    shutil.copytree(looked / "look", copy / "look")
    manifest = json.loads((copy / "manifest.json").read_text())
    record = RunManifest.read(looked).stages["look"].model_dump()
    summary = json.loads((copy / "look" / "look.json").read_text())
    (copy / "look" / "look.json").write_text(json.dumps(summary | {"layer": 0}))
    record["fingerprint"], record["files"] = "another", {}
    manifest["stages"]["look"] = record
    (copy / "manifest.json").write_text(json.dumps(manifest))
    run_command(["report", str(copy)])
    assert not list(copy.glob("*/overlap.parquet"))
    page = (copy / "report.html").read_text()
    assert 'id="look"' in page and "largest cosine" not in page
