"""The same crosscoder trained from several seeds: how far do the counts spread, and are the specific latents found again?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import polars as pl
import torch

from crossdiff.crosscoder.checkpoint import load
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.latents.decoder import CHAT
from crossdiff.latents.verdict import counts
from crossdiff.shapes import Float, Tensor

BLOCK = 512
"""Latents whose cosines with all of another seed's are in memory at once."""


@dataclass(frozen=True)
class Seed:
    """One training: its name, latent table, crosscoder, and its behaviours.parquet where the run has labels."""

    name: str
    table: pl.DataFrame
    crosscoder: Crosscoder
    behaviours: pl.DataFrame | None = None


@dataclass(frozen=True)
class SeedReport:
    """What differs between the trainings.

    Attributes:
        counts: columns `count` (a class, set or verdict), one per training, `mean` and `sd` (over trainings, n - 1).
        matches: columns `seed`, `other`, `n_specific`, and the shares of the specific latents of `seed` whose chat direction
            has a cosine above the limit with that of a live latent of `other` (`matched`), or of a specific one
            (`matched_specific`); NaN without specific latents. `median_cosine` is the median of the best cosines of the
            specific latents with the live ones of `other`, `median_cosine_live` that of all live latents of `seed`.
        behaviours: columns `behaviour`, `pool` (chat_specific, shared), and one per training: the held-out AUROC of the pool's
            best latent before the answer. No rows where a training has no behaviours.
    """

    counts: pl.DataFrame
    matches: pl.DataFrame
    behaviours: pl.DataFrame


def read_seeds(run: Path, names: list[str]) -> list[Seed]:
    """Read analysed crosscoders of a run directory.

    Raises:
        UserError: fewer than two, one that is not analysed, or different widths.
    """
    if len(set(names)) < 2:
        raise UserError(f"seeds are compared with each other: name at least two crosscoders of {run}, found {names}")
    for name in names:
        if not (run / name / "latents.parquet").exists():
            raise UserError(f"{run / name} has no latents.parquet; run `crossdiff analyze {run} --only {name}` first")
    seeds = []
    for name in names:
        path = run / name / "behaviours.parquet"
        behaviours = pl.read_parquet(path) if path.exists() else None
        seeds.append(Seed(name, pl.read_parquet(run / name / "latents.parquet"), load(run / name), behaviours))
    widths = {seed.name: seed.crosscoder.d_model for seed in seeds}
    if len(set(widths.values())) > 1:
        raise UserError(f"crosscoders of different widths cannot be compared: {widths}")
    return seeds


def largest_cosines(rows: Float[Tensor, "row d_model"], others: Float[Tensor, "other d_model"]) -> Float[Tensor, " row"]:
    """The largest cosine of each row with any of the others, -1 without others; never more than a block of the matrix."""
    if not len(others):
        return torch.full((len(rows),), -1.0)
    rows, others = (torch.nn.functional.normalize(part, dim=1) for part in (rows, others))
    parts = [(rows[first : first + BLOCK] @ others.T).amax(1) for first in range(0, len(rows), BLOCK)]
    return torch.cat(parts) if parts else rows.new_zeros(0)


def _members(seed: Seed, flags: pl.Series) -> Float[Tensor, "member d_model"]:
    return seed.crosscoder.directions()[CHAT][torch.from_numpy(seed.table["latent"].to_numpy()[flags.to_numpy()])]


def compare_seeds(seeds: list[Seed], smallest_cosine: float = 0.9) -> SeedReport:
    """Spread of the counts, and the share of chat-specific latents that each other training has as well."""
    found = {seed.name: counts(seed.table) for seed in seeds}
    keys = list(found[seeds[0].name])
    values = np.array([[found[seed.name][key] for seed in seeds] for key in keys], dtype=np.float64)
    table = pl.DataFrame({"count": keys, **{seed.name: [found[seed.name][key] for key in keys] for seed in seeds}})
    table = table.with_columns(mean=pl.Series(values.mean(1)), sd=pl.Series(values.std(1, ddof=1)))
    rows = []
    for seed, other in permutations(seeds, 2):
        specific, live = (_members(seed, flags) for flags in (seed.table["chat_specific"], seed.table["verdict"] != "dead"))
        others = _members(other, other.table["verdict"] != "dead")
        nearest = largest_cosines(specific, others)
        same = largest_cosines(specific, _members(other, other.table["chat_specific"])) > smallest_cosine
        found_again = {
            "matched": float((nearest > smallest_cosine).double().mean()),
            "matched_specific": float(same.double().mean()),
            "median_cosine": float(nearest.nanmedian()) if len(nearest) else math.nan,
            "median_cosine_live": float(largest_cosines(live, others).median()) if len(live) else math.nan,
        }
        rows.append({"seed": seed.name, "other": other.name, "n_specific": len(specific)} | found_again)
    return SeedReport(table, pl.DataFrame(rows), _behaviours(seeds))


def _behaviours(seeds: list[Seed]) -> pl.DataFrame:
    keys, found = ["behaviour", "pool"], pl.DataFrame(schema={"behaviour": pl.String, "pool": pl.String})
    for index, seed in enumerate(seeds):
        if seed.behaviours is None:
            return found.clear()
        asked = seed.behaviours.filter(pl.col("question") == "before_answer", pl.col("pool").is_in(["chat_specific", "shared"]))
        scores = asked.select(*keys, pl.col("auroc").alias(seed.name))
        found = found.join(scores, on=keys, how="inner") if index else scores
    return found.sort(keys)
