"""The latents to interpret: given by number, or by the value of a column of the latent table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from crossdiff.errors import UserError, check_latents
from crossdiff.latents.verdict import VERDICTS


def select(
    table: pl.DataFrame, wanted: Sequence[str], per_selection: int | None, seed: int, option: str = "--latents"
) -> list[int]:
    """The requested latents or concepts, sorted and without repeats.

    A COLUMN=VALUE with more than `per_selection` latents is sampled. It skips latents that are never active, since they have
    no contexts.
    """
    found: set[int] = set()
    for index, text in enumerate(wanted):
        column, equals, value = text.partition("=")
        if equals:
            members = _matching(table, column.strip(), value.strip(), option).to_numpy()
            order = np.random.default_rng([seed, index]).permutation(len(members))
            found |= set(members[order[:per_selection]].tolist())
        else:
            found.add(_number(text, table.height, option))
    return sorted(found)


def _number(text: str, n_latents: int, option: str) -> int:
    try:
        latent = int(text)
    except ValueError:
        raise UserError(f"{option}: {text!r} is neither a number nor COLUMN=VALUE, such as verdict=chat_specific") from None
    of_concepts = "concept" in option
    check_latents([latent], n_latents, "the run" if of_concepts else "the crosscoder", "concept" if of_concepts else "latent")
    return latent


def _matching(table: pl.DataFrame, column: str, value: str, option: str) -> pl.Series:
    choices = [name for name, kind in table.schema.items() if kind in (pl.String, pl.Boolean)]
    if column not in choices:
        raise UserError(f"{option}: cannot choose by {column!r}; choose by one of {', '.join(choices)}")
    values = table[column].cast(pl.String)
    known = list(VERDICTS) if column == "verdict" else values.unique().drop_nulls().sort().to_list()
    if value not in known:
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise UserError(f"{option}: {column} is never {value!r}; its values are {shown}")
    return table.filter((values == value) & (pl.col("n_active") > 0))["latent"]
