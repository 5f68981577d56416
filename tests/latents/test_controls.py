"""Controls of a run: halves of the blocks, shared latents, random directions."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from test_scaling import BLOCKS, LATENTS, activations, collect, crosscoder

from crossdiff.latents.controls import random_directions, shared_latents, split_halves
from crossdiff.latents.scaling import scaling


def test_halves_are_what_a_pass_over_half_of_the_documents_gives() -> None:
    coder, parts = crosscoder(), activations()
    sums = collect(coder, parts)
    table = pl.DataFrame({"rank_sum": [1.0] * (LATENTS - 1) + [float("nan")]})
    found = split_halves(coder, sums, table)
    even, odd = (sums.of_blocks(torch.tensor(blocks)) for blocks in ([0, 2], [1, 3]))
    assert len(even.n) == 2 == BLOCKS // 2
    for target in ("error", "reconstruction_nobias"):
        betas = [scaling(coder, half, 1, 0, 1).betas for half in (even, odd)]
        first, second = ((beta[target, 0].value / beta[target, 1].value)[: LATENTS - 1] for beta in betas)
        entry = found[f"nu_{target}"]
        assert entry["n_latents"] == LATENTS - 1
        assert entry["median_difference"] == pytest.approx(float((first - second).abs().median()))
    torch.testing.assert_close((even.f2 + odd.f2).sum(0), sums.f2.sum(0))


def test_equal_halves_agree_and_too_few_latents_say_none() -> None:
    coder, parts = crosscoder(), activations()
    sums = collect(coder, [parts[0], parts[0], parts[1], parts[1]])
    found = split_halves(coder, sums, pl.DataFrame({"rank_sum": [1.0] * LATENTS}))
    assert found["nu_error"]["rank_correlation"] == pytest.approx(1.0)
    assert found["nu_error"]["median_difference"] == pytest.approx(0.0, abs=1e-9)
    none = split_halves(coder, sums, pl.DataFrame({"rank_sum": [float("nan")] * LATENTS}))
    assert none["nu_error"] == {
        "n_latents": 0, "rank_correlation": None, "median_difference": None, "reason": "fewer than 3 latents",
    }  # fmt: skip


def test_shared_latents_are_chosen_by_their_directions() -> None:
    table = pl.DataFrame({
        "delta_norm": [0.5, 0.45, 0.5, 0.95, 0.5], "decoder_cosine": [0.99, 0.95, 0.2, 0.99, 0.99],
        "rank_sum": [1.0, 2.0, 3.0, 4.0, float("nan")],
        "nu_error": [0.8, 1.0, 9.0, 9.0, 9.0], "nu_reconstruction_nobias": [1.0, 1.1, 9.0, 9.0, 9.0],
    })  # fmt: skip
    found = shared_latents(table)
    assert found == {"n_latents": 2, "median_nu_error": 0.9, "median_nu_reconstruction_nobias": 1.05}
    assert shared_latents(table[3:])["median_nu_error"] is None


def test_random_directions_name_the_sources() -> None:
    coder = crosscoder()
    coder.origin = {"sources": ["base", "chat"]}
    found = random_directions(coder, collect(coder, activations()), 1)
    assert set(found) == {
        f"random_direction_{target}_{source}" for target in ("error", "activation_nobias") for source in ("base", "chat")
    }
