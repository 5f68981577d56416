"""Sets of latents as data, resolved on a latent table.

A set is defined by a rule (the best half by `nu_error`) rather than by latent numbers, so that one list of interventions works
for every crosscoder.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import Field, FiniteFloat

from crossdiff.config import Config
from crossdiff.errors import UserError, check_latents

Ranking = Literal["delta_norm", "nu_error", "nu_reconstruction", "rank_sum", "contribution"]
HIGH_IS_BEST = {"delta_norm", "contribution"}
"""Rankings whose best latent has the largest value: the most chat-specific, or the largest share of the models' difference.
In the other rankings, smaller values are more chat-specific."""

Among = Literal["pool", "all"]
Verdict = Literal[
    "chat_specific", "complete_shrinkage", "latent_decoupling", "rotated", "shared", "base_specific", "dead", "undecided"
]


class AllLatents(Config):
    """Every latent."""

    kind: Literal["all"]


class ListedLatents(Config):
    """Latents by number; they are specific to one crosscoder."""

    kind: Literal["list"]
    latents: tuple[int, ...] = Field(min_length=1)


class RankedLatents(Config):
    """The best or the worst latents of a ranking: a share of the pool, or `size` latents.

    With `among: all`, the same number is taken from all latents.
    """

    kind: Literal["ranked"]
    ranking: Ranking
    part: Literal["best", "worst"] = "best"
    share: float = Field(0.5, gt=0, le=1)
    size: int | None = Field(None, ge=1, description="number of latents; overrides the share")
    among: Among = "pool"


class ThresholdLatents(Config):
    """Latents on the chat-specific side of a threshold: below it for nu and rank_sum, at or above it for the others."""

    kind: Literal["threshold"]
    ranking: Ranking
    at: FiniteFloat
    among: Among = "pool"


class VerdictLatents(Config):
    """Latents with one of the verdicts of the latent table."""

    kind: Literal["verdict"]
    verdicts: tuple[Verdict, ...] = Field(min_length=1)
    among: Among = "all"


class RandomLatents(Config):
    """Random sets of the same size as another set, drawn without replacement, one per seed."""

    kind: Literal["random"]
    like: Selection
    seeds: int = Field(5, ge=1)
    among: Among = "pool"


class EachLatent(Config):
    """The latents of another set, one at a time."""

    kind: Literal["each"]
    of: Selection


Selection = Annotated[
    AllLatents | ListedLatents | RankedLatents | ThresholdLatents | VerdictLatents | RandomLatents | EachLatent,
    Field(discriminator="kind"),
]
RandomLatents.model_rebuild()
EachLatent.model_rebuild()


class Unavailable(Exception):
    """The crosscoder does not have the set.

    Its table lacks the column to choose by (a coder of the difference has no delta_norm, nu or verdict), or there are fewer
    latents than are to be drawn.
    """


class LatentSets(NamedTuple):
    """One or several sets by suffix; None means all latents. `single`: every set is a single latent."""

    sets: dict[str, tuple[int, ...] | None]
    single: bool = False


def pool_of(table: pl.DataFrame, size: int) -> pl.DataFrame:
    """The `size` latents with the largest delta_norm among those that every ranking orders (all nu defined).

    The size is the same for every crosscoder, so that crosscoders with classes of very different sizes can be compared. Minder,
    Dumas et al. 2025 take 3,176 of 73,728 latents (4%), both of their L1 and of their BatchTopK crosscoder.
    """
    is_ranked = pl.col("rank_sum").is_not_nan() & pl.col("delta_norm").is_not_nan()
    ranked = _with_columns(table, "rank_sum", "delta_norm").filter(is_ranked)
    return ranked.sort("delta_norm", "latent", descending=[True, False]).head(size)


def _with_columns(table: pl.DataFrame, *columns: str) -> pl.DataFrame:
    """The table; `Unavailable` names a column that it lacks."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise Unavailable(f"the latents of this coder have no {missing[0]}")
    return table


def _candidates(table: pl.DataFrame, pool: int, among: Among, *columns: str) -> pl.DataFrame:
    """The latents from which a set is chosen by the given columns."""
    return _with_columns(pool_of(table, pool) if among == "pool" else table, *columns)


def rankings_of(selection: Selection) -> set[str]:
    """The rankings that a selection needs."""
    match selection:
        case RankedLatents() | ThresholdLatents():
            return {selection.ranking}
        case RandomLatents():
            return rankings_of(selection.like)
        case EachLatent():
            return rankings_of(selection.of)
        case _:
            return set()


def resolve(selection: Selection, table: pl.DataFrame, pool: int, seed: int) -> LatentSets:
    """The latents of a selection, each set in ascending order."""
    match selection:
        case AllLatents():
            return LatentSets({"": None})
        case RandomLatents():
            return _random_sets(selection, table, pool, seed)
        case EachLatent():
            chosen = _one_set(selection.of, table, pool)
            return LatentSets({str(latent): (latent,) for latent in chosen}, single=True)
        case _:
            return LatentSets({"": tuple(sorted(_one_set(selection, table, pool)))})


def _random_sets(selection: RandomLatents, table: pl.DataFrame, pool: int, seed: int) -> LatentSets:
    size = len(_one_set(selection.like, table, pool))
    candidates = _candidates(table, pool, selection.among).filter(pl.col("n_active") > 0)["latent"].sort().to_numpy()
    if size > len(candidates):
        raise Unavailable(f"{size} random latents are more than the {len(candidates)} to draw from; `among: all` has more")
    sets: dict[str, tuple[int, ...] | None] = {}
    for draw in range(selection.seeds):
        drawn = np.random.default_rng([seed, draw]).choice(candidates, size, replace=False)
        sets[str(draw)] = tuple(sorted(drawn.tolist()))
    return LatentSets(sets)


def _one_set(selection: Selection, table: pl.DataFrame, pool: int) -> list[int]:
    """A set in the order of its ranking, if it has one."""
    match selection:
        case ListedLatents():
            check_latents(selection.latents, table.height)
            return sorted(set(selection.latents))
        case RankedLatents():
            ranking = selection.ranking
            candidates = _candidates(table, pool, selection.among, ranking).filter(pl.col(ranking).is_not_nan())
            ranked = candidates.sort(ranking, "latent", descending=[ranking in HIGH_IS_BEST, False])
            # Rounded down, so that the best and the worst half of an odd pool share no latent.
            size = int(selection.share * min(pool, ranked.height)) if selection.size is None else selection.size
            chosen = ranked.head(size) if selection.part == "best" else ranked.tail(size)
        case ThresholdLatents():
            value = pl.col(selection.ranking)
            is_best = value >= selection.at if selection.ranking in HIGH_IS_BEST else value < selection.at
            candidates = _candidates(table, pool, selection.among, selection.ranking)
            chosen = candidates.filter(value.is_not_nan() & is_best)
        case VerdictLatents():
            candidates = _candidates(table, pool, selection.among, "verdict")
            chosen = candidates.filter(pl.col("verdict").is_in(selection.verdicts))
        case AllLatents() | RandomLatents() | EachLatent():
            raise UserError(f"{selection.kind!r} is not a single set of known size, which `like` and `of` need")
    latents: list[int] = chosen["latent"].to_list()
    return latents
