"""How interpretable the latents of each verdict are, and the difference between chat-specific and shared latents."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl

from crossdiff.interp.explanation_table import SCORES
from crossdiff.statistics import bootstrap

RESAMPLES = 2000
MIN_LATENTS = 3
"""Smallest number of latents whose mean has an interval."""


def summarise(table: pl.DataFrame, seed: int) -> dict[str, Any]:
    """The distribution of each score over the latents of each verdict, with a bootstrap interval of its mean.

    Args:
        table: verdicts, and the columns of the interpretation.

    Returns:
        `scores` has one entry per score and verdict with values, and `differences` the mean of chat_specific minus that of
        shared per score.
    """
    generator = np.random.default_rng(seed)
    scores, differences = [], []
    for score in SCORES:
        means: dict[str, float] = {}
        resamples = {}
        for verdict in sorted(table["verdict"].unique()):
            values = table.filter((pl.col("verdict") == verdict) & pl.col(score).is_not_nan())[score].drop_nulls().to_numpy()
            if not len(values):
                continue
            n = len(values)
            means[verdict] = float(values.mean())
            quartiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
            entry = {"score": score, "verdict": verdict, "n": n, "mean": means[verdict], "quartiles": quartiles}
            if n >= MIN_LATENTS:
                resamples[verdict] = values[generator.integers(n, size=(RESAMPLES, n))].mean(1)
                interval = bootstrap(means[verdict], resamples[verdict])
                entry |= {"low": interval.low, "high": interval.high}
            scores.append(entry)
        if {"chat_specific", "shared"} <= resamples.keys():
            difference = bootstrap(means["chat_specific"] - means["shared"], resamples["chat_specific"] - resamples["shared"])
            differences.append({"score": score, **asdict(difference)})
    return {
        "n_latents": table.height,
        "n_explained": int(table["explanation"].is_not_null().sum()),
        "n_incomplete": int(table["interpretation_reason"].is_not_null().sum()),
        "models": sorted(table["explainer"].drop_nulls().unique()),
        "scores": scores,
        "differences": differences,
    }
