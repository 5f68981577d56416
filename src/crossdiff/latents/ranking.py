"""Which nu rank latents and give the verdicts, within which range, and how texts name them."""

from __future__ import annotations

import polars as pl

RECONSTRUCTION = "reconstruction_nobias"
"""The target whose nu, beside nu_error, ranks latents and gives the verdicts. It leaves out the models' biases and means, which
are in every reconstruction whatever the latent does (docs/latent-scaling.md#negative-ratios)."""
RANKED = ("nu_error", f"nu_{RECONSTRUCTION}")
PUBLISHED = ("nu_error", "nu_reconstruction")
"""The nus of the published rule and tables, with the biases and means."""
RECONSTRUCTIONS = (RANKED[1], PUBLISHED[1])
"""The nus of the reconstruction as they are shown: the one that ranks, and the published one beside it."""
RANKS = {"rank_sum": RANKED, "rank_sum_paper": PUBLISHED}
"""The columns of ranks, and the two nus whose ranks each adds up."""
PLAUSIBLE = (-0.1, 2.0)
"""Range outside of which the published analyses do not rank a latent by its nu."""


def plausible(nus: tuple[str, ...] = RANKED) -> pl.Expr:
    """Whether all of the nus are defined and within `PLAUSIBLE`, so that a latent may be ranked by them."""
    return pl.all_horizontal(pl.col(nus).is_between(*PLAUSIBLE)).fill_null(value=False)


def by_rank() -> tuple[pl.Expr, ...]:
    """Sort keys, with nulls last: by rank_sum, then the latents whose nu are out of range, then those with an undefined nu."""
    rank = pl.col("rank_sum").fill_nan(None)
    return rank.is_null(), ~plausible(), rank, pl.col("latent")


def bias_of(nu: str) -> str:
    """Whether a nu of the reconstruction is one with or without the biases and means, in words."""
    return "without bias" if "_nobias" in nu else "with bias"


def title(nu: str) -> str:
    """A column of nu as texts name it: `nu_reconstruction (without bias)`; other columns keep their names."""
    return f"{nu.replace('_nobias', '')} ({bias_of(nu)})" if nu.startswith("nu_reconstruction") else nu
