"""The pass of the analysis, and its control: random directions are random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import make_tokenizer
from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig, BatchTopKConfig, L1Config, UserError
from crossdiff.crosscoder.metrics import heldout_sums
from crossdiff.crosscoder.model import Crosscoder, new_crosscoder
from crossdiff.latents.analyze import RANDOM, analyze, measure, with_random_directions
from crossdiff.latents.groups import cells_of
from planted import planted_activations
from stores import make_store

CONFIG = AnalyzeConfig(blocks=5, batch_tokens=300)


def test_random_directions_have_the_norms_and_nothing_else_of_the_decoder() -> None:
    # The same seed as the decoder's start: with one stream for both, the control would be the decoder itself.
    coder = new_crosscoder(200, torch.zeros(2, 64), 1.0, BatchTopKConfig(), 0.7, seed=0)
    directions = with_random_directions(coder, seed=0)
    assert torch.equal(directions[:2], coder.directions())
    torch.testing.assert_close(directions[RANDOM].norm(dim=1), torch.full((200,), 0.7))
    cosine = torch.nn.functional.cosine_similarity(directions[RANDOM], coder.directions()[1])
    assert float(cosine.abs().mean()) < 0.15  # about sqrt(2 / (pi * 64)) = 0.1


def crosscoder(store: Store) -> Crosscoder:
    coder = new_crosscoder(24, store.normalisation.mean, store.normalisation.scale, L1Config(), 0.7, seed=3)
    coder.encoder_bias -= 0.5
    coder.origin = {"pair": store.pair, "layer": store.layer, "sources": ["base", "chat"]}
    return coder


def test_the_pass_measures_the_held_out_tokens_as_a_pass_over_them_does(tmp_path: Path) -> None:
    store = make_store(tmp_path, planted_activations(3000)[0])  # with tokens on which much more than the median fires
    coder = crosscoder(store)
    found = measure(coder, store, cells_of(store, make_tokenizer()), CONFIG, coder.directions()).heldout
    expected = heldout_sums(coder, store, "heldout", 1000)
    assert int(found.n[1].sum()) > 1 and torch.equal(found.n, expected.n) and torch.equal(found.counts, expected.counts)
    for key in ("squared_error", "square", "total"):
        torch.testing.assert_close(getattr(found, key), getattr(expected, key), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("trouble", ["no held-out tokens", "too few documents", "another layer"])
def test_bad_input_is_refused_before_the_pass(tmp_path: Path, trouble: str) -> None:
    store = make_store(tmp_path / "store", planted_activations(400)[0], heldout=0 if trouble == "no held-out tokens" else 0.2)
    coder, config = crosscoder(store), CONFIG
    message = r"has no tokens in the split 'heldout'"
    if trouble == "too few documents":
        config, message = CONFIG.model_copy(update={"blocks": 21}), "20 documents cannot make 21 blocks"
    if trouble == "another layer":
        coder.origin["layer"], message = 7, "trained on layer 7, the store .* holds layer 1"
    read: list[int] = []
    with pytest.raises(UserError, match=message):
        analyze(tmp_path, coder, store, None, config, read.append)
    assert read == [] and not (tmp_path / "latents.parquet").exists()


def test_a_nan_in_the_store_is_named(tmp_path: Path) -> None:
    activations = planted_activations(3000)[0]
    coder = crosscoder(make_store(tmp_path / "sound", activations, shard=1000))
    activations[1234, 1, 3] = torch.nan
    store = make_store(tmp_path / "store", activations, shard=1000)
    with pytest.raises(UserError, match=r"row 234 of shard-00001\.safetensors \(row 1234 of the store\)"):
        analyze(tmp_path, coder, store, None, CONFIG)
