"""delta_norm, classes, ranks and pools by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from crossdiff.config import AnalyzeConfig
from crossdiff.latents.decoder import cosine, delta_norm, delta_norm_class
from crossdiff.latents.latent_table import _rank_sum, pools, scaling_columns
from crossdiff.latents.ranking import PUBLISHED, by_rank, plausible, title
from crossdiff.latents.scaling import TARGETS, Beta, Scaling
from crossdiff.statistics import Estimate


def test_delta_norm() -> None:
    # base 0: 1; equal: 1/2; chat half of base: 1/2 (-1/2 + 1) = 1/4; chat 0: 0; both 0: undefined.
    norms = torch.tensor([[0.0, 2.0], [1.0, 1.0], [2.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    values = delta_norm(norms).tolist()
    assert values[:4] == [1.0, 0.5, 0.25, 0.0]
    assert np.isnan(values[4])
    assert [delta_norm_class(v) for v in (0.0, 0.1, 0.25, 0.4, 0.6, 0.7, 0.9, 1.0, float("nan"))] == [
        "base_only", "base_only", "other", "shared", "shared", "other", "chat_only", "chat_only", "undefined",
    ]  # fmt: skip


def test_cosine() -> None:
    directions = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 3.0]]])
    assert cosine(directions).tolist() == [1.0, 0.0]


def test_rank_sum() -> None:
    ranks = _rank_sum(np.array([0.1, 0.5, np.nan, 0.3]), np.array([0.9, 0.2, 0.1, np.nan]))
    assert ranks[:2].tolist() == [3.0, 3.0]  # 1 + 2 and 2 + 1, among the two with both defined
    assert np.isnan(ranks[2:]).all()


def test_a_nu_far_from_0_to_1_is_flagged() -> None:
    error = torch.tensor([0.1, -0.2, 0.1, 2.0, 0.1, torch.nan], dtype=torch.float64)
    nobias = torch.tensor([-0.1, 0.1, 2.1, 0.1, -47.8, torch.nan], dtype=torch.float64)
    reconstruction = torch.tensor([-9.0, 0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)  # not the one that ranks
    nothing = Beta(torch.zeros(6), torch.zeros(6))
    values = {"error": error, "reconstruction": reconstruction, "reconstruction_nobias": nobias}
    result = Scaling(
        {(target, model): nothing for target in TARGETS for model in (0, 1)},
        {target: Estimate(value, value, value) for target, value in values.items()},
    )
    columns = scaling_columns(torch.full((20, 6), 100), result, result, AnalyzeConfig())
    assert columns["nu_outside"].tolist() == [False, True, True, False, True, False]
    assert columns["nu_reconstruction"][0] == columns["nu_reconstruction_mirrored"][0] == -9.0
    # nu_error ranks 2, 1, 3, 5, 4; without bias 2, 3, 5, 4, 1 and with bias 1, 2, 3, 4, 5. The last has no nu_error.
    assert columns["rank_sum"][:5].tolist() == [4, 4, 8, 9, 5]
    assert columns["rank_sum_paper"][:5].tolist() == [3, 3, 6, 9, 9]
    assert np.isnan([columns["rank_sum"][5], columns["rank_sum_paper"][5]]).all()


def test_latents_are_listed_by_rank_then_those_out_of_range_then_those_without_a_nu() -> None:
    table = pl.DataFrame({
        "latent": [0, 1, 2, 3, 4, 5], "rank_sum": [9.0, 2.0, 3.0, float("nan"), 4.0, 3.0],
        "nu_error": [0.1, 0.1, -0.2, 0.1, 0.1, 0.1], "nu_reconstruction_nobias": [0.1, 2.1, 0.1, float("nan"), 0.1, 0.1],
        "nu_reconstruction": [0.1] * 5 + [-9.0],
    })  # fmt: skip
    assert table.sort(*by_rank(), nulls_last=True)["latent"].to_list() == [5, 4, 0, 1, 2, 3]
    assert table.filter(plausible())["latent"].to_list() == [0, 4, 5]
    assert table.filter(plausible(PUBLISHED))["latent"].to_list() == [0, 1, 3, 4]


def test_a_nu_is_named_with_its_variant() -> None:
    assert title("nu_reconstruction") == "nu_reconstruction (with bias)"
    assert title("nu_reconstruction_nobias_mirrored") == "nu_reconstruction_mirrored (without bias)"
    assert title("nu_error_mirrored") == "nu_error_mirrored" and title("delta_norm") == "delta_norm"


def test_pools_are_equally_large_and_chosen_by_rank() -> None:
    rows = [(i, 0.95, float(10 - i), "chat_specific") for i in range(5)]
    rows += [(10 + i, 0.5, 20.0, "shared") for i in range(3)]
    # No rank, and norms that are not alike.
    rows += [(20, 0.95, float("nan"), "undecided"), (21, 0.7, 30.0, "shared")]
    table = pl.DataFrame(rows, schema=["latent", "delta_norm", "rank_sum", "verdict"], orient="row")
    chosen = pools(table, 50, seed=0)
    assert chosen["chat_specific"] == [4, 3, 2]  # lowest rank sums first, no more than there are shared ones
    assert chosen["shared"] == [10, 11, 12]
    assert pools(table, 1, seed=0)["chat_specific"] == [4]
