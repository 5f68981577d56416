"""Sets of latents as data, settled on a latent table.

A set is named by what it is for (the best half by `nu_error`), never by numbers of latents, so that one list of interventions
serves every crosscoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import polars as pl
from pydantic import Field

from crossdiff.config import Config, UserError

Ranking = Literal["delta_norm", "nu_error", "nu_reconstruction", "rank_sum"]
HIGH_IS_SPECIFIC = {"delta_norm"}
"""Rankings in which a larger value means more specific to the chat model; in the others a smaller one does."""

Among = Literal["pool", "all"]


class AllLatents(Config):
    """Every latent."""

    kind: Literal["all"]


class ListedLatents(Config):
    """Latents by number: these belong to one crosscoder."""

    kind: Literal["list"]
    latents: tuple[int, ...] = Field(min_length=1)


class RankedLatents(Config):
    """The most or the least chat-specific ones of the pool: a share of it, or so many."""

    kind: Literal["ranked"]
    ranking: Ranking
    part: Literal["best", "worst"] = "best"
    share: float = Field(0.5, gt=0, le=1)
    size: int | None = Field(None, ge=1, description="number of latents; overrides the share")


class ThresholdLatents(Config):
    """Those on the specific side of a threshold: nu and rank_sum below it, delta_norm at least it."""

    kind: Literal["threshold"]
    ranking: Ranking
    at: float
    among: Among = "pool"


class VerdictLatents(Config):
    """Those with one of the verdicts of the latent table. A verdict is a set: it has no order and no halves."""

    kind: Literal["verdict"]
    verdicts: tuple[Literal["chat_specific", "rotated", "base_specific", "shared", "undecided"], ...] = Field(min_length=1)


class RandomLatents(Config):
    """As many as another set has, drawn without replacement, once for each seed."""

    kind: Literal["random"]
    like: Selection
    seeds: int = Field(5, ge=1)
    among: Among = "pool"


class EachLatent(Config):
    """The latents of another set one at a time."""

    kind: Literal["each"]
    of: Selection


Selection = Annotated[
    AllLatents | ListedLatents | RankedLatents | ThresholdLatents | VerdictLatents | RandomLatents | EachLatent,
    Field(discriminator="kind"),
]
RandomLatents.model_rebuild()
EachLatent.model_rebuild()


@dataclass(frozen=True)
class LatentSets:
    """One or several sets; the keys tell them apart, None stands for all latents, `single` for sets of one latent each."""

    sets: dict[str, tuple[int, ...] | None]
    single: bool = False


def pool_of(table: pl.DataFrame, size: int) -> pl.DataFrame:
    """The `size` latents of the largest delta_norm among those that every ranking orders (all nu defined).

    Its size is the same in each crosscoder, so that crosscoders can be compared whose classes are of very different sizes;
    Minder, Dumas et al. 2025 take 3,176 of 73,728 latents (4%) of their L1 and of their BatchTopK crosscoder.
    """
    ranked = table.filter(pl.col("rank_sum").is_not_nan() & pl.col("delta_norm").is_not_nan())
    return ranked.sort("delta_norm", "latent", descending=[True, False]).head(size)


def resolve(selection: Selection, table: pl.DataFrame, pool: int, seed: int) -> LatentSets:
    """The latents of a selection, each set in ascending order.

    Raises:
        UserError: a latent that the table has not; a random set larger than what it is drawn from.
    """
    match selection:
        case AllLatents():
            return LatentSets({"": None})
        case RandomLatents():
            return _random(selection, table, pool, seed)
        case EachLatent():
            chosen = _one_set(selection.of, table, pool)
            return LatentSets({str(latent): (latent,) for latent in chosen}, single=True)
        case _:
            return LatentSets({"": tuple(sorted(_one_set(selection, table, pool)))})


def _random(selection: RandomLatents, table: pl.DataFrame, pool: int, seed: int) -> LatentSets:
    size = len(_one_set(selection.like, table, pool))
    source = (pool_of(table, pool) if selection.among == "pool" else table.filter(pl.col("n_active") > 0))["latent"].to_numpy()
    if size > len(source):
        raise UserError(f"{size} random latents are asked for, but there are {len(source)} to draw from; use `among: all`")
    source = np.sort(source)
    sets: dict[str, tuple[int, ...] | None] = {}
    for draw in range(selection.seeds):
        drawn = np.random.default_rng([seed, draw]).choice(source, size, replace=False)
        sets[str(draw)] = tuple(sorted(drawn.tolist()))
    return LatentSets(sets)


def _one_set(selection: Selection, table: pl.DataFrame, pool: int) -> list[int]:
    """A set in the order of its ranking, where it has one."""
    match selection:
        case ListedLatents():
            wrong = [latent for latent in selection.latents if not 0 <= latent < table.height]
            if wrong:
                raise UserError(f"there is no latent {wrong[0]}: the crosscoder has {table.height}, 0 to {table.height - 1}")
            chosen = pl.DataFrame({"latent": sorted(set(selection.latents))})
        case RankedLatents():
            ranked = sorted_by(pool_of(table, pool), selection.ranking)
            # Rounded down, so that the best and the worst half of an odd pool share no latent.
            size = int(selection.share * ranked.height) if selection.size is None else min(selection.size, ranked.height)
            chosen = ranked.head(size) if selection.part == "best" else ranked.tail(size)
        case ThresholdLatents():
            value = pl.col(selection.ranking)
            specific = value >= selection.at if selection.ranking in HIGH_IS_SPECIFIC else value < selection.at
            source = pool_of(table, pool) if selection.among == "pool" else table
            chosen = source.filter(value.is_not_nan() & specific)
        case VerdictLatents():
            chosen = table.filter(pl.col("verdict").is_in(selection.verdicts))
        case AllLatents() | RandomLatents() | EachLatent():
            raise UserError(f"{selection.kind!r} is not one set of known size, which `like` and `of` need")
    latents: list[int] = chosen["latent"].to_list()
    return latents


def sorted_by(table: pl.DataFrame, ranking: Ranking) -> pl.DataFrame:
    """The most chat-specific latent first; equal ones by number."""
    return table.sort(ranking, "latent", descending=[ranking in HIGH_IS_SPECIFIC, False])
