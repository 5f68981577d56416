"""Sets of latents as data, resolved on a latent table.

A set is defined by a rule (the best half by `nu_error`) rather than by latent numbers, so that one list of interventions works
for every crosscoder.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import Field, FiniteFloat, model_validator

from crossdiff.config import Config
from crossdiff.errors import UserError, check_latents
from crossdiff.latents.ranking import RANKED, RANKS

Nu = Literal["nu_error", "nu_reconstruction", "nu_reconstruction_nobias", "nu_activation", "nu_activation_nobias"]
Ranking = Literal[Nu, "delta_norm", "rank_sum", "rank_sum_paper", "contribution"]
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


class Chosen(Config):
    """Latents that are chosen by a measure.

    `within` leaves out those whose `nus` are not in the range. By default, a ranking by a nu_activation looks at that nu, any
    other at nu_error and nu_reconstruction without bias, or with bias if the ranking is. Published analyses use [-0.1, 2],
    since a nu far from 0 to 1 says little about how specific a latent is.
    """

    within: tuple[FiniteFloat, FiniteFloat] | None = Field(None, description="smallest and largest nu of a latent that counts")
    nus: tuple[Nu, ...] | None = Field(None, min_length=1, description="the nus that `within` looks at")
    among: Among = "pool"

    @model_validator(mode="after")
    def _range_is_whole(self) -> Chosen:
        if self.within is not None and self.within[0] >= self.within[1]:
            raise ValueError(f"within {list(self.within)} holds no nu; give the smaller number first")
        if self.nus is not None and self.within is None:
            raise ValueError(
                f"nus {list(self.nus)} say what `within` looks at, but there is no `within`; give it, or leave them out"
            )
        return self


class RankedLatents(Chosen):
    """The best or the worst latents of a ranking: a share of the pool, or `size` latents.

    With `among: all`, the same number is taken from all latents.
    """

    kind: Literal["ranked"]
    ranking: Ranking
    part: Literal["best", "worst"] = "best"
    share: float = Field(0.5, gt=0, le=1)
    size: int | None = Field(None, ge=1, description="number of latents; overrides the share")


class ThresholdLatents(Chosen):
    """Latents on the chat-specific side of a threshold: below it for nu and rank_sum, at or above it for the others."""

    kind: Literal["threshold"]
    ranking: Ranking
    at: FiniteFloat


class VerdictLatents(Config):
    """Latents with one of the verdicts of the latent table."""

    kind: Literal["verdict"]
    verdicts: tuple[Verdict, ...] = Field(min_length=1)
    among: Among = "all"


class RandomLatents(Chosen):
    """Random sets of the same size as another set, drawn without replacement, one per seed."""

    kind: Literal["random"]
    like: Selection
    seeds: int = Field(5, ge=1)


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
    """One or several sets by suffix; None means all latents.

    Attributes:
        single: every set is a single latent.
        outside: number of latents that `within` left out; None for a selection without it.
    """

    sets: dict[str, tuple[int, ...] | None]
    single: bool = False
    outside: int | None = None


def pool_of(table: pl.DataFrame, size: int) -> pl.DataFrame:
    """The `size` latents with the largest delta_norm among those that every ranking orders (all nu defined).

    The size is the same for every crosscoder, so that crosscoders with classes of very different sizes can be compared. Minder,
    Dumas et al. 2025 take 3,176 of 73,728 latents (4%), both of their L1 and of their BatchTopK crosscoder.
    """
    needed = (*RANKS, "delta_norm")
    ranked = _with_columns(table, *needed).filter(pl.all_horizontal(pl.col(needed).is_not_nan()))
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


class Candidates(NamedTuple):
    """The latents from which a set is chosen, and how many of them were left out because of their nu."""

    table: pl.DataFrame
    outside: int | None


def _chosen_from(selection: Chosen, table: pl.DataFrame, pool: int, *columns: str) -> Candidates:
    """The candidates of a selection whose `columns` are defined, without those outside of `within`."""
    defined = [pl.col(column).is_not_nan() for column in columns]
    candidates = _candidates(table, pool, selection.among, *columns).filter(*defined)
    if selection.within is None:
        return Candidates(candidates, None)
    nus = selection.nus or _nus_of(next(iter(columns), ""))
    inside = _with_columns(candidates, *nus).filter(pl.all_horizontal(pl.col(nus).is_between(*selection.within)))
    return Candidates(inside, candidates.height - inside.height)


def _nus_of(ranking: str) -> tuple[str, ...]:
    """The nus that `within` looks at by default: a ranking's own where it is one of the activation, else that of the error and
    of the reconstruction, in the variant that the ranking rests on."""
    if ranking.startswith("nu_activation"):
        return (ranking,)
    return (RANKED[0], ranking) if ranking.startswith("nu_reconstruction") else RANKS.get(ranking, RANKED)


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
            each = _one_set(selection.of, table, pool)
            return LatentSets({str(latent): (latent,) for latent in each.latents}, single=True, outside=each.outside)
        case _:
            one = _one_set(selection, table, pool)
            return LatentSets({"": tuple(sorted(one.latents))}, outside=one.outside)


def _random_sets(selection: RandomLatents, table: pl.DataFrame, pool: int, seed: int) -> LatentSets:
    size = len(_one_set(selection.like, table, pool).latents)
    found = _chosen_from(selection, table, pool)
    candidates = found.table.filter(pl.col("n_active") > 0)["latent"].sort().to_numpy()
    if size > len(candidates):
        raise Unavailable(f"{size} random latents are more than the {len(candidates)} to draw from; `among: all` has more")
    sets: dict[str, tuple[int, ...] | None] = {}
    for draw in range(selection.seeds):
        drawn = np.random.default_rng([seed, draw]).choice(candidates, size, replace=False)
        sets[str(draw)] = tuple(sorted(drawn.tolist()))
    return LatentSets(sets, outside=found.outside)


class OneSet(NamedTuple):
    """Latents in the order of their ranking, if they have one; `outside` as in `LatentSets`."""

    latents: list[int]
    outside: int | None = None


def _one_set(selection: Selection, table: pl.DataFrame, pool: int) -> OneSet:
    """The latents of a selection that is one set."""
    outside = None
    match selection:
        case ListedLatents():
            check_latents(selection.latents, table.height)
            return OneSet(sorted(set(selection.latents)))
        case RankedLatents():
            ranking = selection.ranking
            candidates, outside = _chosen_from(selection, table, pool, ranking)
            ranked = candidates.sort(ranking, "latent", descending=[ranking in HIGH_IS_BEST, False])
            # Rounded down, so that the best and the worst half of an odd pool share no latent.
            size = int(selection.share * min(pool, ranked.height)) if selection.size is None else selection.size
            chosen = ranked.head(size) if selection.part == "best" else ranked.tail(size)
        case ThresholdLatents():
            value = pl.col(selection.ranking)
            is_best = value >= selection.at if selection.ranking in HIGH_IS_BEST else value < selection.at
            candidates, outside = _chosen_from(selection, table, pool, selection.ranking)
            chosen = candidates.filter(is_best)
        case VerdictLatents():
            candidates = _candidates(table, pool, selection.among, "verdict")
            chosen = candidates.filter(pl.col("verdict").is_in(selection.verdicts))
        case AllLatents() | RandomLatents() | EachLatent():
            raise UserError(f"{selection.kind!r} is not a single set of known size, which `like` and `of` need")
    return OneSet(chosen["latent"].to_list(), outside)
