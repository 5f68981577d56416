"""Controls of latent scaling that come with every run, from the sums of its one pass (docs/method.md#checks)."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from scipy.stats import spearmanr

from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.decoder import BASE_INDEX, CHAT_INDEX, SHARED
from crossdiff.latents.ranking import RECONSTRUCTION
from crossdiff.latents.scaling import Sums, numerators, scaling
from crossdiff.sources import SOURCES

MEASURES = ("error", RECONSTRUCTION)
ALIKE = 0.9
"""Decoder cosine above which a latent with equal norms is certainly the same in both models."""


def random_directions(crosscoder: Crosscoder, sums: Sums, direction: int) -> dict[str, float]:
    """Median beta along random directions, which must be near 0."""
    result = scaling(crosscoder, sums, direction, BASE_INDEX, CHAT_INDEX, ("error", "activation_nobias"))
    return {
        f"random_direction_{target}_{SOURCES[model]}": float(beta.value.nanmedian())
        for (target, model), beta in result.betas.items()
    }


def shared_latents(table: pl.DataFrame) -> dict[str, Any]:
    """Median nu of the latents whose directions agree in length and angle, which must be near 1; None without such latents."""
    alike = table.filter(pl.col("delta_norm").is_between(*SHARED) & (pl.col("decoder_cosine") > ALIKE))
    alike = alike.filter(pl.col("rank_sum").is_not_nan())
    return {"n_latents": alike.height} | {f"median_nu_{target}": alike[f"nu_{target}"].median() for target in MEASURES}


def split_halves(crosscoder: Crosscoder, sums: Sums, table: pl.DataFrame) -> dict[str, Any]:
    """Agreement of nu between the even and the odd blocks of documents, over the latents with a defined nu.

    The nu is that of error and reconstruction, or of the activation for a coder with one decoder. The rank correlation is
    Spearman's, which does not depend on outliers; None, with a reason, where it is undefined.
    """
    parity = torch.arange(len(sums.n)) % 2
    halves = [numerators(crosscoder, sums.of_blocks((parity == half).nonzero().squeeze(1)), CHAT_INDEX) for half in (0, 1)]
    found: dict[str, Any] = {}
    for target in MEASURES if crosscoder.n_sources > 1 else ("activation_nobias",):
        first, second = (half[target][BASE_INDEX].sum(0) / half[target][CHAT_INDEX].sum(0) for half in halves)
        defined = table["rank_sum" if target in MEASURES else f"nu_{target}"].is_not_nan()
        both = first.isfinite() & second.isfinite() & torch.from_numpy(defined.to_numpy())
        n = int(both.sum())
        found[f"nu_{target}"] = {
            "n_latents": n,
            "rank_correlation": None,
            "median_difference": float((first - second)[both].abs().median()) if n else None,
        }
        if n <= 2 or any(bool((half[both] == half[both][0]).all()) for half in (first, second)):
            found[f"nu_{target}"]["reason"] = "fewer than 3 latents" if n <= 2 else "all latents have the same nu"
        else:
            found[f"nu_{target}"]["rank_correlation"] = float(spearmanr(first[both], second[both]).statistic)
    return found
