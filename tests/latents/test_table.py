"""delta_norm, classes, verdicts and ranks by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from crossdiff.config import AnalyzeConfig
from crossdiff.latents.decoder import cosine, delta_norm, delta_norm_class
from crossdiff.latents.table import _rank_sum, _with_verdicts, pools


def test_delta_norm() -> None:
    # base 0: 1; equal: 1/2; chat half of base: 1/2 (-1/2 + 1) = 1/4; chat 0: 0; both 0: undefined.
    norms = torch.tensor([[0.0, 2.0], [1.0, 1.0], [2.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    values = delta_norm(norms).tolist()
    assert values[:4] == [1.0, 0.5, 0.25, 0.0]
    assert np.isnan(values[4])
    assert [delta_norm_class(v) for v in (0.0, 0.1, 0.25, 0.4, 0.6, 0.7, 0.9, 1.0, float("nan"))] == [
        "base_only", "base_only", "other", "shared", "shared", "other", "chat_only", "chat_only", "other",
    ]  # fmt: skip


def test_cosine() -> None:
    directions = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 3.0]]])
    assert cosine(directions).tolist() == [1.0, 0.0]


def test_rank_sum() -> None:
    ranks = _rank_sum(np.array([0.1, 0.5, np.nan, 0.3]), np.array([0.9, 0.2, 0.1, np.nan]))
    assert ranks[:2].tolist() == [3.0, 3.0]  # 1 + 2 and 2 + 1, among the two with both defined
    assert np.isnan(ranks[2:]).all()


def row(**changes: object) -> dict[str, object]:
    base = {"n_active": 500, "undefined_reason": None, "delta_norm": 0.95, "rank_sum": 2.0, "latent": 0}
    for nu in ("error", "reconstruction", "error_mirrored", "reconstruction_mirrored"):
        base |= {f"nu_{nu}": 0.05, f"nu_{nu}_low": 0.0, f"nu_{nu}_high": 0.1}
    return base | changes


@pytest.mark.parametrize(
    ("changes", "verdict", "specific", "paper"),
    [
        ({}, "chat_specific", True, True),
        ({"delta_norm": 0.8}, "chat_specific", True, False),  # the paper's set wants 0.9
        ({"nu_error_high": 0.25}, "undecided", False, True),  # the interval reaches over the threshold
        ({"delta_norm": 0.5}, "rotated", False, False),
        ({"nu_error": 0.9, "nu_error_low": 0.8, "nu_error_high": 1.0}, "shared", False, False),
        ({"delta_norm": 0.1, "nu_error": 0.9, "nu_error_low": 0.8, "nu_error_high": 1.0}, "base_specific", False, False),
        ({"n_active": 0, "undefined_reason": "never active", "nu_error": float("nan")}, "dead", False, False),
        ({"undefined_reason": "beta_error_chat may be 0", "nu_error": float("nan")}, "undecided", False, False),
    ],
)
def test_verdicts(changes: dict[str, object], verdict: str, specific: bool, paper: bool) -> None:
    found = _with_verdicts(pl.DataFrame([row(**changes)]), AnalyzeConfig()).row(0, named=True)
    assert (found["verdict"], found["chat_specific"], found["chat_specific_paper"]) == (verdict, specific, paper)


def test_pools_are_equally_large_and_chosen_by_rank() -> None:
    rows = [row(latent=i, rank_sum=float(10 - i)) for i in range(4)]
    rows += [row(latent=10 + i, delta_norm=0.5, nu_error=0.9, nu_error_low=0.8, nu_error_high=1.0) for i in range(3)]
    table = _with_verdicts(pl.DataFrame(rows), AnalyzeConfig())
    chosen = pools(table, 50, seed=0)
    assert chosen["chat_specific"] == [3, 2, 1]  # lowest rank sums first, no more than there are shared ones
    assert chosen["shared"] == [10, 11, 12]
    assert pools(table, 1, seed=0)["chat_specific"] == [3]
