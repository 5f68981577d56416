"""The latent table: one row per latent, every column documented in `COLUMNS`.

A coder with one decoder (an SAE, a diff-SAE) has the same columns. Those that compare two directions, or the two models' errors
or reconstructions, are NaN, and the reason columns say so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from scipy.stats import rankdata

from crossdiff.config import AnalyzeConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.activity import Activity
from crossdiff.latents.decoder import BASE_INDEX, CHAT_INDEX, SHARED, cosine, delta_norm, delta_norm_class
from crossdiff.latents.groups import GROUPS
from crossdiff.latents.ranking import PLAUSIBLE, RANKED, RANKS, title
from crossdiff.latents.scaling import TARGETS, Beta, Scaling, Sums, scaling
from crossdiff.latents.verdict import SETS, VERDICTS
from crossdiff.shapes import Bool, Int64, Tensor
from crossdiff.sources import BASE, CHAT, SOURCES
from crossdiff.statistics import Estimate

MIRRORED = ("error", "reconstruction", "reconstruction_nobias")
ONE_DECODER = "the coder has one decoder, so no error or reconstruction of each model"
REASONS = {"undefined_reason": pl.String, "undefined_reason_mirrored": pl.String}
RANK_WORDS = {name: " + ".join(f"rank of {title(nu)}" for nu in nus) for name, nus in RANKS.items()}
COLUMNS = {
    "latent": "number of the latent",
    "n_active": "tokens on which it is active",
    "frequency": "share of the analysed tokens on which it is active",
    "mean_activation": "mean of v = f * sum of decoder norms over its active tokens",
    "max_activation": "largest v",
    "norm_base": "norm of its base decoder direction, normalised space; NaN if the coder has none",
    "norm_chat": "norm of its chat decoder direction, normalised space; NaN if the coder has none",
    "delta_norm": "relative decoder norm, 0 = base-only, 1 = chat-only",
    "delta_norm_class": "base_only [0, 0.1], shared [0.4, 0.6], chat_only [0.9, 1], other; undefined without a delta_norm",
    "decoder_cosine": "cosine of its two decoder directions",
    "beta_*": "latent scaling of a target along the chat direction, with its jackknife standard error (_se)",
    "nu_*": "beta of the base model over beta of the chat model: near 0 specific to the chat model, near 1 shared, negative "
    "where the base model has the chat direction with the opposite sign",
    "nu_*_low, nu_*_high": "ends of its 95% interval",
    "nu_reconstruction, nu_reconstruction_nobias": "with the models' biases and means, as in the published tables, and without "
    f"them; {RANKED[1]} ranks latents and gives the verdicts",
    "nu_*_mirrored": "the same along the base direction, chat over base: near 0 specific to the base model",
    "nu_outside": f"{' or '.join(map(title, RANKED))} is not between {PLAUSIBLE[0]:g} and {PLAUSIBLE[1]:g}; lists by rank "
    "leave it out",
    "undefined_reason": "why a nu is NaN: too few activations (then every nu is), one decoder, or a denominator that may be 0",
    "undefined_reason_mirrored": "the same for the mirrored nus",
    "rank_sum": f"{RANK_WORDS['rank_sum']}, small = specific; NaN unless both are defined",
    "rank_sum_paper": f"the published rank: {RANK_WORDS['rank_sum_paper']}",
    "verdict": "which model has the concept: " + ", ".join(VERDICTS),
    "verdict_reason": "why, in words and numbers",
    **SETS,
    "frequency_<group>": "share of the group's tokens on which it is active; groups: " + ", ".join(GROUPS),
    "share_<group>": "share of its active tokens that belong to the group",
}


def latent_table(crosscoder: Crosscoder, sums: Sums, activity: Activity, config: AnalyzeConfig) -> pl.DataFrame:
    """Join geometry, scaling and activity of a coder into one row per latent; `with_verdicts` adds the verdicts."""
    n_active = sums.n.sum(0)
    tokens_of_groups, counts_of_groups = activity.by_group()
    delta = delta_norm(crosscoder.norms().double())
    columns: dict[str, Any] = {
        "latent": np.arange(crosscoder.n_latents),
        "n_active": n_active.numpy(),
        "frequency": (n_active / int(activity.tokens.sum())).double().numpy(),
        "mean_activation": (activity.total.sum(0) / n_active).numpy(),
        "max_activation": activity.maximum.amax(0).double().numpy(),
        "norm_base": _norms_of(crosscoder, BASE),
        "norm_chat": _norms_of(crosscoder, CHAT),
        "delta_norm": delta.numpy(),
        "delta_norm_class": [delta_norm_class(value) for value in delta.tolist()],
        "decoder_cosine": cosine(crosscoder.directions()).numpy(),
    }
    along_chat = scaling(crosscoder, sums, CHAT_INDEX, numerator=BASE_INDEX, denominator=CHAT_INDEX)
    along_base = scaling(crosscoder, sums, BASE_INDEX, numerator=CHAT_INDEX, denominator=BASE_INDEX, targets=MIRRORED)
    columns |= scaling_columns(sums.n, along_chat, along_base, config)
    for name, tokens, counts in zip(GROUPS, tokens_of_groups, counts_of_groups, strict=True):
        columns[f"frequency_{name}"] = (counts / tokens).double().numpy()
        columns[f"share_{name}"] = (counts / n_active).double().numpy()
    return pl.DataFrame(columns, schema_overrides=REASONS)


def scaling_columns(
    n: Int64[Tensor, "block unit"], along_chat: Scaling, along_base: Scaling, config: AnalyzeConfig
) -> dict[str, Any]:
    """The columns of latent scaling, of latents or of groups of latents.

    Args:
        n: number of tokens per block on which the unit is active.
    """
    n_active = n.sum(0)
    few = (n_active < config.min_active) | ((n > 0).sum(0) < len(n) / 2)
    columns: dict[str, Any] = _beta_columns(along_chat, len(n_active))
    columns |= _nu_columns(along_chat, few, "") | _nu_columns(along_base, few, "_mirrored", MIRRORED)
    columns["undefined_reason"] = _reasons(n, along_chat, CHAT, config)
    columns["undefined_reason_mirrored"] = _reasons(n, along_base, BASE, config)
    ranked = [columns[nu] for nu in RANKED]
    columns["nu_outside"] = np.any([(nu < PLAUSIBLE[0]) | (nu > PLAUSIBLE[1]) for nu in ranked], axis=0)
    return columns | {name: _rank_sum(*(columns[nu] for nu in nus)) for name, nus in RANKS.items()}


def _norms_of(crosscoder: Crosscoder, model: str) -> npt.NDArray[Any]:
    """Norms of the directions in one model; NaN if the coder has none there."""
    if model not in crosscoder.sources:
        return np.full(crosscoder.n_latents, np.nan)
    return crosscoder.norms()[:, crosscoder.sources.index(model)].double().numpy()


def _beta_columns(result: Scaling, n_latents: int) -> dict[str, npt.NDArray[Any]]:
    """Every beta with its standard error; NaN for the targets that the coder lacks."""
    columns = {}
    nothing = torch.full((n_latents,), torch.nan, dtype=torch.float64)
    for target in TARGETS:
        for model, name in enumerate(SOURCES):
            beta = result.betas.get((target, model), Beta(nothing, nothing))
            columns[f"beta_{target}_{name}"] = beta.value.numpy()
            columns[f"beta_{target}_{name}_se"] = beta.se.numpy()
    return columns


def _nu_columns(
    result: Scaling, few: Bool[Tensor, " latent"], suffix: str, targets: tuple[str, ...] = TARGETS
) -> dict[str, npt.NDArray[Any]]:
    """Every nu with its interval.

    NaN for the `few` latents without enough activations, where the denominator may be 0, and for targets that the coder lacks.
    """
    columns = {}
    nothing = torch.full((len(few),), torch.nan, dtype=torch.float64)
    for target in targets:
        nu = result.nus.get(target, Estimate(nothing, nothing, nothing))
        for end, values in (("", nu.value), ("_low", nu.low), ("_high", nu.high)):
            columns[f"nu_{target}{suffix}{end}"] = torch.where(few, torch.nan, values).numpy()
    return columns


def _rank_sum(error: npt.NDArray[Any], reconstruction: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sum of the two ranks (1 = smallest) among the latents with both nus defined; NaN for the others."""
    sums = np.full(len(error), np.nan)
    both = np.isfinite(error) & np.isfinite(reconstruction)
    sums[both] = rankdata(error[both], "ordinal") + rankdata(reconstruction[both], "ordinal")
    return sums


def _reasons(
    n_of_blocks: Int64[Tensor, "block unit"], result: Scaling, denominator: str, config: AnalyzeConfig
) -> list[str | None]:
    """Why nu is undefined, per latent: for every target, or for those whose denominator may be 0."""
    n_blocks = len(n_of_blocks)
    undefined = {target: nu.value.isnan().tolist() for target, nu in result.nus.items()}
    reasons: list[str | None] = []
    for latent, (n, blocks) in enumerate(zip(n_of_blocks.sum(0).tolist(), (n_of_blocks > 0).sum(0).tolist(), strict=True)):
        weak = [f"beta_{target}_{denominator}" for target in undefined if undefined[target][latent]]
        if n == 0:
            reasons.append("never active")
        elif n < config.min_active:
            reasons.append(f"active on {n} tokens, fewer than {config.min_active}")
        elif blocks < n_blocks / 2:
            reasons.append(f"active in {blocks} of {n_blocks} blocks of documents, fewer than half")
        elif not result.nus.keys() >= set(MIRRORED):
            reasons.append(" and ".join([ONE_DECODER, *(f"{name} may be 0" for name in weak)]))
        else:
            reasons.append(" and ".join(weak) + " may be 0" if weak else None)
    return reasons


def pools(table: pl.DataFrame, size: int, seed: int) -> dict[str, list[int]]:
    """Two equally large sets of latents, chosen without labels: the most chat-specific ones and random shared ones.

    `chat_specific` holds the latents of lowest rank_sum among those whose decoder norm leans to the chat model; `shared` is a
    seeded sample of those with verdict `shared` and similar norms.
    """
    specific = table.filter(pl.col("rank_sum").is_not_nan() & (pl.col("delta_norm") > 0.6)).sort("rank_sum")
    shared = table.filter((pl.col("verdict") == "shared") & pl.col("delta_norm").is_between(*SHARED))
    size = min(size, specific.height, shared.height)
    chosen = np.random.default_rng(seed).permutation(shared["latent"].to_numpy())[:size]
    return {"chat_specific": specific["latent"].head(size).to_list(), "shared": sorted(chosen.tolist())}
