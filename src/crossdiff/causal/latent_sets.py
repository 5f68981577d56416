"""Sets of latents as data, settled on a latent table.

A set is named by what it is for (the best half by `nu_error`), never by numbers of latents, so that one list of interventions
serves every crosscoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import polars as pl
from pydantic import Field, FiniteFloat

from crossdiff.config import Config
from crossdiff.errors import UserError

Ranking = Literal["delta_norm", "nu_error", "nu_reconstruction", "rank_sum", "contribution"]
HIGH_IS_BEST = {"delta_norm", "contribution"}
"""Rankings in which the larger value comes first: more specific to the chat model, or more of the models' difference. In the
others a smaller value is more specific."""

Among = Literal["pool", "all"]
Verdict = Literal[
    "chat_specific", "complete_shrinkage", "latent_decoupling", "rotated", "shared", "base_specific", "dead", "undecided"
]


class AllLatents(Config):
    """Every latent."""

    kind: Literal["all"]


class ListedLatents(Config):
    """Latents by number: these belong to one crosscoder."""

    kind: Literal["list"]
    latents: tuple[int, ...] = Field(min_length=1)


class RankedLatents(Config):
    """The first or the last of a ranking: a share of the pool, or so many; `among: all` takes as many from all latents."""

    kind: Literal["ranked"]
    ranking: Ranking
    part: Literal["best", "worst"] = "best"
    share: float = Field(0.5, gt=0, le=1)
    size: int | None = Field(None, ge=1, description="number of latents; overrides the share")
    among: Among = "pool"


class ThresholdLatents(Config):
    """Those on the specific side of a threshold: nu and rank_sum below it, the others at least it."""

    kind: Literal["threshold"]
    ranking: Ranking
    at: FiniteFloat
    among: Among = "pool"


class VerdictLatents(Config):
    """Those with one of the verdicts of the latent table. A verdict is a set: it has no order and no halves."""

    kind: Literal["verdict"]
    verdicts: tuple[Verdict, ...] = Field(min_length=1)
    among: Among = "all"


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


class Unavailable(Exception):
    """This crosscoder has no such set: its table lacks what the set is chosen by (a coder of the difference has no delta_norm,
    nu or verdict), or holds fewer latents than are to be drawn."""


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
    ranked = _with(table, "rank_sum", "delta_norm").filter(pl.col("rank_sum").is_not_nan() & pl.col("delta_norm").is_not_nan())
    return ranked.sort("delta_norm", "latent", descending=[True, False]).head(size)


def _with(table: pl.DataFrame, *columns: str) -> pl.DataFrame:
    """The table, if it has the columns; raises `Unavailable`."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise Unavailable(f"the latents of this coder have no {missing[0]}")
    return table


def _source(table: pl.DataFrame, pool: int, among: Among) -> pl.DataFrame:
    """The latents that a set is taken from."""
    return pool_of(table, pool) if among == "pool" else table


def rankings_of(selection: Selection) -> set[str]:
    """The rankings that a selection reads."""
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
    """The latents of a selection, each set in ascending order.

    Raises:
        UserError: a latent that the table has not.
        Unavailable: the table lacks what the set is chosen by, or a random set is larger than what it is drawn from.
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
    source = _source(table, pool, selection.among).filter(pl.col("n_active") > 0)["latent"].to_numpy()
    if size > len(source):
        raise Unavailable(f"{size} random latents are more than the {len(source)} to draw from; `among: all` has more")
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
            source = _with(_source(table, pool, selection.among), selection.ranking)
            ranked = sorted_by(source.filter(pl.col(selection.ranking).is_not_nan()), selection.ranking)
            # Rounded down, so that the best and the worst half of an odd pool share no latent.
            size = int(selection.share * min(pool, ranked.height)) if selection.size is None else selection.size
            chosen = ranked.head(size) if selection.part == "best" else ranked.tail(size)
        case ThresholdLatents():
            value = pl.col(selection.ranking)
            best = value >= selection.at if selection.ranking in HIGH_IS_BEST else value < selection.at
            chosen = _with(_source(table, pool, selection.among), selection.ranking).filter(value.is_not_nan() & best)
        case VerdictLatents():
            source = _with(_source(table, pool, selection.among), "verdict")
            chosen = source.filter(pl.col("verdict").is_in(selection.verdicts))
        case AllLatents() | RandomLatents() | EachLatent():
            raise UserError(f"{selection.kind!r} is not one set of known size, which `like` and `of` need")
    latents: list[int] = chosen["latent"].to_list()
    return latents


def sorted_by(table: pl.DataFrame, ranking: Ranking) -> pl.DataFrame:
    """The best latent first; equal ones by number."""
    return table.sort(ranking, "latent", descending=[ranking in HIGH_IS_BEST, False])
