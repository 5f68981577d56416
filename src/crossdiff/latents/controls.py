"""Controls of latent scaling that come with every run, from the sums of its one pass (METHOD: latent scaling, checks)."""

from __future__ import annotations

from typing import Any

import polars as pl
import torch
from scipy.stats import spearmanr

from crossdiff.crosscoder.model import Crosscoder
from crossdiff.latents.decoder import SHARED
from crossdiff.latents.scaling import Sums, numerators, scaling
from crossdiff.shapes import Float, Int64, Tensor

BASE, CHAT = 0, 1
MEASURES = ("error", "reconstruction")
ALIKE = 0.9
"""Decoder cosine from which on a latent of equal norms is beyond doubt the same in both models."""


def of_blocks(sums: Sums, blocks: Int64[Tensor, " block"]) -> Sums:
    """The sums of some blocks alone."""
    return Sums(sums.n[blocks], sums.f[blocks], sums.f2[blocks], sums.reconstruction[:, :, blocks], sums.error[:, :, blocks])


def random_directions(
    crosscoder: Crosscoder, sums: Sums, direction: int, directions: Float[Tensor, "direction latent d_model"]
) -> dict[str, float]:
    """Median beta along random directions, which has to be near 0."""
    result = scaling(crosscoder, sums, direction, BASE, CHAT, directions)
    return {
        f"random_direction_{target}_{name}": float(result.betas[target, source].value.nanmedian())
        for target in ("error", "activation_nobias")
        for source, name in enumerate(crosscoder.sources)
    }


def shared_latents(table: pl.DataFrame) -> dict[str, Any]:
    """Median nu of the latents whose directions agree in length and angle, which has to be near 1; None without any."""
    alike = table.filter(pl.col("delta_norm").is_between(*SHARED) & (pl.col("decoder_cosine") > ALIKE))
    alike = alike.filter(pl.col("rank_sum").is_not_nan())
    return {"n_latents": alike.height} | {f"median_nu_{target}": alike[f"nu_{target}"].median() for target in MEASURES}


def split_halves(crosscoder: Crosscoder, sums: Sums, table: pl.DataFrame) -> dict[str, Any]:
    """nu on the even blocks of documents against nu on the odd ones, over the latents with a defined nu.

    The rank correlation (Spearman) does not hang on single far values; None with fewer than 3 latents.
    """
    parts = torch.arange(len(sums.n)) % 2
    halves = [numerators(crosscoder, of_blocks(sums, (parts == half).nonzero().squeeze(1)), CHAT) for half in (0, 1)]
    found: dict[str, Any] = {}
    for target in MEASURES:
        first, second = (half[target][BASE].sum(0) / half[target][CHAT].sum(0) for half in halves)
        both = first.isfinite() & second.isfinite() & torch.from_numpy(table["rank_sum"].is_not_nan().to_numpy())
        n, difference = int(both.sum()), (first - second)[both].abs()
        found[f"nu_{target}"] = {
            "n_latents": n,
            "rank_correlation": float(spearmanr(first[both], second[both]).statistic) if n > 2 else None,
            "median_difference": float(difference.median()) if n else None,
        }
    return found
