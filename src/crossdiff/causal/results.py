"""KL per conversation to estimates with intervals: a bootstrap over conversations, with the same draws for every arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.causal.conversations import RESPONSE, SPANS
from crossdiff.causal.interventions import Arm, Comparison
from crossdiff.statistics import Estimate, bootstrap

NO_CHANGE = "none"
"""The intervention at one end of the gap. The other end is the chat model itself, whose KL is 0."""


@dataclass(frozen=True)
class ArmResult:
    """One arm on one span, or the mean over an intervention's arms (random sets of several seeds).

    Attributes:
        kl: mean over conversations of the mean KL over the conversation's tokens in the span, in nats.
        measures: the means of the other measures that were asked for (see `interventions.Experiment`).
        closed: share of the gap between `none` and the chat model that is closed, 1 - kl / kl of none.
        reason: why `closed` is undefined.
        n_outside: number of latents that its ranking left out because of their nu; None for one that leaves none out.
        n_arms: number of arms averaged.
        spread: smallest and largest kl among them.
    """

    intervention: str
    span: str
    n_latents: int | None
    n_outside: int | None
    n_conversations: int
    kl: Estimate[float]
    measures: dict[str, Estimate[float]]
    closed: Estimate[float]
    n_arms: int
    spread: tuple[float, float]
    reason: str | None = None


@dataclass(frozen=True)
class ComparisonResult:
    """KL(worse) - KL(better) on one span, paired over conversations; positive where `better` is nearer to the chat model."""

    comparison: str
    better: str
    worse: str
    span: str
    difference: Estimate[float]


class Bootstrap:
    """Mean KL, or another measure, over conversations, for the sample and for its resamples.

    Args:
        total: the measure summed over the tokens of each span.
        n: number of tokens in each span; a conversation without any does not count in that span.
        names: the intervention of each arm.
    """

    def __init__(
        self, total: npt.NDArray[np.float64], n: npt.NDArray[np.int64], names: Sequence[str], resamples: int, seed: int
    ) -> None:
        total = np.concatenate([total, total.sum(2, keepdims=True)], axis=2)
        self.n = np.concatenate([n, n.sum(1, keepdims=True)], axis=1)
        self.spans = (*SPANS, RESPONSE)
        self.n_predictions = int(n.sum())
        self.arms_of: dict[str, list[int]] = {}
        for arm, name in enumerate(names):
            self.arms_of.setdefault(name, []).append(arm)
        with np.errstate(invalid="ignore"):
            self.kl = total / self.n  # [arm, conversation, span], NaN where the span has no token
        n_conversations = len(n)
        shares = np.full(n_conversations, 1 / n_conversations)
        draws = np.random.default_rng(seed).multinomial(n_conversations, shares, resamples)
        # The first row is the sample itself, so that the value and its resamples come from the same product.
        self.weights = np.concatenate([np.ones((1, n_conversations)), draws.astype(np.float64)])

    def arm_means(self, arms: Sequence[int], span: str) -> npt.NDArray[np.float64]:
        """Mean KL of each arm on a span, `[resample, arm]`, the sample first."""
        index = self.spans.index(span)
        has_tokens = self.n[:, index] > 0
        values = np.where(has_tokens, self.kl[list(arms)][:, :, index], 0.0)
        counts = self.weights @ has_tokens.astype(np.float64)
        with np.errstate(invalid="ignore"):
            means: npt.NDArray[np.float64] = (self.weights @ values.T) / counts[:, None]
        return means

    def mean(self, intervention: str, span: str) -> npt.NDArray[np.float64]:
        """Mean KL of an intervention over its arms, `[resample]`, the sample first."""
        mean: npt.NDArray[np.float64] = self.arm_means(self.arms_of[intervention], span).mean(1)
        return mean


def _estimate(values: npt.NDArray[np.float64]) -> Estimate[float]:
    """The first value, with the percentile interval of the others."""
    return bootstrap(float(values[0]), values[1:])


def closed_share(kl: npt.NDArray[np.float64], none: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 - kl / none; NaN where none is 0, since there is no gap to close."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(none > 0, 1 - kl / none, np.nan)


def arm_results(samples: Mapping[str, Bootstrap], arms: Sequence[Arm]) -> list[ArmResult]:
    """Results of every intervention except those that measure latents one at a time, on every span."""
    results = []
    sample = samples["kl"]
    for name, rows in sample.arms_of.items():
        first = arms[rows[0]]
        if first.latent is not None:
            continue
        n_latents = None if first.latents is None else len(first.latents)
        for index, span in enumerate(sample.spans):
            kl_of_arms = sample.arm_means(rows, span)
            kl = kl_of_arms.mean(1)
            closed = _estimate(closed_share(kl, sample.mean(NO_CHANGE, span)))
            results.append(
                ArmResult(
                    intervention=name,
                    span=span,
                    n_latents=n_latents,
                    n_outside=first.outside,
                    n_conversations=int((sample.n[:, index] > 0).sum()),
                    kl=_estimate(kl),
                    measures={key: _estimate(other.mean(name, span)) for key, other in samples.items() if other is not sample},
                    closed=closed,
                    n_arms=len(rows),
                    spread=(float(kl_of_arms[0].min()), float(kl_of_arms[0].max())),
                    reason=f"the KL of {NO_CHANGE} is 0, so there is no gap to close" if math.isnan(closed.value) else None,
                )
            )
    return results


def comparison_results(sample: Bootstrap, comparisons: Sequence[Comparison]) -> list[ComparisonResult]:
    """Results of the comparisons whose interventions both have an arm."""
    results = []
    for comparison in comparisons:
        better, worse = comparison.better, comparison.worse
        if better in sample.arms_of and worse in sample.arms_of:
            for span in sample.spans:
                difference = _estimate(sample.mean(worse, span) - sample.mean(better, span))
                results.append(ComparisonResult(comparison.name, better, worse, span, difference))
    return results


LATENT_COLUMNS = {
    "latent": "number of the latent",
    "intervention": "entry of the list of interventions; a latent may occur in several",
    "kl_reduction_<span>": "KL(none) - KL(this latent alone) in nats, mean over conversations; spans: first, 2_to_10, from_11, "
    "response",
    "kl_reduction_<span>_low, _high": "95% bootstrap interval over conversations",
    "closed_<span>": "the reduction as a share of KL(none)",
    "conversations_changed": "share of the conversations whose distributions the latent changes",
}
"""Columns of `causal_latents.parquet`; join it with the latent table by `latent`."""


def latent_results(sample: Bootstrap, arms: Sequence[Arm]) -> pl.DataFrame:
    """What each latent does alone: one row per arm of a single latent, with the columns in `LATENT_COLUMNS`."""
    none = sample.arms_of[NO_CHANGE][0]
    rows: list[dict[str, Any]] = []
    for index, arm in enumerate(arms):
        if arm.latent is None:
            continue
        row: dict[str, Any] = {"latent": arm.latent, "intervention": arm.intervention}
        for span in sample.spans:
            kl_none = sample.mean(NO_CHANGE, span)
            reduction = kl_none - sample.arm_means([index], span)[:, 0]
            estimate = _estimate(reduction)
            row[f"kl_reduction_{span}"] = estimate.value
            row[f"kl_reduction_{span}_low"] = estimate.low
            row[f"kl_reduction_{span}_high"] = estimate.high
            row[f"closed_{span}"] = float(closed_share(kl_none - reduction, kl_none)[0])
        row["conversations_changed"] = float((sample.kl[index, :, -1] != sample.kl[none, :, -1]).mean())
        rows.append(row)
    measures = [
        name
        for span in sample.spans
        for name in (f"kl_reduction_{span}", f"kl_reduction_{span}_low", f"kl_reduction_{span}_high", f"closed_{span}")
    ]
    schema = {"latent": pl.Int64, "intervention": pl.String} | dict.fromkeys([*measures, "conversations_changed"], pl.Float64)
    return pl.DataFrame(rows, schema=schema)
