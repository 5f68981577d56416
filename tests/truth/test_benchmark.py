"""The benchmark's scores by hand, the matching on a crosscoder that is the dictionary, and the whole of it in small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from crossdiff.cli import run_command
from crossdiff.config import AnalyzeConfig, DifferenceConfig, L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.view import view_of
from crossdiff.truth.benchmark import score
from crossdiff.truth.matching import Correlation, match, seen_directions
from crossdiff.truth.planted import KINDS, draw, plant
from crossdiff.truth.truth_config import PlantedConfig

NAN = math.nan
SMALL = PlantedConfig(
    d_model=24, shared=10, chat_only=4, base_only=2, weaker=4, rotated=2, decoupled=2, active=1.5, documents=300,
    document_tokens=20, topics=4,
)  # fmt: skip


def test_scores_by_hand() -> None:
    # Latents: two of chat-only concept 0, one of chat-only concept 1, one weaker, one shared, one of no concept.
    table = pl.DataFrame({
        "kind": ["chat_only", "chat_only", "chat_only", "weaker", "shared", "none"],
        "concept": [0, 0, 1, 5, 6, -1],
        "delta_norm": [0.95, 0.97, 0.6, 0.96, 0.5, 0.99],
        "nu_error": [0.1, 0.3, NAN, 0.6, 1.0, 0.0],
        "nu_reconstruction_nobias": [0.1, 0.2, NAN, 0.1, 1.0, 0.0],
        "nu_reconstruction": [0.1, -0.2, 0.3, 0.1, 1.0, 0.0],
        "rank_sum": [3.0, 5.0, NAN, 6.0, 10.0, 2.0],
        "rank_sum_paper": [3.0, 5.0, NAN, 6.0, 10.0, 2.0],
        "chat_specific": [True, False, False, False, False, False],
    })  # fmt: skip
    names = ("delta_norm", "nu_error", "rank_sum", "rank_sum_paper", "verdict")
    found = {name: score(table, 4, name, AnalyzeConfig()) for name in names}
    # delta_norm >= 0.9: latents 0, 1 and the weaker one, and one of no concept; concept 0 of 4 is found.
    naive = found["delta_norm"]
    assert (naive.n_called, naive.n_unmatched, naive.precision, naive.recall) == (3, 1, pytest.approx(2 / 3), 0.25)
    assert naive.wrong == {"weaker": 1}
    # Pairs of a chat-only and another matched latent: (0.95, 0.97, 0.6) against (0.96, 0.5): 1 + 2 + 1 of 6.
    assert naive.auroc == pytest.approx(4 / 6)
    # nu_error: 0.1 and 0.3 are below both, the undefined one comes last: 4 of 6.
    assert found["nu_error"].auroc == pytest.approx(4 / 6)
    assert (found["nu_error"].n_called, found["nu_error"].precision) == (1, 1.0)
    # The three lowest: latents 5 (of no concept), 0 and 1.
    assert (found["rank_sum"].n_called, found["rank_sum"].n_unmatched, found["rank_sum"].precision) == (2, 1, 1.0)
    assert found["rank_sum"].auroc == pytest.approx(4 / 6)
    # The published nu of latent 1 is below -0.1, so that it comes last: latents 5, 0 and the weaker one are called.
    published = found["rank_sum_paper"]
    assert (published.n_called, published.n_unmatched, published.precision) == (2, 1, 0.5)
    assert published.auroc == pytest.approx(2 / 6) and published.wrong == {"weaker": 1}
    assert found["verdict"].auroc == pytest.approx((1 * 2 + 0.5 * 4) / 6)


def test_nothing_called_has_no_precision() -> None:
    table = pl.DataFrame({"kind": ["chat_only", "shared"], "concept": [0, 1], "delta_norm": [0.5, 0.5]})
    found = score(table, 1, "delta_norm", AnalyzeConfig())
    assert math.isnan(found.precision) and found.recall == 0.0 and found.auroc == 0.5


def test_a_dictionary_of_the_concepts_is_matched_to_them() -> None:
    concepts = plant(SMALL)
    n = SMALL.n_concepts
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    directions = (concepts.directions * (concepts.strength > 0).unsqueeze(2))[:, order].transpose(0, 1).reshape(n, -1)
    strangers = torch.randn(3, 2 * SMALL.d_model, generator=torch.Generator().manual_seed(1))
    rows = torch.cat([directions, strangers])
    coder = Crosscoder(
        encoder=rows / 2, encoder_bias=torch.full((n + 3,), -0.3), decoder=rows, decoder_bias=torch.zeros(2 * SMALL.d_model),
        mean=concepts.mean, scale=1.0, sparsity=L1Config(),
    )  # fmt: skip
    matches = match(coder, concepts, draw(concepts, SMALL), 0.7, 0.5)
    found = matches.concept[:n]
    assert float((found == order).double().mean()) > 0.9  # random directions in 24 dimensions interfere
    assert set(found[found != order].tolist()) <= {-1}
    assert (matches.concept[n:] == -1).all()


def test_where_a_concept_shows_in_the_difference_of_the_models() -> None:
    concepts = plant(SMALL)
    coder = Crosscoder(
        encoder=torch.zeros(1, 24), encoder_bias=torch.zeros(1), decoder=torch.zeros(1, 24), decoder_bias=torch.zeros(24),
        mean=torch.zeros(1, 24), scale=1.0, sparsity=L1Config(), view=view_of(DifferenceConfig(), ("base", "chat")),
    )  # fmt: skip
    base_alone, chat_alone, both = seen_directions(coder, concepts)[0]
    for concept, kind in enumerate(np.array(KINDS)[concepts.kind.numpy()]):
        base, chat = concepts.directions[:, concept]
        expected = {
            "chat_only": (0 * base, chat, chat), "base_only": (-base, 0 * chat, -base), "shared": (-base, chat, 0 * chat),
            "weaker": (-base, chat, chat), "decoupled": (-base, chat, 0 * chat),
        }  # fmt: skip
        if kind in expected:
            for way, found in zip(expected[kind], (base_alone, chat_alone, both), strict=True):
                torch.testing.assert_close(found[concept], way)


def test_correlation_is_pearsons() -> None:
    generator = torch.Generator().manual_seed(0)
    v, amplitude = torch.rand(90, 3, generator=generator), torch.rand(2, 90, 4, generator=generator)
    v[:, 2] = 0.0  # a dead latent
    sums = Correlation(3, 2, 4)
    for first in range(0, 90, 40):
        sums.add(v[first : first + 40], amplitude[:, first : first + 40])
    found = sums.finish()
    for latent in range(2):
        for concept in range(4):
            both = [np.corrcoef(v[:, latent].double(), amplitude[s, :, concept].double())[0, 1] for s in range(2)]
            assert float(found[latent, concept]) == pytest.approx(max(both))
    assert (found[2] == -1).all()


@pytest.mark.slow
def test_the_whole_of_it_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "planted.d_model": 24, "planted.shared": 10, "planted.chat_only": 4, "planted.base_only": 2, "planted.weaker": 4,
        "planted.rotated": 2, "planted.decoupled": 2, "planted.active": 1.5, "planted.documents": 300,
        "planted.document_tokens": 20, "planted.topics": 4, "l0_trials": 2, "l0_tolerance": 0.5, "analyze.blocks": 5,
        "crosscoders.l1.n_latents": 40, "crosscoders.l1.epochs": 4, "crosscoders.l1.batch_size": 128,
        "crosscoders.l1.warmup_steps": 10,
    }  # fmt: skip
    for name, k in (("batchtopk", 2), ("dfc", 2), ("diff_sae", 1)):
        small = {"n_latents": 40, "epochs": 4, "batch_size": 128, "warmup_steps": 10, "sparsity.k": k}
        small["sparsity.threshold_beta"] = 0.9  # 168 steps are too few for a slow running mean
        options |= {f"crosscoders.{name}.{key}": value for key, value in small.items()}
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    run_command(["truth", str(tmp_path / "truth"), *arguments])
    shown = capsys.readouterr().out
    assert "Which latents and concepts stand for planted chat-only concepts?" in shown and "batchtopk: L0" in shown
    record = json.loads((tmp_path / "truth" / "truth.json").read_text())["crosscoders"]
    for name, result in record.items():
        every = {
                "delta_norm", "nu_error", "nu_reconstruction", "nu_reconstruction_nobias", "nu_activation_nobias", "rank_sum",
                "rank_sum_paper", "verdict",
            }  # fmt: skip
        assert set(result["scores"]) == ({"nu_activation_nobias"} if name == "diff_sae" else every)
        table = pl.read_parquet(tmp_path / "truth" / name / "latents.parquet")
        live = table.filter(pl.col("n_active") > 0)
        assert sum(n for row in result["verdicts"].values() for n in row.values()) == live.height
        assert set(live["kind"]) <= {*KINDS, "none"}
    assert record["batchtopk"]["found"]["chat_only"] >= 0.5
    assert set(record) == {"batchtopk", "l1", "dfc", "diff_sae"}
    # The difference of the models shows no shared concept, and all of the chat-only ones.
    assert record["diff_sae"]["found"]["shared"] <= 0.1 and record["diff_sae"]["found"]["chat_only"] >= 0.5
    assert record["l1"]["mu"] is not None and record["l1"]["trials"] <= 2
    # Done with these settings: nothing is trained again.
    before = (tmp_path / "truth" / "truth.json").stat().st_mtime_ns
    run_command(["truth", str(tmp_path / "truth"), *arguments])
    assert (tmp_path / "truth" / "truth.json").stat().st_mtime_ns == before
