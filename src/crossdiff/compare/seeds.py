"""One crosscoder trained from several seeds: how far do the counts spread, and are the specific latents found again?"""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch

from crossdiff.activations.transfer import CPU
from crossdiff.crosscoder.checkpoint import load
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.integrity import read_parquet
from crossdiff.latents.decoder import CHAT_INDEX, nearest
from crossdiff.latents.verdict import counts
from crossdiff.shapes import Float, Tensor


class Seed(NamedTuple):
    """One training: its name, latent table, crosscoder, and its behaviours.parquet if the run has labels."""

    name: str
    table: pl.DataFrame
    crosscoder: Crosscoder
    behaviours: pl.DataFrame | None = None


class SeedReport(NamedTuple):
    """How the trainings differ.

    Attributes:
        counts: columns `count` (a class, set or verdict), one per training, `mean` and `sd` (over trainings, n - 1).
        matches: columns `seed`, `other`, `n_specific`; `matched` and `matched_specific`, the shares of the specific latents of
            `seed` whose chat direction has a cosine above the limit with that of a live or of a specific latent of `other` (NaN
            without specific latents); `median_cosine`, the median of the best cosines of the specific latents with the live
            latents of `other`, and `median_cosine_live`, that of all live latents of `seed`.
        behaviours: columns `behaviour`, `pool` (chat_specific, shared), and one per training: the held-out AUROC of the pool's
            best latent before the answer. No rows if a training has no behaviours.
    """

    counts: pl.DataFrame
    matches: pl.DataFrame
    behaviours: pl.DataFrame


def read_seeds(run: Path, names: list[str], device: torch.device = CPU) -> list[Seed]:
    """Read analysed crosscoders of a run directory to `device`."""
    if len(set(names)) < 2:
        raise UserError(f"seeds are compared with each other: name at least two crosscoders of {run}, found {names}")
    for name in names:
        if Path(name).name != name or not (run / name / "latents.parquet").exists():
            raise UserError(f"{run / name} has no latents.parquet; run `crossdiff analyze {run} --only {name}` first")
    seeds = []
    for name in names:
        path = run / name / "behaviours.parquet"
        behaviours = read_parquet(path) if path.exists() else None
        seeds.append(Seed(name, read_parquet(run / name / "latents.parquet"), load(run / name).to(device), behaviours))
    widths = {seed.name: seed.crosscoder.d_model for seed in seeds}
    if len(set(widths.values())) > 1:
        raise UserError(f"crosscoders of different widths cannot be compared: {widths}; name those of one width")
    return seeds


def largest_cosines(rows: Float[Tensor, "row d_model"], others: Float[Tensor, "other d_model"]) -> Float[Tensor, " row"]:
    """The largest cosine of each row with any of the others; -1 if there are no others."""
    if not len(others):
        return torch.full((len(rows),), -1.0)
    return torch.cat([torch.zeros(0), *(cosines.squeeze(1) for _, cosines, _ in nearest(rows, others, 1))])


def _chat_directions(seed: Seed, members: pl.Expr) -> Float[Tensor, "member d_model"]:
    return seed.crosscoder.directions()[CHAT_INDEX][seed.table.filter(members)["latent"].to_torch()]


def compare_seeds(seeds: list[Seed], smallest_cosine: float = 0.9) -> SeedReport:
    """Spread of the counts, and the share of chat-specific latents that each other training has as well."""
    found = {seed.name: counts(seed.table) for seed in seeds}
    keys = list(found[seeds[0].name])
    table = pl.DataFrame({"count": keys, **{name: [numbers[key] for key in keys] for name, numbers in found.items()}})
    values = table.drop("count").to_numpy().astype(np.float64)
    table = table.with_columns(mean=pl.Series(values.mean(1)), sd=pl.Series(values.std(1, ddof=1)))
    specific = {seed.name: _chat_directions(seed, pl.col("chat_specific")) for seed in seeds}
    live = {seed.name: _chat_directions(seed, pl.col("verdict") != "dead") for seed in seeds}
    rows = []
    for seed, other in permutations(specific, 2):
        best = largest_cosines(specific[seed], live[other])
        best_specific = largest_cosines(specific[seed], specific[other])
        best_live = largest_cosines(live[seed], live[other])
        rows.append({
            "seed": seed, "other": other, "n_specific": len(best),
            "matched": float((best > smallest_cosine).double().mean()),
            "matched_specific": float((best_specific > smallest_cosine).double().mean()),
            "median_cosine": float(best.nanmedian()) if len(best) else math.nan,
            "median_cosine_live": float(best_live.median()) if len(best_live) else math.nan,
        })  # fmt: skip
    return SeedReport(table, pl.DataFrame(rows), _behaviours(seeds))


def _behaviours(seeds: list[Seed]) -> pl.DataFrame:
    keys = ["behaviour", "pool"]
    found = pl.DataFrame(schema={"behaviour": pl.String, "pool": pl.String})
    for index, seed in enumerate(seeds):
        if seed.behaviours is None:
            return found.clear()
        pools = seed.behaviours.filter(pl.col("pool").is_in(["chat_specific", "shared"]), question="before_answer")
        scores = pools.select(*keys, pl.col("auroc").alias(seed.name))
        found = found.join(scores, on=keys, how="inner") if index else scores
    return found.sort(keys)
