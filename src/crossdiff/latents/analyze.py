"""The analysis of one crosscoder: one pass for the table, a second one for the contexts that are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig, BatchTopKConfig, UserError
from crossdiff.crosscoder.metrics import frequency_histogram, health, heldout_sums
from crossdiff.crosscoder.model import Crosscoder
from crossdiff.latents.activity import Activity, group_of
from crossdiff.latents.behaviours import behaviour_table, conversation_scores
from crossdiff.latents.controls import random_directions, shared_latents, split_halves
from crossdiff.latents.examples import ExampleCollector, write_examples
from crossdiff.latents.groups import GroupActivity, activity_table, cells_of
from crossdiff.latents.scaling import ScalingAccumulator
from crossdiff.latents.stream import chunks
from crossdiff.latents.table import CHAT, latent_table, pools
from crossdiff.latents.twins import CoActivation, candidates, neighbour_table, twin_table
from crossdiff.latents.verdict import counts, with_verdicts
from crossdiff.run import write_json
from crossdiff.shapes import Float, Tensor

RANDOM = 2
"""Index of the control among the directions that the pass measures, after those of base and chat."""


def with_random_directions(crosscoder: Crosscoder, seed: int) -> Float[Tensor, "direction latent d_model"]:
    """The crosscoder's directions, and random ones of the chat directions' norms: the control whose betas must be near 0."""
    own = crosscoder.directions()
    # numpy's stream: torch's with the same seed and shape gave the directions that the decoder started from.
    random = torch.from_numpy(np.random.default_rng(seed).standard_normal(own[CHAT].shape)).float()
    random *= own[CHAT].norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
    return torch.cat([own, random.unsqueeze(0)])


def analyze(
    folder: Path,
    crosscoder: Crosscoder,
    store: Store,
    tokenizer: Any,
    config: AnalyzeConfig,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> None:
    """Write the files of `crossdiff.pipeline.ANALYSIS` into `folder`.

    Raises:
        UserError: the crosscoder does not fit the store, or the store has too few documents for the blocks.
    """
    if crosscoder.n_sources != 2:
        raise UserError(f"the latent table compares two models; this coder reads {crosscoder.n_sources}")
    groups, norms = group_of(store.column("flags")), crosscoder.norms().sum(1)
    directions = with_random_directions(crosscoder, config.seed)
    accumulator = ScalingAccumulator(crosscoder, config.blocks, directions)
    activity, collector = Activity.empty(crosscoder.n_latents), ExampleCollector(crosscoder.n_latents, config)
    coactive = CoActivation(candidates(crosscoder, config.twin_cosine), crosscoder.n_latents)
    cells = cells_of(store, tokenizer)
    by_group = GroupActivity.empty(cells.table.height, crosscoder.n_latents)
    for chunk in chunks(crosscoder, store, config.blocks, config.batch_tokens, advance):
        accumulator.add(chunk)
        activity.add(chunk, groups[chunk.rows], norms)
        collector.add(chunk, norms)
        coactive.add(chunk)
        by_group.add(chunk, cells, norms)
    sums = accumulator.finish()
    n_active = sums.n.sum(0)
    twins = twin_table(crosscoder, coactive, n_active)
    twins.write_parquet(folder / "twins.parquet")
    activity_table(by_group, cells).write_parquet(folder / "activity.parquet")
    neighbour_table(crosscoder, n_active > 0).write_parquet(folder / "neighbours.parquet")
    table = with_verdicts(latent_table(crosscoder, sums, activity, config), twins.filter(pl.col("n_both") > 0), config)
    table.write_parquet(folder / "latents.parquet")
    write_examples(folder / "examples.sqlite", crosscoder, store, tokenizer, collector, config, advance)

    heldout = heldout_sums(crosscoder, store, "heldout", config.batch_tokens)
    health_report = {
        "architecture": crosscoder.sparsity.kind,
        "n_latents": crosscoder.n_latents,
        "d_model": crosscoder.d_model,
        "layer": store.layer,
        "k": crosscoder.sparsity.k if isinstance(crosscoder.sparsity, BatchTopKConfig) else None,
        "training_tokens": crosscoder.origin["training_tokens"],
        "analysed_tokens": int(activity.tokens.sum()),
        "heldout": health(crosscoder, heldout),
        "frequency_histogram": frequency_histogram(heldout),
        "decoder_norm_movement": _norm_movement(crosscoder),
        "counts": counts(table),
        "controls": {
            **random_directions(crosscoder, sums, RANDOM, directions),
            "shared_latents": shared_latents(table),
            "split_halves": split_halves(crosscoder, sums, table),
        },
    }
    write_json(folder / "health.json", health_report)

    chosen = pools(table, config.pool_size, config.seed)
    latents = sorted({latent for members in chosen.values() for latent in members})
    conversations = conversation_scores(crosscoder, store, latents, config.batch_tokens)
    behaviour_table(conversations, chosen, latents, config.seed).write_parquet(folder / "behaviours.parquet")


def _norm_movement(crosscoder: Crosscoder) -> dict[str, Any]:
    """Quantiles of the decoder norms beside the norm that all started with: have they had time to vanish?"""
    start = float(crosscoder.origin["settings"]["decoder_norm"])
    quantiles = torch.tensor([0.01, 0.5, 0.99])
    moved: dict[str, Any] = {"at_start": start}
    for index, name in enumerate(crosscoder.sources):
        moved[name] = torch.quantile(crosscoder.norms()[:, index], quantiles).tolist()
    smaller = crosscoder.norms().min(1).values / crosscoder.norms().max(1).values.clamp(min=1e-12)
    return moved | {"smaller_over_larger": torch.quantile(smaller, quantiles).tolist(), "quantiles": quantiles.tolist()}
