"""The latent table: one row a latent, every column documented in `COLUMNS`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.config import AnalyzeConfig
from crossdiff.crosscoder.model import Crosscoder
from crossdiff.latents.activity import GROUPS, Activity
from crossdiff.latents.decoder import cosine, delta_norm, delta_norm_class
from crossdiff.latents.scaling import TARGETS, Scaling, Sums, scaling

BASE, CHAT = 0, 1
ROTATED = (0.25, 0.75)
"""delta_norm of a latent whose direction differs between the models rather than being absent from one (METHOD)."""

COLUMNS = {
    "latent": "number of the latent",
    "n_active": "tokens on which it is active",
    "frequency": "share of the analysed tokens on which it is active",
    "mean_activation": "mean of v = f * sum of decoder norms over its active tokens",
    "max_activation": "largest v",
    "norm_base": "norm of its base decoder direction, normalised space",
    "norm_chat": "norm of its chat decoder direction, normalised space",
    "delta_norm": "relative decoder norm, 0 = base-only, 1 = chat-only",
    "delta_norm_class": "base_only [0, 0.1], shared [0.4, 0.6], chat_only [0.9, 1], other",
    "decoder_cosine": "cosine of its two decoder directions",
    "beta_*": "latent scaling of a target along the chat direction, with its jackknife standard error (_se)",
    "nu_*": "beta of the base model over beta of the chat model: near 0 specific to the chat model, near 1 shared",
    "nu_*_low, nu_*_high": "95% jackknife interval",
    "nu_*_mirrored": "the same along the base direction, chat over base: near 0 specific to the base model",
    "undefined_reason": "why a nu is NaN, or why the latent gets no verdict",
    "rank_sum": "rank of nu_error + rank of nu_reconstruction, small = specific; NaN unless both are defined",
    "verdict": "chat_specific, rotated, shared, base_specific, dead, undecided",
    "chat_specific": "upper ends of the intervals under the thresholds and delta_norm at least 0.75",
    "chat_specific_paper": "point values under the thresholds and delta_norm at least 0.9",
    "frequency_<group>": "share of the group's tokens on which it is active; groups: " + ", ".join(GROUPS),
    "share_<group>": "share of its active tokens that lie in the group",
}


def _nu_columns(result: Scaling, n_blocks: int, suffix: str) -> dict[str, npt.NDArray[Any]]:
    columns = {}
    for target, nu in result.nus.items():
        half, undefined = nu.half_width(n_blocks), result.undefined[target]
        for name, values in (("", nu.value), ("_low", nu.value - half), ("_high", nu.value + half)):
            columns[f"nu_{target}{suffix}{name}"] = torch.where(undefined, torch.nan, values).numpy()
    return columns


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
    """Join geometry, scaling and activity of a two-source crosscoder into one row a latent, with verdicts."""
    n_blocks, norms = len(sums.n), crosscoder.norms().double()
    n_active, n_tokens = sums.n.sum(0), int(activity.tokens.sum())
    delta = delta_norm(norms)
    columns: dict[str, Any] = {
        "latent": np.arange(crosscoder.n_latents),
        "n_active": n_active.numpy(),
        "frequency": (n_active / n_tokens).double().numpy(),
        "mean_activation": (activity.total / n_active).numpy(),
        "max_activation": activity.maximum.double().numpy(),
        "norm_base": norms[:, BASE].numpy(),
        "norm_chat": norms[:, CHAT].numpy(),
        "delta_norm": delta.numpy(),
        "delta_norm_class": [delta_norm_class(value) for value in delta.tolist()],
        "decoder_cosine": cosine(crosscoder.directions()).numpy(),
    }
    along_chat = scaling(crosscoder, sums, direction=CHAT, numerator=BASE, denominator=CHAT)
    along_base = scaling(
        crosscoder, sums, direction=BASE, numerator=CHAT, denominator=BASE, targets=("error", "reconstruction")
    )
    for target in TARGETS:
        for source, name in ((BASE, "base"), (CHAT, "chat")):
            beta = along_chat.betas[target, source]
            columns[f"beta_{target}_{name}"], columns[f"beta_{target}_{name}_se"] = beta.value.numpy(), beta.se.numpy()
    columns |= _nu_columns(along_chat, n_blocks, "") | _nu_columns(along_base, n_blocks, "_mirrored")
    columns["undefined_reason"] = _reasons(sums, along_chat, config)
    columns["rank_sum"] = _rank_sum(columns["nu_error"], columns["nu_reconstruction"])
    for group, name in enumerate(GROUPS):
        columns[f"frequency_{name}"] = (activity.counts[group] / activity.tokens[group]).double().numpy()
        columns[f"share_{name}"] = (activity.counts[group] / n_active).double().numpy()
    return _with_verdicts(pl.DataFrame(columns), config)


def _reasons(sums: Sums, along_chat: Scaling, config: AnalyzeConfig) -> list[str | None]:
    n_active, n_blocks_active = sums.n.sum(0).tolist(), (sums.n > 0).sum(0).tolist()
    n_blocks = len(sums.n)
    undefined = {target: along_chat.undefined[target].tolist() for target in ("error", "reconstruction")}
    reasons: list[str | None] = []
    for latent, n in enumerate(n_active):
        weak = [target for target in undefined if undefined[target][latent]]
        if n == 0:
            reasons.append("never active")
        elif n < config.min_active:
            reasons.append(f"active on {n} tokens, fewer than {config.min_active}")
        elif n_blocks_active[latent] < n_blocks / 2:
            reasons.append(f"active in {n_blocks_active[latent]} of {n_blocks} blocks of documents")
        elif weak:
            reasons.append(" and ".join(f"beta_{target}_chat" for target in weak) + " may be 0")
        else:
            reasons.append(None)
    return reasons


def _with_verdicts(table: pl.DataFrame, config: AnalyzeConfig) -> pl.DataFrame:
    def below(suffix: str) -> pl.Expr:
        error, reconstruction = pl.col(f"nu_error{suffix}"), pl.col(f"nu_reconstruction{suffix}")
        under = (error < config.nu_error) & (reconstruction < config.nu_reconstruction)
        return under & error.is_not_nan() & reconstruction.is_not_nan()

    decided = pl.col("undefined_reason").is_null()
    specific = decided & below("_high") & (pl.col("delta_norm") >= config.delta_norm)
    paper = below("") & (pl.col("delta_norm") >= 0.9)
    rotated = decided & below("") & pl.col("delta_norm").is_between(*ROTATED)
    base_specific = decided & below("_mirrored_high") & (pl.col("delta_norm") <= 1 - config.delta_norm)
    present = (pl.col("nu_error_low") > config.nu_error) | (pl.col("nu_reconstruction_low") > config.nu_reconstruction)
    verdict = (
        pl.when(pl.col("n_active") == 0).then(pl.lit("dead"))
        .when(specific).then(pl.lit("chat_specific"))
        .when(rotated).then(pl.lit("rotated"))
        .when(base_specific).then(pl.lit("base_specific"))
        .when(decided & present).then(pl.lit("shared"))
        .otherwise(pl.lit("undecided"))
    )  # fmt: skip
    return table.with_columns(chat_specific=specific, chat_specific_paper=paper, verdict=verdict)


def counts(table: pl.DataFrame) -> dict[str, int]:
    """Latents of each class, verdict and set."""
    classes = {
        name: table.filter(pl.col("delta_norm_class") == name).height for name in ("chat_only", "base_only", "shared", "other")
    }
    verdicts = {
        name: table.filter(pl.col("verdict") == name).height for name in ("rotated", "base_specific", "dead", "undecided")
    }
    sets = {name: table.filter(pl.col(name)).height for name in ("chat_specific", "chat_specific_paper")}
    return {**classes, **sets, **verdicts, "verdict_shared": table.filter(pl.col("verdict") == "shared").height}


def pools(table: pl.DataFrame, size: int, seed: int) -> dict[str, list[int]]:
    """Two equally large sets of latents, chosen without labels: the most chat-specific ones and random shared ones.

    `chat_specific` holds the latents of the lowest rank_sum among those with a decoder norm that leans to the chat model
    and enough activations; `shared` is a seeded sample of those whose verdict is shared and whose norms are alike.
    """
    usable = pl.col("undefined_reason").is_null()
    specific = table.filter(usable & pl.col("rank_sum").is_not_nan() & (pl.col("delta_norm") > 0.6)).sort("rank_sum")
    shared = table.filter(usable & (pl.col("verdict") == "shared") & pl.col("delta_norm").is_between(0.4, 0.6))
    size = min(size, specific.height, shared.height)
    chosen = np.random.default_rng(seed).permutation(shared["latent"].to_numpy())[:size]
    return {"chat_specific": specific["latent"].head(size).to_list(), "shared": sorted(chosen.tolist())}
