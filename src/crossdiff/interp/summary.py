"""How interpretable the latents of each verdict are, and whether the chat-specific ones are more so than the shared ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.interp.explanation_table import SCORES

RESAMPLES = 2000
FEWEST = 3
"""Latents below which a mean has no interval."""


def _resampled(values: npt.NDArray[np.float64], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    means: npt.NDArray[np.float64] = values[generator.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return means


def _interval(draws: npt.NDArray[np.float64]) -> dict[str, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def summarise(table: pl.DataFrame, seed: int) -> dict[str, Any]:
    """The distribution of every score over the latents of each verdict, with a bootstrap interval of its mean over latents.

    Args:
        table: verdicts, and the columns of the interpretation.

    Returns:
        `scores`: one entry a score and verdict that has one; `differences`: the mean of chat_specific minus that of shared.
    """
    generator = np.random.default_rng(seed)
    scores, differences = [], []
    for score in SCORES:
        draws = {}
        for verdict in sorted(table["verdict"].unique()):
            values = table.filter((pl.col("verdict") == verdict) & pl.col(score).is_not_nan())[score].drop_nulls().to_numpy()
            if not len(values):
                continue
            quartiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
            entry = {"score": score, "verdict": verdict, "n": len(values), "mean": float(values.mean()), "quartiles": quartiles}
            if len(values) >= FEWEST:
                draws[verdict] = _resampled(values, generator)
                entry |= _interval(draws[verdict])
            scores.append(entry)
        if {"chat_specific", "shared"} <= draws.keys():
            means = {entry["verdict"]: entry["mean"] for entry in scores if entry["score"] == score}
            value = means["chat_specific"] - means["shared"]
            differences.append({"score": score, "value": value, **_interval(draws["chat_specific"] - draws["shared"])})
    return {
        "n_latents": table.height,
        "n_explained": int(table["explanation"].is_not_null().sum()),
        "n_incomplete": int(table["interpretation_reason"].is_not_null().sum()),
        "models": sorted(table["explainer"].drop_nulls().unique()),
        "scores": scores,
        "differences": differences,
    }
