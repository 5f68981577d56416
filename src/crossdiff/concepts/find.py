"""Find the concepts of a run: group the candidates of its trainings, and describe each group (docs/concepts.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file

from crossdiff.activations.store import Store
from crossdiff.concepts.agreement import Halves, Pool, cut_table, halves
from crossdiff.concepts.candidates import Codes, Training
from crossdiff.concepts.clustering import Grouping, group, needed
from crossdiff.concepts.coder import coded
from crossdiff.concepts.completeness import Completeness
from crossdiff.concepts.concept_table import (
    concept_table,
    judged,
    member_table,
    neighbour_table,
    training_table,
)
from crossdiff.concepts.group_scaling import GroupProducts, group_table, pooled
from crossdiff.concepts.labels import label_columns, labels
from crossdiff.concepts.similarity import Similarity, matrix_of
from crossdiff.config import AnalyzeConfig, ConceptsConfig
from crossdiff.files import replacing, write_json
from crossdiff.latents.activity import ROW_GROUP, Activity, activity_table
from crossdiff.latents.behaviours import ConversationScores, behaviour_table
from crossdiff.latents.behaviours import Pool as BehaviourPool
from crossdiff.latents.chain import emergence, pairs_of, step_table
from crossdiff.latents.decoder import BASE_INDEX, CHAT_INDEX
from crossdiff.latents.example_collector import ExampleCollector
from crossdiff.latents.example_database import Strengths, write_examples
from crossdiff.latents.groups import Cells, cells_of
from crossdiff.latents.histogram import Histograms
from crossdiff.latents.stream import read_blocks
from crossdiff.models.pair import Pair
from crossdiff.models.promoted_tokens import promoted_table
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Float64, Tensor

CONCEPTS_FILE, MEMBERS_FILE, TRAININGS_FILE, SUMMARY_FILE = (
    "concepts.parquet", "members.parquet", "trainings.parquet", "concepts.json",
)  # fmt: skip
OUTPUTS = (
    CONCEPTS_FILE, MEMBERS_FILE, TRAININGS_FILE, SUMMARY_FILE, "activity.parquet", "behaviours.parquet", "examples.sqlite",
    "promoted.parquet", "neighbours.parquet", "directions.safetensors",
)  # fmt: skip
"""Files in the folder `concepts` of a run."""
CHAIN_FILE = "chain.parquet"
"""A further file if the run has more than two models."""
POOL = "concepts"
"""Pool of the behaviours: the replicated concepts."""


@dataclass(frozen=True)
class Settings:
    """Settings of the stage: those of its own, and those of the analysis, whose limits also apply to groups."""

    concepts: ConceptsConfig
    analyze: AnalyzeConfig


class Described(NamedTuple):
    """The accumulators of the second pass."""

    activity: Activity
    examples: ExampleCollector
    conversations: ConversationScores
    products: GroupProducts
    completeness: Completeness
    histograms: Histograms
    halves: Halves | None


def find_concepts(
    folder: Path,
    trainings: Sequence[Training],
    store: Store,
    pair: Pair,
    settings: Settings,
    advance: Callable[[int], None] = lambda n_tokens: None,
    ranks: Ranks = ALONE,
) -> None:
    """Write the files of `OUTPUTS` into `folder`, from two passes over the store that encode the candidates only.

    Args:
        trainings: analysed trainings of one store; at least one.
        ranks: the processes that share the passes; the first one writes.

    Raises:
        UserError: a training was not made on this store.
    """
    config = settings.analyze
    codes = Codes(trainings, store)
    similarity = Similarity(codes, config.seed)
    for read in read_blocks(store, config.blocks, config.batch_tokens, advance, ranks, codes.device):
        similarity.add(read)
    similarity.over(ranks)
    pool = Pool(
        training=codes.training,
        energy=torch.cat([training.energy for training in trainings]).numpy(),
        specific=np.concatenate([(training.table["verdict"] == "chat_specific").to_numpy() for training in trainings]),
    )
    everything = list(range(len(trainings)))
    grouping, r, permuted = ranks.once(lambda: _grouped(similarity, pool, everything, settings.concepts))
    described = _empty(codes, grouping, pool, r, cells_of(store, pair.tokenizer), store, settings)
    weights = grouping.weights(codes.training)
    for read in read_blocks(store, config.blocks, config.batch_tokens, advance, ranks, codes.device):
        inputs = codes.inputs(read)
        found = codes.of_inputs(inputs)
        f = matrix_of(found, codes.first, [code.values for code in found])
        v = matrix_of(found, codes.first, codes.v(found))
        chunk = coded(read, v @ weights)
        for accumulator in (described.activity, described.examples, described.conversations, described.histograms):
            accumulator.add(chunk)
        described.products.add(read.block, f)
        described.completeness.add(read, inputs, found)
        if described.halves is not None:
            described.halves.add(read.block, v)
    for part in described:
        if part is not None:
            part.over(ranks)
    if ranks.is_first:
        _write(folder, codes, grouping, pool, described, similarity, store, pair, settings)
        names = [training.name for training in trainings]
        agreement = None if described.halves is None else described.halves.results(names, config.seed)
        write_json(folder / SUMMARY_FILE, {
            "trainings": [{"name": t.name, "kind": t.kind, "seed": t.crosscoder.origin["settings"].get("seed"),
                           "batch_seed": _order_seed(t), "n_candidates": len(t.latents)} for t in trainings],
            "correlation": settings.concepts.correlation,
            "needed": needed(len(trainings), settings.concepts.replicated) if len(trainings) > 1 else None,
            "n_tokens": similarity.products.n,
            "cuts": cut_table(r, permuted, pool, everything, settings.concepts),
            "halves": agreement,
            "completeness": described.completeness.results(),
        })  # fmt: skip


def _order_seed(training: Training) -> int | None:
    """Seed of the order of the batches; that of a published crosscoder is not known."""
    own: dict[str, Any] = training.crosscoder.origin["settings"]
    found: int | None = own.get("batch_seed")
    return own.get("seed") if found is None else found


def _grouped(similarity: Similarity, pool: Pool, trainings: list[int], config: ConceptsConfig) -> tuple[Grouping, Any, Any]:
    """The concepts, replicated ones first, then those of most energy; and the correlations, also of permuted documents."""
    r = similarity.products.pairs()
    found = group(r, pool.training, np.array(trainings), config.correlation, config.replicated)
    energy = pool.of_concepts(pool.shares(np.ones_like(pool.specific)), found)
    order = np.lexsort((-energy, ~found.replicated))
    return found.reordered(order), r, similarity.permuted.pairs()


def _empty(codes: Codes, grouping: Grouping, pool: Pool, r: Any, cells: Cells, store: Store, settings: Settings) -> Described:
    config, n = settings.analyze, grouping.n_concepts
    sets = halves(range(len(codes.trainings)))
    return Described(
        Activity.empty(cells, n),
        ExampleCollector(store, n, config),
        ConversationScores(store, n),
        GroupProducts(codes, grouping, config.blocks),
        Completeness(codes, grouping, config.blocks, config.seed),
        Histograms(n),
        None if sets is None else Halves(r, pool, sets, settings.concepts, config.blocks),
    )


def _write(
    folder: Path,
    codes: Codes,
    grouping: Grouping,
    pool: Pool,
    described: Described,
    similarity: Similarity,
    store: Store,
    pair: Pair,
    settings: Settings,
) -> None:
    """Write the tables, the examples and the directions."""
    config, tokenizer = settings.analyze, pair.tokenizer
    candidates, picks = described.examples.finish()
    strengths = Strengths(described.histograms.rows())
    write_examples(folder / "examples.sqlite", candidates, picks, store, tokenizer, grouping.n_concepts, strengths)
    named = label_columns(labels(candidates, picks, store, tokenizer), grouping.n_concepts)
    sums = [described.products.sums(t) for t in range(len(codes.trainings))]
    table = concept_table(codes, grouping, pool, sums, described.activity, config).hstack(named)
    if len(store.sources) > 2:
        chain = _chain(described.products, codes, table, store.sources, config)
        chain.rename({"latent": "concept"}).write_parquet(folder / CHAIN_FILE)
        first = emergence(chain, store.sources).rename({"latent": "concept"})
        table = table.join(first, on="concept", how="left", maintain_order="left")
    table.write_parquet(folder / CONCEPTS_FILE)
    member_table(codes, grouping, pool, similarity.products).write_parquet(folder / MEMBERS_FILE)
    neighbour_table(grouping, codes, similarity.products).write_parquet(folder / "neighbours.parquet")
    training_table(codes, grouping, pool, sums, config).write_parquet(folder / TRAININGS_FILE)
    activity = activity_table(described.activity).rename({"latent": "concept"})
    activity.write_parquet(folder / "activity.parquet", row_group_size=ROW_GROUP)
    _behaviours(described.conversations, grouping, config.seed, folder / "behaviours.parquet")
    directions = mean_contributions(codes, grouping)
    with replacing(folder / "directions.safetensors") as partial:
        save_file({"directions": directions.float().contiguous()}, partial)
    base, chat = directions[BASE_INDEX], directions[CHAT_INDEX]
    promoted = promoted_table(pair, base, chat, torch.arange(grouping.n_concepts), "concept")
    promoted.write_parquet(folder / "promoted.parquet")


def _chain(
    products: GroupProducts, codes: Codes, table: pl.DataFrame, sources: tuple[str, ...], config: AnalyzeConfig
) -> pl.DataFrame:
    """What each step of a chain does to each concept, as `crossdiff.latents.chain` says of latents."""
    tables = []
    for before, after in pairs_of(sources):
        ends = (sources.index(before), sources.index(after))
        sums = pooled([products.sums(t, *ends) for t in range(len(codes.trainings))])
        found = judged(group_table(sums, config), table["share_template"], config).with_row_index("latent")
        tables.append(step_table(found, before, after))
    return pl.concat(tables)


def _behaviours(scores: ConversationScores, grouping: Grouping, seed: int, path: Path) -> None:
    """Which replicated concept predicts each behaviour best, chosen on the training conversations."""
    pools = {}
    replicated = np.flatnonzero(grouping.replicated)
    if scores.found_any and len(replicated):
        found = scores.finish()
        kept = {question: values[:, replicated] for question, values in found.scores.items()}
        conversations = type(found)(found.labels, found.prompts, found.heldout, kept)
        pools = {POOL: BehaviourPool(replicated.tolist(), conversations)}
    behaviour_table(pools, seed).rename({"latent": "concept"}).write_parquet(path)


def mean_contributions(codes: Codes, grouping: Grouping) -> Float64[Tensor, "source concept d_model"]:
    """Mean over trainings of sum_j sum_i f_ij d_j / n over the members, in the models' own space."""
    n_sources, d_model = codes.trainings[0].crosscoder.n_sources, codes.trainings[0].crosscoder.d_model
    total = torch.zeros(n_sources, grouping.n_concepts, d_model, dtype=torch.float64)
    for t, training in enumerate(codes.trainings):
        concept = torch.from_numpy(grouping.concept[codes.candidates_of(t)])
        f = training.sums.f.sum(0) / training.sums.n.sum(0).clamp(min=1)
        coder = training.crosscoder
        parts = coder.directions()[:, training.latents].cpu().double() * f.unsqueeze(1) / coder.scale
        kept = concept >= 0
        total.index_add_(1, concept[kept], parts[:, kept])
    return total / torch.from_numpy(np.maximum(grouping.n_trainings, 1)).unsqueeze(1)
