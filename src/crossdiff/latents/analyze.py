"""The analysis of one crosscoder: one pass over the store for the tables, the examples and the held-out quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from crossdiff.activations.store import Store
from crossdiff.activations.transfer import CPU
from crossdiff.config import AnalyzeConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.metrics import HeldoutSums, frequency_histogram, health
from crossdiff.errors import UserError
from crossdiff.files import write_json
from crossdiff.latents.activity import ROW_GROUP, Activity, activity_table
from crossdiff.latents.behaviours import BASE_SAE_POOL, LIVE_POOL, Pool, behaviour_table, conversation_scores, live_latents
from crossdiff.latents.chain import emergence, of_pair, pairs_of, step_table
from crossdiff.latents.controls import random_directions, shared_latents, split_halves
from crossdiff.latents.correlated import Correlations
from crossdiff.latents.decoder import BASE_INDEX, CHAT_INDEX
from crossdiff.latents.difference import DifferenceExplained
from crossdiff.latents.example_collector import ExampleCollector
from crossdiff.latents.example_database import Strengths, write_examples
from crossdiff.latents.groups import Cells, cells_of
from crossdiff.latents.histogram import Histograms
from crossdiff.latents.latent_table import latent_table, pools
from crossdiff.latents.ranking import RANKED
from crossdiff.latents.scaling import ScalingAccumulator
from crossdiff.latents.settings import KEY, NUS
from crossdiff.latents.stream import Chunk, accumulate, blocks_of_sequences, check_fits
from crossdiff.latents.twins import NO_TWINS, CoActivation, neighbour_table, twin_candidates, twin_table
from crossdiff.latents.verdict import counts, with_verdicts
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Float, Tensor
from crossdiff.sources import SOURCES


def check_store(store: Store, config: AnalyzeConfig) -> None:
    """Check that a store has what an analysis needs, before any long work."""
    if (store.sources[0], store.sources[-1]) != SOURCES:
        found = ", ".join(store.sources)
        raise UserError(
            f"the store {store.folder} has the sources {found}; the latent table compares {' and '.join(SOURCES)}: "
            "harvest a base and a chat model"
        )
    blocks_of_sequences(store, config.blocks)
    store.rows("heldout")


def with_random_directions(crosscoder: Crosscoder, seed: int) -> Float[Tensor, "direction latent d_model"]:
    """The crosscoder's directions, then random ones with the norms of the chat directions.

    The random directions are a control: their betas must be near 0.
    """
    own = crosscoder.directions()
    # Numpy's generator: torch's with the same seed and shape would draw the directions that the decoder started from.
    random = torch.from_numpy(np.random.default_rng(seed).standard_normal(own[CHAT_INDEX].shape)).to(own)
    random *= own[CHAT_INDEX].norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
    return torch.cat([own, random.unsqueeze(0)])


class HeldoutTokens:
    """Feeds the held-out tokens of the pass to `HeldoutSums`."""

    def __init__(self, crosscoder: Crosscoder, store: Store) -> None:
        rows = store.rows("heldout")
        self.sums = HeldoutSums.empty(crosscoder, store, rows)
        self._crosscoder = crosscoder
        self._document = store.column("document")
        self._is_heldout = np.zeros(store.n_tokens, dtype=np.bool_)
        self._is_heldout[rows] = True

    def add(self, chunk: Chunk) -> None:
        code = chunk.code
        heldout = self._is_heldout[chunk.rows]
        mask = torch.from_numpy(heldout).to(chunk.x.device)
        shape = (-1, self._crosscoder.n_sources, self._crosscoder.d_model)
        active = torch.bincount(code.latent[mask[code.token]], minlength=code.n_latents)
        x, error = chunk.x[mask].view(shape), chunk.error[mask].view(shape)
        self.sums.add(self._crosscoder, self._document[chunk.rows[heldout]], x, error, active)

    def over(self, ranks: Ranks) -> HeldoutTokens:
        self.sums.over(ranks)
        return self


class Measured(NamedTuple):
    """The accumulators after the pass."""

    scaling: ScalingAccumulator
    activity: Activity
    coactive: CoActivation
    examples: ExampleCollector
    heldout: HeldoutTokens
    difference: DifferenceExplained
    histograms: Histograms
    correlations: Correlations


class Analysis(NamedTuple):
    """One crosscoder to analyse into a folder.

    Attributes:
        reference: an SAE on the base model, whose latents are compared with the crosscoder's on the behaviours.
    """

    folder: Path
    crosscoder: Crosscoder
    reference: Crosscoder | None = None


def empty(
    crosscoder: Crosscoder,
    store: Store,
    cells: Cells,
    config: AnalyzeConfig,
    directions: Float[Tensor, "direction latent d_model"],
    ranks: Ranks = ALONE,
) -> Measured:
    """The accumulators before the pass."""
    check_fits(crosscoder, store)
    device = crosscoder.encoder.device
    pairs = ranks.once(lambda: twin_candidates(crosscoder, config.twin_cosine))
    return Measured(
        ScalingAccumulator(crosscoder, config.blocks, directions, store.normalisation.mean),
        Activity.empty(cells, crosscoder.n_latents, device),
        CoActivation(pairs, crosscoder.n_latents, device),
        ExampleCollector(store, crosscoder.n_latents, config),
        HeldoutTokens(crosscoder, store),
        DifferenceExplained(crosscoder, config.blocks),
        Histograms(crosscoder.n_latents, device),
        Correlations(crosscoder.n_latents, int(store.counted.sum()), config.seed),
    )


def measure(
    crosscoder: Crosscoder,
    store: Store,
    cells: Cells,
    config: AnalyzeConfig,
    directions: Float[Tensor, "direction latent d_model"],
    advance: Callable[[int], None] = lambda n_tokens: None,
    ranks: Ranks = ALONE,
) -> Measured:
    """Run the pass for one crosscoder; with several ranks, the first one gets the merged results."""
    measured = empty(crosscoder, store, cells, config, directions, ranks)
    accumulate([(crosscoder, measured)], store, config.blocks, config.batch_tokens, advance, ranks)
    return measured


def analyze(
    analyses: Sequence[Analysis],
    store: Store,
    tokenizer: Any,
    config: AnalyzeConfig,
    advance: Callable[[int], None] = lambda n_tokens: None,
    ranks: Ranks = ALONE,
) -> None:
    """Write the files of `crossdiff.stages.definitions.ANALYSIS` into the folder of each analysis, in one pass over the store.

    Args:
        ranks: the processes that share the pass; the first one writes.
    """
    check_store(store, config)
    cells = cells_of(store, tokenizer)
    passes = [
        (coder, empty(coder, store, cells, config, with_random_directions(coder, config.seed), ranks))
        for _, coder, _ in analyses
    ]
    accumulate(passes, store, config.blocks, config.batch_tokens, advance, ranks)
    if ranks.is_first:
        for analysis, (_, measured) in zip(analyses, passes, strict=True):
            _write(analysis, measured, store, tokenizer, config)


def _write(analysis: Analysis, measured: Measured, store: Store, tokenizer: Any, config: AnalyzeConfig) -> None:
    folder, crosscoder, reference = analysis
    on_host = crosscoder.to(CPU)
    neighbour_table(crosscoder, measured.scaling.sums.n.sum(0) > 0).write_parquet(folder / "neighbours.parquet")
    table = _write_tables(folder, on_host, measured, store.sources, config)
    correlations = measured.correlations
    strengths = Strengths(measured.histograms.rows(), correlations.rows(), correlations.n_tokens)
    write_examples(folder / "examples.sqlite", *measured.examples.finish(), store, tokenizer, crosscoder.n_latents, strengths)
    measured.scaling.sums.save(folder / "scaling.safetensors")
    made_with = {KEY: config.model_dump(), NUS: list(RANKED)}
    write_json(folder / "health.json", _health_report(on_host, store, measured, table) | made_with)
    scored = {}
    for name, (coder, latents) in _pools(crosscoder, reference, store, table, config).items():
        conversations = conversation_scores(coder, store, latents, config.batch_tokens)
        if conversations is not None:
            scored[name] = Pool(latents, conversations)
    behaviour_table(scored, config.seed).write_parquet(folder / "behaviours.parquet")


def _pools(
    crosscoder: Crosscoder, reference: Crosscoder | None, store: Store, table: pl.DataFrame, config: AnalyzeConfig
) -> dict[str, tuple[Crosscoder, list[int]]]:
    """The equally large pools of the behaviours with their coders; a single pool for a coder with one decoder."""
    if crosscoder.n_sources == 1:
        return {LIVE_POOL: (crosscoder, live_latents(crosscoder, store, config.pool_size, config))}
    found = {name: (crosscoder, latents) for name, latents in pools(table, config.pool_size, config.seed).items()}
    if reference is not None:
        size = min(len(latents) for _, latents in found.values())
        found[BASE_SAE_POOL] = (reference, live_latents(reference, store, size, config))
    return found


def _write_tables(
    folder: Path, crosscoder: Crosscoder, measured: Measured, sources: tuple[str, ...], config: AnalyzeConfig
) -> pl.DataFrame:
    """Write the tables of latents, twins and activity, and of a chain's steps; return the latent table.

    Args:
        sources: the models of the store.
    """
    sums = measured.scaling.sums
    n_active = sums.n.sum(0)
    twins = twin_table(crosscoder, measured.coactive, n_active)
    twins.write_parquet(folder / "twins.parquet")
    activity_table(measured.activity).write_parquet(folder / "activity.parquet", row_group_size=ROW_GROUP)
    table = latent_table(*of_pair(crosscoder, sums, BASE_INDEX, CHAT_INDEX), measured.activity, config)
    table = with_verdicts(table, twins.filter(pl.col("n_both") > 0), config)
    if len(sources) > 2 and crosscoder.sources == sources:
        chain = _chain(crosscoder, measured, config)
        chain.write_parquet(folder / "chain.parquet")
        table = table.join(emergence(chain, sources), on="latent", maintain_order="left")
    table.write_parquet(folder / "latents.parquet")
    return table


def _chain(crosscoder: Crosscoder, measured: Measured, config: AnalyzeConfig) -> pl.DataFrame:
    """What each step of a chain does to each latent; see `crossdiff.latents.chain.COLUMNS`."""
    tables, sources = [], crosscoder.sources
    for before, after in pairs_of(sources):
        pair = of_pair(crosscoder, measured.scaling.sums, sources.index(before), sources.index(after))
        judged = with_verdicts(latent_table(*pair, measured.activity, config), NO_TWINS, config)
        tables.append(step_table(judged, before, after))
    return pl.concat(tables)


def _health_report(crosscoder: Crosscoder, store: Store, measured: Measured, table: pl.DataFrame) -> dict[str, Any]:
    ends = of_pair(crosscoder, measured.scaling.sums, BASE_INDEX, CHAT_INDEX)
    return {
        "architecture": crosscoder.sparsity.kind,
        "sources": list(crosscoder.sources),
        "n_latents": crosscoder.n_latents,
        "d_model": crosscoder.d_model,
        "layer": store.layer,
        "k": getattr(crosscoder.sparsity, "k", None),
        "training_tokens": crosscoder.origin["training_tokens"],
        "analysed_tokens": int(measured.activity.tokens.sum()),
        "difference_explained": asdict(measured.difference.estimate()) if crosscoder.n_sources > 1 else None,
        "heldout": health(crosscoder, measured.heldout.sums),
        "frequency_histogram": frequency_histogram(measured.heldout.sums),
        "decoder_norm_movement": _norm_movement(crosscoder),
        "counts": counts(table),
        "controls": {
            **random_directions(*ends, ends[0].n_sources),
            "shared_latents": shared_latents(table),
            "split_halves": split_halves(*ends, table),
        },
    }


def _norm_movement(crosscoder: Crosscoder) -> dict[str, Any]:
    """Quantiles of the decoder norms and, if it is known, the norm at the start of training: have they had time to vanish?"""
    norms = crosscoder.norms()
    quantiles = torch.tensor([0.01, 0.5, 0.99])
    at_start = crosscoder.origin["settings"].get("decoder_norm")  # not known of published crosscoders
    moved: dict[str, Any] = {} if at_start is None else {"at_start": float(at_start)}
    for index, name in enumerate(crosscoder.sources):
        moved[name] = torch.quantile(norms[:, index], quantiles).tolist()
    smaller = norms.min(1).values / norms.max(1).values.clamp(min=1e-12)
    return moved | {"smaller_over_larger": torch.quantile(smaller, quantiles).tolist(), "quantiles": quantiles.tolist()}
