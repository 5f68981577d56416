"""From divergences per conversation to estimates with intervals: bootstrap over conversations, the same draws for all arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.causal.conversations import RESPONSE, SPANS
from crossdiff.causal.interventions import Arm, Comparison

NO_CHANGE = "none"
"""Name of the intervention from which the gap is counted; the other end of the gap is the chat model itself, KL 0."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% percentile interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmResult:
    """One arm, or the mean of an intervention's arms (random sets of several seeds), on one span.

    Attributes:
        kl: mean over conversations of the mean KL over the conversation's tokens in the span, in nats.
        closed: share of the gap from `none` to the chat model that is closed, 1 - kl / kl of none.
        n_arms: how many arms are averaged; spread: smallest and largest kl among them.
    """

    intervention: str
    span: str
    n_latents: int | None
    n_conversations: int
    kl: Estimate
    closed: Estimate
    n_arms: int
    spread: tuple[float, float]


@dataclass(frozen=True)
class ComparisonResult:
    """KL(worse) - KL(better) on one span, paired over conversations; positive where `better` is nearer to the chat model."""

    comparison: str
    better: str
    worse: str
    span: str
    difference: Estimate


class Bootstrap:
    """Means over conversations and their resamples.

    Args:
        total, n: KL summed over the tokens of each span, and the numbers of tokens; conversations without a token in a span
            do not count there.
    """

    def __init__(
        self, total: npt.NDArray[np.float64], n: npt.NDArray[np.int64], names: Sequence[str], resamples: int, seed: int
    ) -> None:
        total = np.concatenate([total, total.sum(2, keepdims=True)], axis=2)
        self.n = np.concatenate([n, n.sum(1, keepdims=True)], axis=1)
        self.spans = (*SPANS, RESPONSE)
        self.rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            self.rows.setdefault(name, []).append(row)
        with np.errstate(invalid="ignore"):
            self.kl = total / self.n  # [arm, conversation, span], NaN where there is no token
        n_conversations = len(n)
        draws = np.random.default_rng(seed).multinomial(
            n_conversations, np.full(n_conversations, 1 / n_conversations), resamples
        )
        # The first row is the sample itself, so that a value and its resamples come from one product.
        self.weights = np.concatenate([np.ones((1, n_conversations)), draws.astype(np.float64)])

    def means(self, rows: Sequence[int], span: str) -> npt.NDArray[np.float64]:
        """Mean KL of arms on a span: `[resample, arm]`, the sample first."""
        index = self.spans.index(span)
        there = self.n[:, index] > 0
        values = np.where(there, self.kl[list(rows)][:, :, index], 0.0)
        with np.errstate(invalid="ignore"):
            means: npt.NDArray[np.float64] = (self.weights @ values.T) / (self.weights @ there.astype(np.float64))[:, None]
        return means

    def of(self, intervention: str, span: str) -> npt.NDArray[np.float64]:
        """Mean KL of an intervention, over its arms: `[resample]`."""
        mean: npt.NDArray[np.float64] = self.means(self.rows[intervention], span).mean(1)
        return mean


def interval(values: npt.NDArray[np.float64]) -> Estimate:
    """The first value, with the 95% percentile interval of the others that are defined."""
    defined = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(defined):
        return Estimate(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))


def closed_share(kl: npt.NDArray[np.float64], none: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 - kl / none, NaN where none is 0: there is no gap then."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(none > 0, 1 - kl / none, np.nan)


def arm_results(bootstrap: Bootstrap, arms: Sequence[Arm]) -> list[ArmResult]:
    """Every intervention but the single latents, on every span."""
    results = []
    first = {arm.intervention: arm for arm in reversed(arms)}
    for name, rows in bootstrap.rows.items():
        if first[name].latent is not None:
            continue
        latents = first[name].latents
        for index, span in enumerate(bootstrap.spans):
            each = bootstrap.means(rows, span)
            kl, none = each.mean(1), bootstrap.of(NO_CHANGE, span)
            results.append(
                ArmResult(
                    name, span, None if latents is None else len(latents), int((bootstrap.n[:, index] > 0).sum()),
                    interval(kl), interval(closed_share(kl, none)), len(rows), (float(each[0].min()), float(each[0].max())),
                )
            )  # fmt: skip
    return results


def comparison_results(bootstrap: Bootstrap, comparisons: Sequence[Comparison]) -> list[ComparisonResult]:
    """The comparisons whose interventions both have an arm."""
    return [
        ComparisonResult(
            comparison.name, comparison.better, comparison.worse, span,
            interval(bootstrap.of(comparison.worse, span) - bootstrap.of(comparison.better, span)),
        )
        for comparison in comparisons
        if comparison.better in bootstrap.rows and comparison.worse in bootstrap.rows
        for span in bootstrap.spans
    ]  # fmt: skip


LATENT_COLUMNS = {
    "latent": "number of the latent",
    "intervention": "the entry of the list that it stands in; a latent may stand in several",
    "kl_reduction_<span>": "KL(none) - KL(this latent alone) in nats, mean over conversations; spans: first, 2_to_10, from_11, "
    "response",
    "kl_reduction_<span>_low, _high": "95% bootstrap interval over conversations",
    "closed_<span>": "the reduction as a share of KL(none)",
    "conversations_changed": "share of the conversations whose distributions it changes",
}
"""Columns of `causal_latents.parquet`, which is joined to the latent table by `latent`."""


def latent_results(bootstrap: Bootstrap, arms: Sequence[Arm]) -> pl.DataFrame:
    """What each latent does alone: one row for each arm of a single latent."""
    none = bootstrap.rows[NO_CHANGE][0]
    rows: list[dict[str, Any]] = []
    for row, arm in enumerate(arms):
        if arm.latent is None:
            continue
        entry: dict[str, Any] = {"latent": arm.latent, "intervention": arm.intervention}
        for span in bootstrap.spans:
            reduction = bootstrap.of(NO_CHANGE, span) - bootstrap.means([row], span)[:, 0]
            estimate = interval(reduction)
            entry[f"kl_reduction_{span}"] = estimate.value
            entry[f"kl_reduction_{span}_low"], entry[f"kl_reduction_{span}_high"] = estimate.low, estimate.high
            entry[f"closed_{span}"] = float(
                closed_share(bootstrap.of(NO_CHANGE, span) - reduction, bootstrap.of(NO_CHANGE, span))[0]
            )
        entry["conversations_changed"] = float((bootstrap.kl[row, :, -1] != bootstrap.kl[none, :, -1]).mean())
        rows.append(entry)
    schema = {"latent": pl.Int64, "intervention": pl.String} | {
        name: pl.Float64
        for span in bootstrap.spans
        for name in (f"kl_reduction_{span}", f"kl_reduction_{span}_low", f"kl_reduction_{span}_high", f"closed_{span}")
    }
    return pl.DataFrame(rows, schema={**schema, "conversations_changed": pl.Float64})


def plain(results: Sequence[ArmResult | ComparisonResult]) -> list[dict[str, Any]]:
    """Results as plain data, for JSON."""
    return [asdict(result) for result in results]
