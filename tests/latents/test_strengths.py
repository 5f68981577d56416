"""Histograms, correlated latents and matches against slow oracles, and merged from parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from crossdiff.config import AnalyzeConfig, BatchTopKConfig, L1Config
from crossdiff.crosscoder import checkpoint
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.errors import UserError
from crossdiff.latents import correlated
from crossdiff.latents.correlated import LEAST, N_CORRELATED, Correlations
from crossdiff.latents.histogram import BINS, Histograms
from crossdiff.latents.matches import cosine_between, matches
from crossdiff.latents.stream import chunks
from planted import planted_activations
from stores import make_store

CONFIG = AnalyzeConfig(blocks=5, batch_tokens=300)


@pytest.fixture
def measured(tmp_path: Path) -> tuple[Histograms, Correlations, np.ndarray]:
    """Both accumulators over a store, and v `[token, latent]` of its counted tokens."""
    store = make_store(tmp_path / "store", planted_activations(3000)[0])
    coder = new_crosscoder(24, store.normalisation.mean, store.normalisation.scale, L1Config(), 0.7, seed=3)
    coder.encoder_bias -= 0.5
    coder.encoder_bias[7] = -1e6  # dead
    coder.origin = {"pair": store.pair, "layer": store.layer}
    histograms, correlations, dense = Histograms(24), Correlations(24, 3000, 0), []
    for chunk in chunks(coder, store, CONFIG.blocks, CONFIG.batch_tokens):
        histograms.add(chunk)
        correlations.add(chunk)
        v = torch.zeros(len(chunk.rows), 24)
        v[chunk.code.token, chunk.code.latent] = chunk.v
        dense.append(v)
    return histograms, correlations, torch.cat(dense).double().numpy()


def test_the_histogram_counts_every_activation(measured: tuple[Histograms, Correlations, np.ndarray]) -> None:
    histograms, _, v = measured
    rows = {latent: (width, np.frombuffer(counts, "<i8")) for latent, width, counts in histograms.rows()}
    assert 7 not in rows and len(rows) == 23
    for latent, (width, counts) in rows.items():
        mine = v[:, latent][v[:, latent] > 0]
        expected = np.histogram(mine, bins=np.arange(BINS + 1) * width)[0]
        np.testing.assert_array_equal(counts, expected[: len(counts)])
        assert counts.sum() == len(mine) and counts[-1] > 0
        # The width is a power of two, and the largest value is in the upper half of the bins.
        assert np.log2(width) % 1 == 0 and BINS / 2 <= mine.max() / width < BINS


def test_the_histogram_is_the_same_in_any_order_and_merged() -> None:
    latent = torch.tensor([0, 1, 0, 0, 1, 0])
    v = torch.tensor([1000.0, 0.25, 1e-3, 64.0, 3.0, 0.0])
    whole, back, left, right = (Histograms(3) for _ in range(4))
    whole.count(latent, v)
    for index in reversed(range(6)):
        back.count(latent[index : index + 1], v[index : index + 1])
    left.count(latent[:2], v[:2])
    right.count(latent[2:], v[2:])
    left.merge(right.counts, right.exponent)
    # 1000 needs bins of 16: 64 is in bin 4, 0.001 in bin 0. 3 needs bins of 1/16: 0.25 is in bin 4.
    assert whole.rows()[0][:2] == (0, 16.0) and whole.rows()[1][:2] == (1, 0.0625)
    assert [int(whole.counts[0, k]) for k in (0, 4, 62)] == [1, 1, 1] and int(whole.counts.sum()) == 5
    assert [int(whole.counts[1, k]) for k in (4, 48)] == [1, 1]
    assert back.rows() == whole.rows() and left.rows() == whole.rows()


def test_correlations_are_those_of_all_tokens_in_a_small_store(
    measured: tuple[Histograms, Correlations, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, correlations, v = measured
    monkeypatch.setattr(correlated, "BLOCK", 5)  # several blocks, the last one smaller
    assert correlations.n_tokens == len(v)
    rows = correlations.rows()
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(v.T)
    for latent in range(24):
        others = [other for other in range(24) if other != latent and r[latent, other] >= LEAST]
        expected = sorted(((r[latent, other], other) for other in others), reverse=True)
        mine = [row for row in rows if row[0] == latent]
        assert [row[1] for row in mine] == list(range(len(mine)))
        assert [row[2] for row in mine] == [other for _, other in expected[:N_CORRELATED]]
        assert [row[3] for row in mine] == pytest.approx([value for value, _ in expected[:N_CORRELATED]])
        assert [row[4] for row in mine] == [int(((v[:, latent] > 0) & (v[:, row[2]] > 0)).sum()) for row in mine]
    assert len(rows) > 24


def test_the_sample_of_a_large_store_does_not_depend_on_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlated, "SAMPLE", 1000)
    store = make_store(tmp_path / "store", planted_activations(3000)[0])
    coder = new_crosscoder(24, store.normalisation.mean, store.normalisation.scale, L1Config(), 0.7, seed=3)
    coder.origin = {"pair": store.pair, "layer": store.layer}
    found = []
    for batch in (300, 700):
        correlations = Correlations(24, 3000, 5)
        for chunk in chunks(coder, store, CONFIG.blocks, batch):
            correlations.add(chunk)
        found.append((correlations.n_tokens, [(*row[:3], round(row[3], 9), row[4]) for row in correlations.rows()]))
    assert found[0] == found[1] and 800 < found[0][0] < 1200


def test_matches_have_the_highest_cosines_of_chat_directions(tmp_path: Path) -> None:
    coders = [new_crosscoder(24, torch.zeros(2, 12), 1.0, BatchTopKConfig(k=3), 0.7, seed=seed) for seed in (1, 2)]
    for number, coder in enumerate(coders):
        (tmp_path / str(number)).mkdir()
        checkpoint.save(coder, tmp_path / str(number))
    mine, theirs = (torch.nn.functional.normalize(coder.directions()[1].double(), dim=1) for coder in coders)
    cosines = (theirs @ mine[4]).numpy()
    found = matches(tmp_path / "0", 4, [tmp_path / "1"])
    assert [each.latent for each in found] == np.argsort(-cosines)[:3].tolist() and {each.training for each in found} == {"1"}
    assert [each.cosine for each in found] == pytest.approx(sorted(cosines)[::-1][:3], abs=1e-6)
    assert cosine_between(tmp_path / "0", 4, tmp_path / "1", 9, "chat") == pytest.approx(cosines[9], abs=1e-6)
    assert cosine_between(tmp_path / "0", 4, tmp_path / "1", 9, "neither") is None


def test_a_damaged_crosscoder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"cannot read the decoder of .*model.safetensors: .*; train the crosscoder again"):
        matches(tmp_path, 0, [tmp_path])
