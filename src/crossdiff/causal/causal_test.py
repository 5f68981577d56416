"""The causal test of one crosscoder: conversations of a store in, divergences with intervals out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crossdiff.activations.store import Store
from crossdiff.causal.contribution import contributions
from crossdiff.causal.conversations import SPANS, mean_differences, read_conversations
from crossdiff.causal.interventions import DEFAULT, Arms, Experiment, make_arms, read_experiment
from crossdiff.causal.patching import Divergences, Patcher
from crossdiff.causal.results import (
    NO_CHANGE,
    Bootstrap,
    arm_results,
    comparison_results,
    latent_results,
    plain,
)
from crossdiff.config import CausalConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.files import write_json
from crossdiff.latents.groups import GROUPS
from crossdiff.latents.stream import check_fits
from crossdiff.models.pair import Pair
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Float, Tensor
from crossdiff.sources import SOURCES
from crossdiff.text.sequences import TokenSequence, bucketed

OUTPUTS = ("causal.json", "causal_conversations.parquet", "causal_latents.parquet")


def experiment_path(config: CausalConfig) -> Path:
    """The list of interventions: the given one, or that of the package."""
    return DEFAULT if config.interventions is None else Path(config.interventions)


def load_experiment(config: CausalConfig) -> Experiment:
    """The interventions and comparisons of the configured file.

    Raises:
        UserError: it cannot be read, or has no intervention called `none`.
    """
    experiment = read_experiment(experiment_path(config))
    if NO_CHANGE not in {intervention.name for intervention in experiment.interventions}:
        raise UserError(f"{experiment_path(config)} has no intervention {NO_CHANGE!r}, from which the gap is counted; add one")
    return experiment


def pool_size(config: CausalConfig, n_latents: int) -> int:
    """Number of latents that are ranked against each other."""
    return max(2, n_latents // 20) if config.pool is None else config.pool


def _arms(
    experiment: Experiment, store: Store, crosscoder: Crosscoder, table: pl.DataFrame | None, pool: int, config: CausalConfig
) -> tuple[Arms, Float[Tensor, "group d_model"]]:
    """What is measured, and the mean differences that some of it adds."""
    if table is None:
        table = contributions(store, crosscoder, config.batch_tokens)
    elif any("contribution" in intervention.rankings for intervention in experiment.interventions):
        size = contributions(store, crosscoder, config.batch_tokens).drop("n_active")
        table = table.join(size, on="latent", how="left", maintain_order="left")
    arms = make_arms(experiment, table, pool, config.seed)
    return arms, _means(store, arms, config.batch_tokens)


def _means(store: Store, arms: Arms, batch_tokens: int) -> Float[Tensor, "group d_model"]:
    if any(kind.startswith("mean_difference") for arm in arms.arms for kind in arm.others):
        return mean_differences(store, batch_tokens).float()
    return torch.zeros(len(GROUPS) + 1, store.d_model)


def _part(parts: Path, number: int) -> Path:
    return parts / f"batch-{number:05d}.safetensors"


def _measured(path: Path, patcher: Patcher, batch: list[TokenSequence]) -> Divergences:
    """The divergences of a batch, from `path` if an earlier run wrote them there."""
    if path.exists():
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}; delete it and run the same command again") from None
        return Divergences(tensors["total"], tensors["n"])
    divergences = patcher.measure(batch)
    temporary = path.with_suffix(".partial")
    save_file({"total": divergences.total.contiguous(), "n": divergences.n.contiguous()}, temporary)
    temporary.replace(path)
    return divergences


def causal_test(
    folder: Path,
    parts: Path,
    pair: Pair,
    store: Store,
    crosscoder: Crosscoder,
    table: pl.DataFrame | None,
    config: CausalConfig,
    advance: Callable[..., None] = lambda n, note="", total=None: None,
    ranks: Ranks = ALONE,
) -> None:
    """Write causal.json, causal_conversations.parquet and causal_latents.parquet into `folder`.

    Args:
        parts: where finished batches are kept; a killed run goes on after them.
        table: the latent table of this crosscoder; None for a coder of the difference, which has none.
        ranks: the processes that share the batches, all of which see the folders; the first writes the results.

    Raises:
        UserError: no conversations, a coder of other sources, a latent out of range, a wrong list of interventions.
    """
    check_fits(crosscoder, store)
    if crosscoder.view.reads != SOURCES:
        raise UserError(
            f"patching adds what chat has and base has not; this coder reads {', '.join(crosscoder.view.reads)} alone"
        )
    experiment = load_experiment(config)
    pool = pool_size(config, crosscoder.n_latents)
    # Of nearly equal latents another machine might choose others.
    arms, means = ranks.once(lambda: _arms(experiment, store, crosscoder, table, pool, config))
    conversations = read_conversations(store, config.split, config.max_conversations, config.seed)
    patcher = Patcher(pair, crosscoder, store.layer, arms.arms, means, store.leave_out)

    place = {sequence.document: index for index, sequence in enumerate(conversations.sequences)}
    total = np.zeros((len(arms.arms), len(place), len(SPANS)))
    n = np.zeros((len(place), len(SPANS)), dtype=np.int64)
    parts.mkdir(exist_ok=True)
    batches = list(enumerate(bucketed(conversations.sequences, config.batch_tokens, pool=len(place))))
    for number, batch in batches:
        if ranks.has(number):
            _measured(_part(parts, number), patcher, batch)
        advance(len(batch), total=len(place))
    ranks.wait()
    if not ranks.is_first:
        return
    for number, batch in batches:
        divergences = _measured(_part(parts, number), patcher, batch)
        where = [place[sequence.document] for sequence in batch]
        total[:, where], n[where] = divergences.total.numpy(), divergences.n.numpy()

    names = [arm.intervention for arm in arms.arms]
    bootstrap = Bootstrap(total, n, names, config.resamples, config.seed)
    _conversation_table(bootstrap, arms, conversations.sequences).write_parquet(folder / "causal_conversations.parquet")
    latent_results(bootstrap, arms.arms).write_parquet(folder / "causal_latents.parquet")
    report = {
        "layer": store.layer,
        "split": config.split,
        "n_conversations": len(place),
        "n_without_assistant": conversations.n_without_assistant,
        "n_predictions": int(n.sum()),
        "pool": pool,
        "skips_lower_layers": all(upper.skips_lower for upper in patcher.upper.values()),
        "left_out": arms.left_out,
        "arms": {arm.name: arm.latents for arm in arms.arms},
        "results": plain(arm_results(bootstrap, arms.arms)),
        "comparisons": plain(comparison_results(bootstrap, experiment.comparisons)),
    }
    write_json(folder / "causal.json", report)


def _conversation_table(bootstrap: Bootstrap, arms: Arms, sequences: tuple[TokenSequence, ...]) -> pl.DataFrame:
    """One row for each arm, conversation and span that has tokens: document, n_tokens and mean kl."""
    n_arms, n_conversations, n_spans = bootstrap.kl.shape
    documents = np.array([sequence.document for sequence in sequences])
    frame = pl.DataFrame(
        {
            "arm": np.repeat([arm.name for arm in arms.arms], n_conversations * n_spans),
            "document": np.tile(np.repeat(documents, n_spans), n_arms),
            "span": np.tile(bootstrap.spans, n_arms * n_conversations),
            "n_tokens": np.tile(bootstrap.n.ravel(), n_arms),
            "kl": bootstrap.kl.ravel(),
        }
    )
    return frame.filter(pl.col("n_tokens") > 0)
