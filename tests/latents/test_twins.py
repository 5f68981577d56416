"""Twins and neighbours against the full matrices that the code never builds."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from crossdiff.config import L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents import decoder, twins
from crossdiff.latents.stream import Chunk
from crossdiff.latents.twins import NEIGHBOUR_COLUMNS, TWIN_COLUMNS, CoActivation, neighbour_table, twin_candidates, twin_table
from crossdiff.ranks import ALONE
from pretend import accelerator

D, LATENTS, TOKENS = 5, 40, 300


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "BLOCK", 7)


def crosscoder() -> Crosscoder:
    """Directions near few axes, so that many pairs have a high cosine; latents 0 to 14 are chat-only, 15 to 29 base-only."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(D)[torch.randint(3, (LATENTS,), generator=generator)]
    decoder = (axes + 0.15 * torch.randn(LATENTS, D, generator=generator)).repeat(1, 2)
    decoder[:15, :D] *= 0.05
    decoder[15:30, D:] *= 0.05
    decoder[35:, :D] *= 0.6  # delta_norm 0.7: neither
    return Crosscoder(
        encoder=decoder.clone(), encoder_bias=torch.zeros(LATENTS), decoder=decoder, decoder_bias=torch.zeros(2 * D),
        mean=torch.zeros(2, D), scale=1.0, sparsity=L1Config(),
    )  # fmt: skip


def chunk_of(f: torch.Tensor) -> Chunk:
    token, latent = f.nonzero(as_tuple=True)
    code = SparseCode(token, latent, f[token, latent], *f.shape)
    empty = torch.zeros(len(f), 2 * D)
    return Chunk(
        block=0, rows=np.arange(len(f)), sequence=torch.zeros(len(f), dtype=torch.int64), numbers=np.array([0]), x=empty,
        code=code, v=code.values, reconstruction=empty, error=empty, h=empty.unsqueeze(1),
    )  # fmt: skip


def cosines(coder: Crosscoder, source: int) -> torch.Tensor:
    """Of each chat direction with each direction of a source, in float64, by the definition."""
    own = coder.decoder.double().view(LATENTS, 2, D)
    a, b = own[:, 1], own[:, source]
    return torch.stack([torch.stack([x @ y / (x.norm() * y.norm()) for y in b]) for x in a])


def test_every_pair_over_the_limit_with_its_overlap() -> None:
    coder = crosscoder()
    f = torch.rand(TOKENS, LATENTS, generator=torch.Generator().manual_seed(1))
    f[f < 0.8] = 0
    f[:, 15] = 0  # a twin that is dead
    coactive = CoActivation(twin_candidates(coder, 0.95), LATENTS)
    for part in f.split(64):
        coactive.add(chunk_of(part))
    n_active = (f > 0).sum(0)
    table = twin_table(coder, coactive, n_active)
    matrix, on = cosines(coder, 0), f > 0
    expected = {(i, j) for i in range(15) for j in range(15, 35) if matrix[i, j] > 0.95}
    assert len(expected) > 30
    assert set(table.select("latent", "twin").iter_rows()) == expected
    assert set(table.columns) == set(TWIN_COLUMNS)
    for r in table.iter_rows(named=True):
        i, j = r["latent"], r["twin"]
        both, either = int((on[:, i] & on[:, j]).sum()), int((on[:, i] | on[:, j]).sum())
        assert r["cosine"] == pytest.approx(float(matrix[i, j]), abs=1e-5)
        assert r["n_both"] == both
        assert r["jaccard"] == pytest.approx(both / either)
        assert r["share_of_latent"] == pytest.approx(both / int(on[:, i].sum()))
        assert r["twin_class"] == ("base_only" if j < 30 else "shared")
        if j == 15:
            assert both == 0 and np.isnan(r["share_of_twin"])
    for _, part in table.group_by("latent"):
        assert part["n_both"].to_list() == sorted(part["n_both"].to_list(), reverse=True)


def test_no_chat_only_latent_has_no_twins() -> None:
    coder = crosscoder()
    coder.decoder[:, :D] = coder.decoder[:, D:]
    coactive = CoActivation(twin_candidates(coder, 0.9), LATENTS)
    coactive.add(chunk_of(torch.ones(10, LATENTS)))
    table = twin_table(coder, coactive, torch.full((LATENTS,), 10))
    assert table.height == 0 and table["twin_class"].dtype == pl.String


def test_a_latent_keeps_its_best_twins_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "MAX_TWINS", 2)
    coder = crosscoder()
    found = twin_candidates(coder, 0.5)
    matrix = cosines(coder, 0)
    for latent in range(15):
        mine = found.twin[found.latent == latent].tolist()
        best = sorted(range(15, 35), key=lambda j: -float(matrix[latent, j]))[:2]
        assert mine == [j for j in best if matrix[latent, j] > 0.5]


def test_neighbours_are_the_nearest_active_latents() -> None:
    coder = crosscoder()
    coder.decoder[3] = coder.decoder[4]  # a copy of a latent is its nearest neighbour
    active = torch.ones(LATENTS, dtype=torch.bool)
    active[[6, 20]] = False
    table = neighbour_table(coder, active)
    assert set(table.columns) == set(NEIGHBOUR_COLUMNS)
    matrix = cosines(coder, 1)
    matrix[:, ~active] = -2
    matrix.fill_diagonal_(-2)
    assert table["latent"].unique().sort().to_list() == active.nonzero().squeeze(1).tolist()
    for latent in active.nonzero().squeeze(1).tolist():
        mine = table.filter(latent=latent)
        assert mine["rank"].to_list() == list(range(5))
        assert mine["cosine"].to_numpy() == pytest.approx(matrix[latent].topk(5).values.numpy(), abs=1e-5)
        assert latent not in mine["neighbour"].to_list()
    assert table.filter(latent=3, rank=0)["neighbour"].item() == 4
    assert neighbour_table(coder, torch.arange(LATENTS) < 1).height == 0
    assert neighbour_table(coder, torch.zeros(LATENTS, dtype=torch.bool)).height == 0


def test_twins_and_neighbours_are_found_on_an_accelerator() -> None:
    coder = crosscoder()
    f = torch.rand(TOKENS, LATENTS, generator=torch.Generator().manual_seed(1))
    f[f < 0.8] = 0
    expected = CoActivation(twin_candidates(coder, 0.95), LATENTS)
    expected.add(chunk_of(f))
    with accelerator() as device:
        found = CoActivation(twin_candidates(coder.to(device), 0.95), LATENTS, device)
        found.add(chunk_of(f.to(device)))
        found.over(ALONE)
        neighbours = neighbour_table(coder.to(device), torch.ones(LATENTS, dtype=torch.bool))
    assert expected.n_both.sum() > 0 and torch.equal(found.n_both, expected.n_both)
    assert torch.equal(found.pairs.twin, expected.pairs.twin)
    assert_frame_equal(neighbours, neighbour_table(coder, torch.ones(LATENTS, dtype=torch.bool)))
