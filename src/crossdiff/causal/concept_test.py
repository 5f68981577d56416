"""The causal test of concepts: what each replicated concept does alone, and all of them together, in each training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from crossdiff.activations.store import Store
from crossdiff.causal.causal_test import measure_arms
from crossdiff.causal.conversations import RESPONSE, read_conversations
from crossdiff.causal.interventions import Arm
from crossdiff.causal.patching import KL, Patcher
from crossdiff.causal.results import NO_CHANGE, arm_results, latent_results
from crossdiff.config import CausalConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.files import write_json
from crossdiff.latents.groups import GROUPS
from crossdiff.models.pair import Pair
from crossdiff.ranks import ALONE, Ranks

TABLE_FILE, SUMMARY_FILE = "causal.parquet", "causal.json"
ALONE_ARM = "alone"
RANDOM_SETS = 3
COLUMNS = {
    "concept": "number of the concept",
    "training": "training whose members of the concept are patched",
    "kl_reduction": "KL(none) - KL(this concept alone) in nats over the response, mean over conversations",
    "kl_reduction_low, kl_reduction_high": "its 95% bootstrap interval over conversations",
    "closed": "the reduction as a share of KL(none)",
    "conversations_changed": "share of the conversations whose distributions the concept changes",
}
"""Columns of `causal.parquet`."""


def arms_of(members: pl.DataFrame, replicated: Sequence[int], others: Sequence[int], seed: int) -> tuple[Arm, ...]:
    """The arms of one training.

    Args:
        members: rows (concept, latent) of the training.
        replicated: numbers of the replicated concepts.
        others: live latents of the training that are no candidates, for random sets.
    """

    def arm(name: str, latents: Sequence[int] | None, intervention: str | None = None, alone: int | None = None) -> Arm:
        chosen = None if latents is None else tuple(sorted(latents))
        return Arm(name, intervention or name, chosen, alone, (), "all", "chat")

    found = members.filter(pl.col("concept").is_in(list(replicated)))
    together = found["latent"].to_list()
    arms = [arm(NO_CHANGE, ()), arm("all_latents", None), arm("candidates", members["latent"].to_list())]
    if together:
        arms.append(arm("replicated", together))
        for draw in range(RANDOM_SETS if len(others) >= len(together) else 0):
            drawn = np.random.default_rng([seed, draw]).choice(np.array(others), len(together), replace=False)
            arms.append(arm(f"random_{draw}", drawn.tolist(), "random"))
    for (concept,), own in found.group_by("concept", maintain_order=True):
        arms.append(arm(f"{ALONE_ARM}_{concept}", own["latent"].to_list(), ALONE_ARM, int(str(concept))))
    return tuple(arms)


def concept_test(
    folder: Path,
    parts: Path,
    pair: Pair,
    store: Store,
    trainings: Mapping[str, tuple[Crosscoder, Sequence[int]]],
    concepts: pl.DataFrame,
    members: pl.DataFrame,
    config: CausalConfig,
    advance: Callable[..., None] = lambda n, note="", total=None: None,
    ranks: Ranks = ALONE,
) -> None:
    """Write causal.parquet and causal.json into `folder`.

    Args:
        parts: folder of the finished batches, from which a killed run resumes.
        trainings: crosscoder of each training, and its live latents that are no candidates.
        concepts, members: the tables of the stage `concepts`.

    Raises:
        UserError: the store has no conversation with an answer.
    """
    sequences, _ = read_conversations(store, config.split, config.max_conversations, config.seed)
    replicated = concepts.filter("replicated")["concept"].to_list()
    means = torch.zeros(len(GROUPS) + 1, store.d_model)
    tables: list[pl.DataFrame] = []
    results: list[dict[str, Any]] = []

    def count(n: int, note: str = "", total: int | None = None) -> None:
        advance(n, note, total=len(sequences) * len(trainings))

    for name, (crosscoder, others) in trainings.items():
        arms = arms_of(members.filter(pl.col("training") == name), replicated, others, config.seed)
        patcher = Patcher(pair, crosscoder, store.layer, arms, means, store.rule, between=config.between)
        samples = measure_arms(patcher, sequences, parts / name, config, count, ranks)
        if ranks.is_first:
            tables.append(_alone(latent_results(samples[KL], arms), name))
            results += [{"training": name} | asdict(found) for found in arm_results(samples, arms) if found.span == RESPONSE]
    if ranks.is_first:
        pl.concat(tables).sort("concept", maintain_order=True).write_parquet(folder / TABLE_FILE)
        facts = {"split": config.split, "n_conversations": len(sequences), "layer": store.layer}
        write_json(folder / SUMMARY_FILE, facts | {"results": results})


def _alone(found: pl.DataFrame, training: str) -> pl.DataFrame:
    """The results of single concepts with the columns of `COLUMNS`."""
    reduction = f"kl_reduction_{RESPONSE}"
    return found.select(
        concept="latent",
        training=pl.lit(training, pl.String),
        kl_reduction=reduction,
        kl_reduction_low=f"{reduction}_low",
        kl_reduction_high=f"{reduction}_high",
        closed=f"closed_{RESPONSE}",
        conversations_changed="conversations_changed",
    )
