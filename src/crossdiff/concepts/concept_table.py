"""The tables of the stage `concepts`; `COLUMNS`, `MEMBER_COLUMNS` and `TRAINING_COLUMNS` document their columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from crossdiff.concepts.agreement import Pool
from crossdiff.concepts.candidates import ARTIFACTS, Codes
from crossdiff.concepts.clustering import Grouping
from crossdiff.concepts.group_scaling import GroupSums, group_table, pooled
from crossdiff.concepts.similarity import Matrix, Products
from crossdiff.config import AnalyzeConfig
from crossdiff.latents.activity import Activity
from crossdiff.latents.groups import GROUPS
from crossdiff.latents.latent_table import COLUMNS as LATENT_COLUMNS
from crossdiff.latents.twins import N_NEIGHBOURS, NO_TWINS
from crossdiff.latents.verdict import with_verdicts

COLUMNS = {
    "concept": "number of the concept: replicated ones first, then in order of their energy",
    "n_trainings": "trainings in which it has a member",
    "replicated": "whether those are enough (concepts.replicated)",
    "kinds": "kinds of sparsity of these trainings",
    "n_members": "latents in it, over all trainings",
    "n_artifacts": "members whose own verdict is complete_shrinkage or latent_decoupling",
    "energy": "share of the candidates' energy that its members hold, mean over all trainings",
    "specific_energy": "the same among the candidates with verdict chat_specific",
    "n_agreeing": "trainings in which the group alone gets the concept's verdict",
    "label": "its strongest tokens, and words that are typical of their contexts; tokens, words: the same as lists",
    "before, token, after": "its strongest example around the strongest token",
    "frequency": "share of the analysed tokens on which it is active",
    "mean_activation, max_activation": "mean over its active tokens and largest value of its activation, the members' summed v",
} | {
    key: text
    for key, text in LATENT_COLUMNS.items()
    if key.startswith(
        ("n_active", "norm_", "delta", "decoder_cosine", "beta", "nu_", "undefined", "rank", "verdict", "chat_spec")
    )
    or key.startswith(("template_only", "frequency_<", "share_<"))
}
MEMBER_COLUMNS = {
    "concept": "number of the concept",
    "training": "name of the training; kind: its kind of sparsity",
    "latent": "number of the latent in this training",
    "verdict": "the latent's own verdict",
    "energy": "share of its training's candidate energy",
    "correlation": "of its activations with the concept's",
}
TRAINING_COLUMNS = {
    "concept": "number of the concept",
    "training": "name of the training",
    "n_members": "its latents in this training",
    "energy": "share of the training's candidate energy",
    "*": "columns of latent scaling and the verdict, as in the latent table, of the group in this training alone",
}


def concept_table(
    codes: Codes,
    grouping: Grouping,
    pool: Pool,
    sums: Sequence[GroupSums],
    activity: Activity,
    config: AnalyzeConfig,
) -> pl.DataFrame:
    """One row per concept, without its label. Latent scaling and the verdict are those of all trainings together."""
    kinds = np.array([training.kind for training in codes.trainings])[codes.training]
    artifact = np.concatenate([training.table["verdict"].is_in(ARTIFACTS).to_numpy() for training in codes.trainings])
    members = [np.flatnonzero(grouping.concept == concept) for concept in range(grouping.n_concepts)]
    n_active = activity.counts.sum(0)
    facts = pl.DataFrame(
        {
            "concept": np.arange(grouping.n_concepts),
            "n_trainings": grouping.n_trainings,
            "replicated": grouping.replicated,
            "kinds": [sorted(set(kinds[own].tolist())) for own in members],
            "n_members": [len(own) for own in members],
            "n_artifacts": [int(artifact[own].sum()) for own in members],
            "energy": pool.of_concepts(pool.shares(np.ones_like(pool.specific)), grouping),
            "specific_energy": pool.of_concepts(pool.shares(pool.specific), grouping),
            "frequency": (n_active / int(activity.tokens.sum())).double().numpy(),
            "mean_activation": (activity.total.sum(0) / n_active).numpy(),
            "max_activation": activity.maximum.amax(0).double().numpy(),
        },
        schema_overrides={"kinds": pl.List(pl.String), "n_members": pl.Int64, "n_artifacts": pl.Int64},
    )
    tokens, counts = activity.by_group()
    for number, name in enumerate(GROUPS):
        facts = facts.with_columns(
            pl.Series(f"frequency_{name}", (counts[number] / tokens[number]).double().numpy()),
            pl.Series(f"share_{name}", (counts[number] / n_active).double().numpy()),
        )
    measured = judged(group_table(pooled(sums), config), facts["share_template"], config)
    alone = [judged(group_table(own, config), facts["share_template"], config)["verdict"] for own in sums]
    present = np.stack([own.n.sum(0).numpy() > 0 for own in sums])
    agreeing = np.stack([(verdicts == measured["verdict"]).to_numpy() for verdicts in alone])
    return facts.with_columns(n_agreeing=pl.Series((agreeing & present).sum(0))).hstack(measured.drop("share_template"))


def judged(table: pl.DataFrame, share_template: pl.Series, config: AnalyzeConfig) -> pl.DataFrame:
    """A table of groups with the verdicts of the latent table."""
    numbered = table.with_row_index("latent").with_columns(share_template=share_template)
    return with_verdicts(numbered, NO_TWINS, config).drop("latent")


def training_table(
    codes: Codes, grouping: Grouping, pool: Pool, sums: Sequence[GroupSums], config: AnalyzeConfig
) -> pl.DataFrame:
    """One row per concept and training in which it has a member."""
    tables = []
    shares = pool.shares(np.ones_like(pool.specific)) * len(pool.trainings)
    for t, own in enumerate(sums):
        mine = codes.candidates_of(t)
        concept = grouping.concept[mine]
        n_members = np.bincount(concept, minlength=grouping.n_concepts)
        energy = np.zeros(grouping.n_concepts)
        np.add.at(energy, concept, shares[mine])
        unknown = pl.Series("share_template", np.zeros(grouping.n_concepts))
        alone = judged(group_table(own, config), unknown, config).drop("share_template", "template_only")
        facts = pl.DataFrame({
            "concept": np.arange(grouping.n_concepts), "training": [codes.trainings[t].name] * grouping.n_concepts,
            "n_members": n_members, "energy": energy,
        }, schema_overrides={"training": pl.String})  # fmt: skip
        tables.append(facts.hstack(alone).filter(pl.col("n_members") > 0))
    return pl.concat(tables).sort("concept", maintain_order=True)


def member_table(codes: Codes, grouping: Grouping, pool: Pool, products: Products) -> pl.DataFrame:
    """One row per candidate, which is a member of exactly one concept."""
    n = codes.n_candidates
    weights = grouping.weights(codes.training)
    correlation = np.full(n, np.nan)
    for concept in range(grouping.n_concepts):
        own = np.flatnonzero(grouping.concept == concept)
        alone = Matrix((np.ones(len(own)), (own, np.arange(len(own)))), shape=(n, len(own)))
        correlation[own] = products.correlation(alone, weights[:, [concept]])[:, 0]
    shares = pool.shares(np.ones_like(pool.specific)) * len(pool.trainings)
    tables = [training.table.select("latent", "verdict") for training in codes.trainings]
    return pl.DataFrame(
        {
            "concept": grouping.concept,
            "training": [codes.trainings[t].name for t in codes.training],
            "kind": [codes.trainings[t].kind for t in codes.training],
            "energy": shares,
            "correlation": correlation,
        },
        schema_overrides={"training": pl.String, "kind": pl.String},
    ).hstack(pl.concat(tables)).sort("concept", maintain_order=True)  # fmt: skip


def neighbour_table(grouping: Grouping, codes: Codes, products: Products) -> pl.DataFrame:
    """The concepts whose activations correlate most with each concept's: latent, rank, neighbour, correlation.

    The columns of concepts have the names of those of latents, for the readers that they share.
    """
    weights = grouping.weights(codes.training)
    r = np.nan_to_num(products.correlation(weights, weights), nan=-1.0)
    np.fill_diagonal(r, -2.0)
    n = min(N_NEIGHBOURS, max(0, grouping.n_concepts - 1))
    nearest = np.argsort(-r, axis=1, kind="stable")[:, :n]
    return pl.DataFrame({
        "latent": np.repeat(np.arange(grouping.n_concepts), n),
        "rank": np.tile(np.arange(n), grouping.n_concepts),
        "neighbour": nearest.ravel(),
        "correlation": np.take_along_axis(r, nearest, 1).ravel(),
    })  # fmt: skip
