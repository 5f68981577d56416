"""The latent table: one row a latent, every column documented in `COLUMNS`.

A coder with one decoder (an SAE, a diff-SAE) has the same columns: those that compare two directions, or two models' errors or
reconstructions, are NaN, and the reasons say so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.config import AnalyzeConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.activity import GROUPS, Activity
from crossdiff.latents.decoder import BASE, CHAT, SHARED, cosine, delta_norm, delta_norm_class
from crossdiff.latents.scaling import TARGETS, Beta, Scaling, Sums, scaling
from crossdiff.latents.verdict import SETS, VERDICTS
from crossdiff.shapes import Bool, Tensor
from crossdiff.statistics import Estimate

MODELS = ("base", "chat")
MIRRORED = ("error", "reconstruction")
ONE_DECODER = "the coder has one decoder, so no error or reconstruction of each model"
COLUMNS = {
    "latent": "number of the latent",
    "n_active": "tokens on which it is active",
    "frequency": "share of the analysed tokens on which it is active",
    "mean_activation": "mean of v = f * sum of decoder norms over its active tokens",
    "max_activation": "largest v",
    "norm_base": "norm of its base decoder direction, normalised space; NaN where the coder has none",
    "norm_chat": "norm of its chat decoder direction, normalised space; NaN where the coder has none",
    "delta_norm": "relative decoder norm, 0 = base-only, 1 = chat-only",
    "delta_norm_class": "base_only [0, 0.1], shared [0.4, 0.6], chat_only [0.9, 1], other; undefined without a delta_norm",
    "decoder_cosine": "cosine of its two decoder directions",
    "beta_*": "latent scaling of a target along the chat direction, with its jackknife standard error (_se)",
    "nu_*": "beta of the base model over beta of the chat model: near 0 specific to the chat model, near 1 shared",
    "nu_*_low, nu_*_high": "ends of its 95% interval",
    "nu_*_mirrored": "the same along the base direction, chat over base: near 0 specific to the base model",
    "undefined_reason": "why a nu is NaN: too few activations (then all are), one decoder, or a denominator that may be 0",
    "undefined_reason_mirrored": "the same for the mirrored ones",
    "rank_sum": "rank of nu_error + rank of nu_reconstruction, small = specific; NaN unless both are defined",
    "verdict": "which model has the concept: " + ", ".join(VERDICTS),
    "verdict_reason": "why, in words and numbers",
    **SETS,
    "frequency_<group>": "share of the group's tokens on which it is active; groups: " + ", ".join(GROUPS),
    "share_<group>": "share of its active tokens that lie in the group",
}


def _beta_columns(result: Scaling, n_latents: int) -> dict[str, npt.NDArray[Any]]:
    """Every beta with its standard error; NaN for the targets that the coder does not have."""
    columns, nothing = {}, torch.full((n_latents,), torch.nan, dtype=torch.float64)
    for target in TARGETS:
        for model, name in enumerate(MODELS):
            beta = result.betas.get((target, model), Beta(nothing, nothing))
            columns[f"beta_{target}_{name}"], columns[f"beta_{target}_{name}_se"] = beta.value.numpy(), beta.se.numpy()
    return columns


def _nu_columns(
    result: Scaling, few: Bool[Tensor, " latent"], suffix: str, targets: tuple[str, ...] = TARGETS
) -> dict[str, npt.NDArray[Any]]:
    """Every nu with its interval; NaN for the `few` latents without enough activations, where the denominator may be 0, and for
    the targets that the coder does not have."""
    columns, nothing = {}, torch.full((len(few),), torch.nan, dtype=torch.float64)
    for target in targets:
        nu = result.nus.get(target, Estimate(nothing, nothing, nothing))
        for name, values in (("", nu.value), ("_low", nu.low), ("_high", nu.high)):
            columns[f"nu_{target}{suffix}{name}"] = torch.where(few, torch.nan, values).numpy()
    return columns


def _norms_of(crosscoder: Crosscoder, model: str) -> npt.NDArray[Any]:
    """The norms of the directions in one model; NaN where the coder has none there."""
    if model not in crosscoder.sources:
        return np.full(crosscoder.n_latents, np.nan)
    return crosscoder.norms()[:, crosscoder.sources.index(model)].double().numpy()


def _rank_sum(nu_error: npt.NDArray[Any], nu_reconstruction: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sum of the two ranks (1 = smallest) among the latents with both nu defined, NaN for the others."""
    out = np.full(len(nu_error), np.nan)
    both = np.flatnonzero(np.isfinite(nu_error) & np.isfinite(nu_reconstruction))
    for values in (nu_error[both], nu_reconstruction[both]):
        ranks = np.empty(len(both))
        ranks[np.argsort(values, kind="stable")] = np.arange(1, len(both) + 1)
        out[both] = np.nan_to_num(out[both]) + ranks
    return out


def latent_table(crosscoder: Crosscoder, sums: Sums, activity: Activity, config: AnalyzeConfig) -> pl.DataFrame:
    """Join geometry, scaling and activity of a coder into one row a latent; the verdicts come after it."""
    n_blocks, norms = len(sums.n), crosscoder.norms().double()
    n_active, n_tokens = sums.n.sum(0), int(activity.tokens.sum())
    delta = delta_norm(norms)
    columns: dict[str, Any] = {
        "latent": np.arange(crosscoder.n_latents),
        "n_active": n_active.numpy(),
        "frequency": (n_active / n_tokens).double().numpy(),
        "mean_activation": (activity.total / n_active).numpy(),
        "max_activation": activity.maximum.double().numpy(),
        "norm_base": _norms_of(crosscoder, "base"),
        "norm_chat": _norms_of(crosscoder, "chat"),
        "delta_norm": delta.numpy(),
        "delta_norm_class": [delta_norm_class(value) for value in delta.tolist()],
        "decoder_cosine": cosine(crosscoder.directions()).numpy(),
    }
    along_chat = scaling(crosscoder, sums, direction=CHAT, numerator=BASE, denominator=CHAT)
    along_base = scaling(crosscoder, sums, direction=BASE, numerator=CHAT, denominator=BASE, targets=MIRRORED)
    columns |= _beta_columns(along_chat, crosscoder.n_latents)
    few = (n_active < config.min_active) | ((sums.n > 0).sum(0) < n_blocks / 2)
    columns |= _nu_columns(along_chat, few, "") | _nu_columns(along_base, few, "_mirrored", MIRRORED)
    columns["undefined_reason"] = _reasons(sums, along_chat, "chat", config)
    columns["undefined_reason_mirrored"] = _reasons(sums, along_base, "base", config)
    columns["rank_sum"] = _rank_sum(columns["nu_error"], columns["nu_reconstruction"])
    for group, name in enumerate(GROUPS):
        columns[f"frequency_{name}"] = (activity.counts[group] / activity.tokens[group]).double().numpy()
        columns[f"share_{name}"] = (activity.counts[group] / n_active).double().numpy()
    reasons = {"undefined_reason": pl.String, "undefined_reason_mirrored": pl.String}
    return pl.DataFrame(columns, schema_overrides=reasons)


def _reasons(sums: Sums, result: Scaling, denominator: str, config: AnalyzeConfig) -> list[str | None]:
    """Per latent why nu is undefined: for all targets, for want of activations, or for those whose denominator may be 0."""
    n_active, n_blocks_active = sums.n.sum(0).tolist(), (sums.n > 0).sum(0).tolist()
    n_blocks = len(sums.n)
    undefined = {target: nu.value.isnan().tolist() for target, nu in result.nus.items()}
    reasons: list[str | None] = []
    for latent, n in enumerate(n_active):
        weak = [target for target in undefined if undefined[target][latent]]
        if n == 0:
            reasons.append("never active")
        elif n < config.min_active:
            reasons.append(f"active on {n} tokens, fewer than {config.min_active}")
        elif n_blocks_active[latent] < n_blocks / 2:
            reasons.append(f"active in {n_blocks_active[latent]} of {n_blocks} blocks of documents")
        elif not result.nus.keys() >= {"error", "reconstruction"}:
            reasons.append(" and ".join([ONE_DECODER, *(f"beta_{target}_{denominator} may be 0" for target in weak)]))
        elif weak:
            reasons.append(" and ".join(f"beta_{target}_{denominator}" for target in weak) + " may be 0")
        else:
            reasons.append(None)
    return reasons


def pools(table: pl.DataFrame, size: int, seed: int) -> dict[str, list[int]]:
    """Two equally large sets of latents, chosen without labels: the most chat-specific ones and random shared ones.

    `chat_specific` holds the latents of the lowest rank_sum among those with a decoder norm that leans to the chat model
    and enough activations; `shared` is a seeded sample of those whose verdict is shared and whose norms are alike.
    """
    specific = table.filter(pl.col("rank_sum").is_not_nan() & (pl.col("delta_norm") > 0.6)).sort("rank_sum")
    shared = table.filter((pl.col("verdict") == "shared") & pl.col("delta_norm").is_between(*SHARED))
    size = min(size, specific.height, shared.height)
    chosen = np.random.default_rng(seed).permutation(shared["latent"].to_numpy())[:size]
    return {"chat_specific": specific["latent"].head(size).to_list(), "shared": sorted(chosen.tolist())}
