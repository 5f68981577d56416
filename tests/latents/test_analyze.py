"""The pass of the analysis, and its control: random directions are random."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from conftest import make_tokenizer
from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig, BatchTopKConfig, DifferenceConfig, Inputs, L1Config, SingleConfig
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.crosscoder.metrics import heldout_sums
from crossdiff.crosscoder.train import normalisation_of
from crossdiff.crosscoder.view import view_of
from crossdiff.errors import UserError
from crossdiff.latents.analyze import Analysis, analyze, measure, with_random_directions
from crossdiff.latents.groups import cells_of
from crossdiff.stages.definitions import ANALYSIS
from planted import planted_activations
from stores import make_store

CONFIG = AnalyzeConfig(blocks=5, batch_tokens=300)


def test_random_directions_have_the_norms_and_nothing_else_of_the_decoder() -> None:
    # The same seed as the decoder's start: with one stream for both, the control would be the decoder itself.
    coder = new_crosscoder(200, torch.zeros(2, 64), 1.0, BatchTopKConfig(), 0.7, seed=0)
    directions = with_random_directions(coder, seed=0)
    assert torch.equal(directions[:2], coder.directions())
    torch.testing.assert_close(directions[2].norm(dim=1), torch.full((200,), 0.7))
    cosine = torch.nn.functional.cosine_similarity(directions[2], coder.directions()[1])
    assert float(cosine.abs().mean()) < 0.15  # about sqrt(2 / (pi * 64)) = 0.1


def crosscoder(store: Store) -> Crosscoder:
    coder = new_crosscoder(24, store.normalisation.mean, store.normalisation.scale, L1Config(), 0.7, seed=3)
    coder.encoder_bias -= 0.5
    coder.origin = {"pair": store.pair, "layer": store.layer, "sources": ["base", "chat"]}
    return coder


def test_the_pass_measures_the_held_out_tokens_as_a_pass_over_them_does(tmp_path: Path) -> None:
    activations = planted_activations(3000)[0]
    activations[5::100] *= 50  # kept in the store, as earlier versions did
    store = make_store(tmp_path, activations)
    coder = crosscoder(store)
    found = measure(coder, store, cells_of(store, make_tokenizer()), CONFIG, coder.directions()).heldout.sums
    expected = heldout_sums(coder, store, "heldout", 1000)
    assert int(found.n[1].sum()) > 1 and torch.equal(found.n, expected.n) and torch.equal(found.counts, expected.counts)
    for key in ("squared_error", "square", "total"):
        torch.testing.assert_close(getattr(found, key), getattr(expected, key), rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("trouble", ["no held-out tokens", "too few documents", "another layer"])
def test_bad_input_is_refused_before_the_pass(tmp_path: Path, trouble: str) -> None:
    store = make_store(tmp_path / "store", planted_activations(400)[0], heldout=0 if trouble == "no held-out tokens" else 0.2)
    coder, config = crosscoder(store), CONFIG
    message = r"has no tokens in the split 'heldout'"
    if trouble == "too few documents":
        config, message = CONFIG.model_copy(update={"blocks": 21}), "20 documents cannot make 21 blocks"
    if trouble == "another layer":
        coder.origin["layer"], message = 7, "trained on layer 7, but the store .* holds layer 1"
    read: list[int] = []
    with pytest.raises(UserError, match=message):
        analyze([Analysis(tmp_path, coder)], store, None, config, read.append)
    assert read == [] and not (tmp_path / "latents.parquet").exists()


@pytest.mark.parametrize("inputs", [DifferenceConfig(), SingleConfig(source="base")], ids=lambda inputs: inputs.kind)
def test_a_coder_with_one_decoder_has_a_table_of_its_activations(tmp_path: Path, inputs: Inputs) -> None:
    store = make_store(tmp_path / "store", planted_activations(3000)[0] + 0.5)
    view = view_of(inputs, store.sources)
    mean, scale = normalisation_of(view, store)
    coder = new_crosscoder(24, mean, scale, L1Config(), 0.7, seed=3, view=view)
    coder.encoder_bias -= 0.2
    coder.origin = {
        "pair": store.pair, "layer": store.layer, "training_tokens": 0, "settings": {"decoder_norm": 0.7},
    }  # fmt: skip
    analyze([Analysis(tmp_path, coder)], store, make_tokenizer(), CONFIG)
    assert all((tmp_path / name).exists() for name in ANALYSIS)
    table = pl.read_parquet(tmp_path / "latents.parquet")
    # The scalings again, from their definition: least squares of f d against either model's activations.
    rows = store.rows()
    h = store.gather(rows).double()
    read = h[:, 1] - h[:, 0] if inputs.kind == "difference" else h[:, 0]
    f = torch.relu((read - mean[0]) * scale @ coder.encoder.double().T + coder.encoder_bias)
    directions, centre = coder.decoder.double() / scale, store.normalisation.mean.double()
    for latent in (0, 7, 23):
        fd = torch.outer(f[:, latent], directions[latent])
        for model, name in enumerate(("base", "chat")):
            for target, y in (("activation", h[:, model]), ("activation_nobias", h[:, model] - centre[model])):
                beta = float((fd * y).sum() / fd.square().sum())
                assert table[f"beta_{target}_{name}"][latent] == pytest.approx(beta, rel=1e-4), (target, name)
    live = table.filter(pl.col("n_active") >= CONFIG.min_active)
    assert live.height > 5 and live["nu_activation"].is_not_nan().any()
    for name in (
        "delta_norm",
        "decoder_cosine",
        "nu_error",
        "nu_reconstruction",
        "nu_error_mirrored",
        "rank_sum",
        "beta_error_chat",
    ):
        assert table[name].is_nan().all(), name
    assert live["undefined_reason"].str.starts_with("the coder has one decoder").all()
    assert set(live["verdict"]) == {"undecided"} and live["verdict_reason"].to_list() == live["undefined_reason"].to_list()
    controls = json.loads((tmp_path / "health.json").read_text())["controls"]
    assert set(controls["split_halves"]) == {"nu_activation_nobias"}
    assert abs(controls["random_direction_activation_nobias_base"]) < 0.2


def test_a_nan_in_the_store_is_named(tmp_path: Path) -> None:
    activations = planted_activations(3000)[0]
    coder = crosscoder(make_store(tmp_path / "sound", activations, shard=1000))
    activations[1234, 1, 3] = torch.nan
    store = make_store(tmp_path / "store", activations, shard=1000)
    with pytest.raises(UserError, match=r"row 234 of shard-00001\.safetensors \(row 1234 of the store\)"):
        analyze([Analysis(tmp_path, coder)], store, None, CONFIG)
