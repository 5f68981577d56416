"""The analysis of one crosscoder: one pass over the store for the table, the examples and the held-out quality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.metrics import HeldoutSums, frequency_histogram, health
from crossdiff.errors import UserError
from crossdiff.files import write_json
from crossdiff.latents.activity import Activity, group_of
from crossdiff.latents.behaviours import LIVING, REFERENCE, Pool, behaviour_table, conversation_scores, living_latents
from crossdiff.latents.controls import random_directions, shared_latents, split_halves
from crossdiff.latents.decoder import CHAT
from crossdiff.latents.example_collector import ExampleCollector
from crossdiff.latents.example_database import write_examples
from crossdiff.latents.groups import ROW_GROUP, Cells, GroupActivity, activity_table, cells_of
from crossdiff.latents.latent_table import latent_table, pools
from crossdiff.latents.scaling import ScalingAccumulator, Sums
from crossdiff.latents.stream import Chunk, blocks_of_sequences, check_fits, chunks
from crossdiff.latents.twins import CoActivation, candidates, neighbour_table, twin_table
from crossdiff.latents.verdict import counts, with_verdicts
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Float, Tensor

RANDOM = -1
"""Index of the control among the directions that the pass measures, after those of base and chat."""


def with_random_directions(crosscoder: Crosscoder, seed: int) -> Float[Tensor, "direction latent d_model"]:
    """The crosscoder's directions, and random ones of the chat directions' norms: the control whose betas must be near 0."""
    own = crosscoder.directions()
    # numpy's stream: torch's with the same seed and shape gave the directions that the decoder started from.
    random = torch.from_numpy(np.random.default_rng(seed).standard_normal(own[CHAT].shape)).float()
    random *= own[CHAT].norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
    return torch.cat([own, random.unsqueeze(0)])


def check_store(store: Store, config: AnalyzeConfig) -> None:
    """Whether a store has what an analysis needs, found out before any long work.

    Raises:
        UserError: other sources than a base and a chat model, fewer documents than blocks, or nothing held out.
    """
    if store.sources != ("base", "chat"):
        found = ", ".join(store.sources)
        raise UserError(f"the latent table compares a base and a chat model; the store {store.folder} has {found}")
    blocks_of_sequences(store, config.blocks)
    store.rows("heldout")


@dataclass
class Measured:
    """What the pass leaves."""

    sums: Sums
    activity: Activity
    by_group: GroupActivity
    coactive: CoActivation
    examples: ExampleCollector
    heldout: HeldoutSums

    def over(self, ranks: Ranks) -> Measured:
        """Merge the passes of several ranks over disjoint tokens."""
        return Measured(*(getattr(self, field.name).over(ranks) for field in fields(self)))


def measure(
    crosscoder: Crosscoder,
    store: Store,
    cells: Cells,
    config: AnalyzeConfig,
    directions: Float[Tensor, "direction latent d_model"],
    advance: Callable[[int], None] = lambda n_tokens: None,
    ranks: Ranks = ALONE,
) -> Measured:
    """The pass: every counted token is read and encoded once, by one of the ranks. The first gets what all have found.

    Raises:
        UserError: as `analyze`; of what the store lacks, before the pass.
    """
    check_fits(crosscoder, store)
    groups, norms = group_of(store.column("flags")), crosscoder.norms().sum(1)
    document, heldout_rows = store.column("document"), store.rows("heldout")
    is_heldout = np.zeros(store.n_tokens, dtype=np.bool_)
    is_heldout[heldout_rows] = True
    accumulator = ScalingAccumulator(crosscoder, config.blocks, directions, store.normalisation.mean)
    activity, examples = Activity.empty(crosscoder.n_latents), ExampleCollector(store, crosscoder.n_latents, config)
    by_group = GroupActivity.empty(cells.table.height, crosscoder.n_latents)
    coactive = CoActivation(ranks.once(lambda: candidates(crosscoder, config.twin_cosine)), crosscoder.n_latents)
    heldout = HeldoutSums.empty(crosscoder, store, heldout_rows)
    for chunk in chunks(crosscoder, store, config.blocks, config.batch_tokens, advance, ranks):
        accumulator.add(chunk)
        activity.add(chunk, groups[chunk.rows], norms)
        by_group.add(chunk, cells, norms)
        coactive.add(chunk)
        examples.add(chunk, norms)
        _add_heldout(heldout, crosscoder, chunk, document, is_heldout[chunk.rows])
    return Measured(accumulator.finish(), activity, by_group, coactive, examples, heldout).over(ranks)


def _add_heldout(
    heldout: HeldoutSums,
    crosscoder: Crosscoder,
    chunk: Chunk,
    document: npt.NDArray[np.int32],
    member: npt.NDArray[np.bool_],
) -> None:
    """Add those tokens of a chunk that are held out."""
    mask, code = torch.from_numpy(member), chunk.code
    shape = (-1, crosscoder.n_sources, crosscoder.d_model)
    x, error = chunk.x[mask].view(shape), chunk.error[mask].view(shape)
    active = torch.bincount(code.latent[mask[code.token]], minlength=code.n_latents)
    heldout.add(crosscoder, document[chunk.rows[member]], x, error, active)


def analyze(
    folder: Path,
    crosscoder: Crosscoder,
    store: Store,
    tokenizer: Any,
    config: AnalyzeConfig,
    advance: Callable[[int], None] = lambda n_tokens: None,
    reference: Crosscoder | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write the files of `crossdiff.stages.definitions.ANALYSIS` into `folder`.

    Args:
        ranks: the processes that share the passes; the first writes.
        reference: an SAE on the base model; a pool of its latents is put beside those of a crosscoder on the behaviours.

    Raises:
        UserError: the crosscoder does not fit the store; the store has too few documents for the blocks, no held-out tokens,
            or activations that are not finite.
    """
    check_store(store, config)
    directions, cells = with_random_directions(crosscoder, config.seed), cells_of(store, tokenizer)
    measured = measure(crosscoder, store, cells, config, directions, advance, ranks)
    if not ranks.is_first:
        return
    table = _write_tables(folder, crosscoder, measured, cells, config)
    write_examples(folder / "examples.sqlite", *measured.examples.finish(), store, tokenizer, crosscoder.n_latents)
    write_json(folder / "health.json", _health_report(crosscoder, store, measured, table, directions))

    scored = {}
    for name, (coder, latents) in _chosen(crosscoder, reference, store, table, config).items():
        conversations = conversation_scores(coder, store, latents, config.batch_tokens)
        if conversations is not None:
            scored[name] = Pool(latents, conversations)
    behaviour_table(scored, config.seed).write_parquet(folder / "behaviours.parquet")


def _chosen(
    crosscoder: Crosscoder, reference: Crosscoder | None, store: Store, table: pl.DataFrame, config: AnalyzeConfig
) -> dict[str, tuple[Crosscoder, list[int]]]:
    """The pools of the behaviours, equally large, each with its coder; one of a coder with one decoder, which ranks nothing."""
    if crosscoder.n_sources == 1:
        return {LIVING: (crosscoder, living_latents(crosscoder, store, config.pool_size, config))}
    found = {name: (crosscoder, latents) for name, latents in pools(table, config.pool_size, config.seed).items()}
    if reference is not None:
        size = min(len(latents) for _, latents in found.values())
        found[REFERENCE] = (reference, living_latents(reference, store, size, config))
    return found


def _write_tables(
    folder: Path, crosscoder: Crosscoder, measured: Measured, cells: Cells, config: AnalyzeConfig
) -> pl.DataFrame:
    """Write the tables of latents, twins, neighbours and token groups; returns that of latents."""
    n_active = measured.sums.n.sum(0)
    twins = twin_table(crosscoder, measured.coactive, n_active)
    twins.write_parquet(folder / "twins.parquet")
    activity_table(measured.by_group, cells).write_parquet(folder / "activity.parquet", row_group_size=ROW_GROUP)
    neighbour_table(crosscoder, n_active > 0).write_parquet(folder / "neighbours.parquet")
    table = latent_table(crosscoder, measured.sums, measured.activity, config)
    table = with_verdicts(table, twins.filter(pl.col("n_both") > 0), config)
    table.write_parquet(folder / "latents.parquet")
    return table


def _health_report(
    crosscoder: Crosscoder,
    store: Store,
    measured: Measured,
    table: pl.DataFrame,
    directions: Float[Tensor, "direction latent d_model"],
) -> dict[str, Any]:
    return {
        "architecture": crosscoder.sparsity.kind,
        "sources": list(crosscoder.sources),
        "n_latents": crosscoder.n_latents,
        "d_model": crosscoder.d_model,
        "layer": store.layer,
        "k": getattr(crosscoder.sparsity, "k", None),
        "training_tokens": crosscoder.origin["training_tokens"],
        "analysed_tokens": int(measured.activity.tokens.sum()),
        "heldout": health(crosscoder, measured.heldout),
        "frequency_histogram": frequency_histogram(measured.heldout),
        "decoder_norm_movement": _norm_movement(crosscoder),
        "counts": counts(table),
        "controls": {
            **random_directions(crosscoder, measured.sums, RANDOM, directions),
            "shared_latents": shared_latents(table),
            "split_halves": split_halves(crosscoder, measured.sums, table),
        },
    }


def _norm_movement(crosscoder: Crosscoder) -> dict[str, Any]:
    """Quantiles of the decoder norms beside the norm that all started with: have they had time to vanish?"""
    start = float(crosscoder.origin["settings"]["decoder_norm"])
    quantiles = torch.tensor([0.01, 0.5, 0.99])
    moved: dict[str, Any] = {"at_start": start}
    for index, name in enumerate(crosscoder.sources):
        moved[name] = torch.quantile(crosscoder.norms()[:, index], quantiles).tolist()
    smaller = crosscoder.norms().min(1).values / crosscoder.norms().max(1).values.clamp(min=1e-12)
    return moved | {"smaller_over_larger": torch.quantile(smaller, quantiles).tolist(), "quantiles": quantiles.tolist()}
