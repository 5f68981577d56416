"""Are planted chat-only concepts found as one concept each? The concepts of several trainings against the truth."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.activations.store import Store
from crossdiff.concepts.candidates import Codes, Training
from crossdiff.concepts.clustering import group
from crossdiff.concepts.concept_table import judged
from crossdiff.concepts.group_scaling import GroupProducts, group_table, pooled
from crossdiff.concepts.similarity import Similarity, matrix_of
from crossdiff.config import AnalyzeConfig, ConceptsConfig
from crossdiff.latents.stream import read_blocks


@dataclass(frozen=True)
class ConceptScore:
    """How well the replicated concepts with verdict chat_specific find the planted chat-only concepts.

    Attributes:
        trainings: number of trainings.
        n_called: such concepts whose members stand for a planted concept; n_unmatched: those whose members stand for none.
        precision: share of the called ones whose planted concept is chat-only; NaN when none is called.
        recall: share of the planted chat-only concepts that a called one stands for.
        n_split: called ones beyond the first for the same planted concept.
        wrong: number of wrongly called ones by the kind of their planted concept.
    """

    trainings: int
    n_called: int
    n_unmatched: int
    precision: float
    recall: float
    n_split: int
    wrong: dict[str, int]


def concept_score(
    trainings: Sequence[Training],
    matched: Sequence[pl.DataFrame],
    n_chat_only: int,
    store: Store,
    config: AnalyzeConfig,
    concepts: ConceptsConfig,
) -> ConceptScore:
    """Group the candidates of the trainings as a run does, and score the groups.

    Args:
        matched: latent table of each training with `concept` and `kind`, see `benchmark`.
        n_chat_only: number of planted chat-only concepts.
    """
    codes = Codes(trainings, store)
    similarity = Similarity(codes, config.seed)
    for read in read_blocks(store, config.blocks, config.batch_tokens, device=codes.device):
        similarity.add(read)
    used = np.arange(len(trainings))
    grouping = group(similarity.products.pairs(), codes.training, used, concepts.correlation, concepts.replicated)
    products = GroupProducts(codes, grouping, config.blocks)
    for read in read_blocks(store, config.blocks, config.batch_tokens, device=codes.device):
        found = codes.of(read)
        products.add(read.block, matrix_of(found, codes.first, [code.values for code in found]))
    table = group_table(pooled([products.sums(t) for t in range(len(trainings))]), config)
    verdicts = judged(table, pl.Series("share_template", np.zeros(table.height)), config)["verdict"].to_numpy()
    stands_for = np.concatenate([
        own["concept"].to_numpy()[training.latents.numpy()] for training, own in zip(trainings, matched, strict=True)
    ])  # fmt: skip
    kind_of = {concept: kind for own in matched for concept, kind in own.select("concept", "kind").iter_rows()}
    called = np.flatnonzero(grouping.replicated & (verdicts == "chat_specific"))
    truths = [truth for truth in (_truth(stands_for[grouping.concept == number]) for number in called) if truth >= 0]
    right = [truth for truth in truths if kind_of[truth] == "chat_only"]
    return ConceptScore(
        trainings=len(trainings),
        n_called=len(truths),
        n_unmatched=len(called) - len(truths),
        precision=len(right) / len(truths) if truths else math.nan,
        recall=len(set(right)) / n_chat_only,
        n_split=len(truths) - len(set(truths)),
        wrong=dict(Counter(kind_of[truth] for truth in truths if kind_of[truth] != "chat_only")),
    )


def _truth(members: npt.NDArray[np.int64]) -> int:
    """The planted concept that most members stand for; -1 if half of them or more stand for none."""
    known = members[members >= 0]
    if 2 * len(known) <= len(members):
        return -1
    return int(Counter(known.tolist()).most_common(1)[0][0])
