"""Along a chain of models: what each step changes in a latent, and where it first appears (docs/how-to/chain.md).

Each pair of models is judged like a base and a chat model: `of_pair` restricts a crosscoder and its sums to two sources, and
the tables of a pair are made from that. The pairs are each model with the one before it, and the last with the first.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import polars as pl
import torch

from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.view import identity
from crossdiff.latents.decoder import SHARED
from crossdiff.latents.ranking import RANKED
from crossdiff.latents.scaling import Sums
from crossdiff.sources import SOURCES

CHANGES = {
    "appears": "verdict chat_specific: only the later model has it",
    "vanishes": "verdict base_specific: only the earlier model has it",
    "turns": "verdict rotated: the later model has it in another direction",
    "grows": "both have it, its decoder norm rises (delta_norm above 0.6), and the intervals of both ratios end below 1",
    "shrinks": "the same the other way round",
    "steady": "both have it, without such a difference",
    "undecided": "too few activations, or an interval that reaches over its limit",
    "dead": "never active on the analysed tokens",
}
"""What a step may do to a latent or a concept, by its verdict on the two models of the step."""
OF_VERDICT = {
    "chat_specific": "appears", "base_specific": "vanishes", "rotated": "turns", "undecided": "undecided", "dead": "dead",
}  # fmt: skip
NEW = ("appears", "turns")
"""Changes by which the later model has a direction that the earlier one lacks."""
ENDS = ("", "_low", "_high")
COLUMNS = {
    "latent": "number of the latent",
    "before, after": "names of the two models",
    "norm_before, norm_after": "norms of its decoder directions",
    "delta_norm, decoder_cosine": "as in the latent table, of these two models",
    "nu_*": "the ratios that give the verdict, with their intervals: along the direction in the later model, and (_mirrored) "
    "along that in the earlier one",
    "verdict, verdict_reason": "as in the latent table, with `before` for the base and `after` for the chat model",
    "change": ", ".join(CHANGES),
}
"""Columns of `chain.parquet`, which has one row per latent and pair of models."""
KEPT = (
    "latent", "norm_base", "norm_chat", "delta_norm", "decoder_cosine",
    *(f"{nu}{mirrored}{end}" for nu in RANKED for mirrored in ("", "_mirrored") for end in ENDS),
    "verdict", "verdict_reason",
)  # fmt: skip


def pairs_of(sources: tuple[str, ...]) -> list[tuple[str, str]]:
    """The pairs of models that are compared: each with the one before it, and the last with the first."""
    steps = list(pairwise(sources))
    return steps if len(sources) == 2 else [*steps, (sources[0], sources[-1])]


def of_pair(crosscoder: Crosscoder, sums: Sums, before: int, after: int) -> tuple[Crosscoder, Sums]:
    """A crosscoder and its sums with two of the sources alone, given by their indices, as if they were base and chat.

    What it is for is geometry and latent scaling: with half of its encoder, the crosscoder does not encode as the whole does.
    A coder with one decoder keeps it, and the sums are those of the two models.
    """
    kept = [before, after]
    if crosscoder.n_sources == 1:
        products = {target: values[:, kept] for target, values in sums.products.items()}
        return crosscoder, replace(sums, products=products)
    others = list(range(crosscoder.n_sources, len(sums.directions)))
    directions = [*(index % crosscoder.n_sources for index in kept), *others]

    def columns(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, crosscoder.n_sources, crosscoder.d_model)[:, kept].flatten(1)

    restricted = replace(
        crosscoder,
        encoder=columns(crosscoder.encoder),
        decoder=columns(crosscoder.decoder),
        decoder_bias=columns(crosscoder.decoder_bias).flatten(),
        mean=crosscoder.mean[kept],
        view=identity(SOURCES),
    )
    products = {target: values[directions][:, kept] for target, values in sums.products.items()}
    return restricted, replace(sums, directions=sums.directions[directions], products=products)


def step_table(judged: pl.DataFrame, before: str, after: str) -> pl.DataFrame:
    """The rows of `chain.parquet` for two models, from their table of latents with verdicts."""
    below_one = {
        side: pl.all_horizontal(pl.col(f"{nu}{side}_high").fill_nan(None) < 1 for nu in RANKED) for side in ("", "_mirrored")
    }
    change = (
        pl.when(pl.col("verdict").is_in(list(OF_VERDICT)))
        .then(pl.col("verdict").replace(OF_VERDICT))
        .when((pl.col("verdict") == "shared") & (pl.col("delta_norm") > SHARED[1]) & below_one[""])
        .then(pl.lit("grows"))
        .when((pl.col("verdict") == "shared") & (pl.col("delta_norm") < SHARED[0]) & below_one["_mirrored"])
        .then(pl.lit("shrinks"))
        .otherwise(pl.lit("steady"))
    )
    models = {"latent": pl.col("latent").cast(pl.Int64), "before": pl.lit(before), "after": pl.lit(after)}
    table = judged.select(KEPT).with_columns(**models, change=change)
    return table.rename({"norm_base": "norm_before", "norm_chat": "norm_after"})


def emergence(chain: pl.DataFrame, sources: tuple[str, ...]) -> pl.DataFrame:
    """Where each latent first appears: latent, emerges_at.

    That is the first model whose direction the model before lacks (the change is in `NEW`). It is the first model of the chain
    for a latent that no step adds, nor all of them together, and null where the intervals leave that open.
    """
    step_of = {after: number for number, after in enumerate(sources[1:], 1)}
    is_step = pl.struct("before", "after").is_in([{"before": a, "after": b} for a, b in pairwise(sources)])
    is_new, is_open = pl.col("change").is_in(NEW), pl.col("change").is_in(["undecided", "dead"])
    step = pl.col("after").replace_strict(step_of)
    found = chain.group_by("latent").agg(first=step.filter(is_step & is_new).min(), unknown=(is_new | is_open).any())
    name = pl.when(pl.col("first").is_not_null()).then("first").when(~pl.col("unknown")).then(0)
    names = name.replace_strict(dict(enumerate(sources)), return_dtype=pl.String)
    return found.select("latent", emerges_at=names).sort("latent")
