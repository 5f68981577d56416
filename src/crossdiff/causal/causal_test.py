"""The causal test of one crosscoder: from the conversations of a store to KL with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crossdiff.activations.store import Store
from crossdiff.causal.contribution import contributions
from crossdiff.causal.conversations import SPANS, mean_differences, principal_directions, read_conversations
from crossdiff.causal.interventions import (
    DEFAULT,
    Arms,
    Experiment,
    MeanDifferencePart,
    PrincipalPart,
    make_arms,
    read_experiment,
)
from crossdiff.causal.patching import KL, Divergences, Patcher
from crossdiff.causal.results import NO_CHANGE, Bootstrap, arm_results, comparison_results, latent_results
from crossdiff.config import CausalConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.files import replacing, write_json
from crossdiff.latents.groups import GROUPS
from crossdiff.latents.stream import check_fits
from crossdiff.models.pair import Pair
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Float, Tensor
from crossdiff.text.sequences import TokenSequence, bucketed

LISTS = {"default": DEFAULT, "published": DEFAULT.with_name("published.yaml")}
"""The lists of the package by name; any other name is that of a file."""
OUTPUTS = ("causal.json", "causal_conversations.parquet", "causal_latents.parquet")


def load_experiment(config: CausalConfig) -> Experiment:
    """The interventions and comparisons of the configured file, or of a list of the package; see `LISTS`."""
    path = LISTS.get(config.interventions or "default") or Path(str(config.interventions))
    experiment = read_experiment(path)
    if NO_CHANGE not in {intervention.name for intervention in experiment.interventions}:
        raise UserError(f"{path} has no intervention {NO_CHANGE!r}, from which the gap is measured; add one")
    return experiment


class Prepared(NamedTuple):
    """The arms of the experiment, and the vectors that some of them need."""

    arms: Arms
    means: Float[Tensor, "group d_model"]
    principal: Float[Tensor, "component d_model"] | None


def _make_arms(
    experiment: Experiment, store: Store, crosscoder: Crosscoder, table: pl.DataFrame | None, pool: int, config: CausalConfig
) -> Prepared:
    if table is None:
        table = contributions(store, crosscoder, config.batch_tokens)
    elif any("contribution" in intervention.rankings for intervention in experiment.interventions):
        contribution = contributions(store, crosscoder, config.batch_tokens).drop("n_active")
        table = table.join(contribution, on="latent", how="left", maintain_order="left")
    arms = make_arms(experiment, table, pool, config.seed, crosscoder.n_sources)
    others = [part for arm in arms.arms for part in arm.others]
    means, device = torch.zeros(len(GROUPS) + 1, store.d_model), crosscoder.encoder.device
    if any(isinstance(part, MeanDifferencePart) for part in others):
        means = mean_differences(store, config.batch_tokens, device, config.between).float()
    numbers = [number for part in others if isinstance(part, PrincipalPart) for number in part.components]
    return Prepared(arms, means, _principal(store, max(numbers), config, device) if numbers else None)


def _principal(store: Store, last: int, config: CausalConfig, device: torch.device) -> Float[Tensor, "component d_model"]:
    """The principal directions up to the number `last`."""
    if last >= store.d_model:
        raise UserError(
            f"there is no principal direction {last}: the activations have {store.d_model} dimensions; count from 0"
        )
    return principal_directions(store, config.batch_tokens, device, config.between)[: last + 1].float()


def _measure(path: Path, patcher: Patcher, batch: list[TokenSequence]) -> Divergences:
    """The divergences of a batch, kept in `path` so that a killed run does not measure it again."""
    if path.exists():
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}; delete it and run the same command again") from None
        return Divergences(tensors["total"], tensors["n"])
    divergences = patcher.measure(batch)
    with replacing(path) as partial:
        save_file({"total": divergences.total.contiguous(), "n": divergences.n.contiguous()}, partial)
    return divergences


def _measure_all(
    patcher: Patcher,
    sequences: Sequence[TokenSequence],
    parts: Path,
    batch_tokens: int,
    advance: Callable[..., None],
    ranks: Ranks,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The measures summed over tokens, `[measure, arm, conversation, span]`, and the numbers of tokens.

    The ranks share the batches; only the first one gets the results, the others get zeros.
    """
    parts.mkdir(parents=True, exist_ok=True)
    batches = [
        (parts / f"batch-{number:05d}.safetensors", batch)
        for number, batch in enumerate(bucketed(sequences, batch_tokens, pool=len(sequences)))
    ]
    for number, (path, batch) in enumerate(batches):
        if ranks.has(number):
            _measure(path, patcher, batch)
        advance(len(batch), total=len(sequences))
    ranks.wait()
    index_of = {sequence.document: index for index, sequence in enumerate(sequences)}
    total = np.zeros((len(patcher.measures), len(patcher.arms), len(sequences), len(SPANS)))
    n = np.zeros((len(sequences), len(SPANS)), dtype=np.int64)
    if ranks.is_first:
        for path, batch in batches:
            divergences = _measure(path, patcher, batch)
            members = [index_of[sequence.document] for sequence in batch]
            total[:, :, members] = divergences.total.numpy()
            n[members] = divergences.n.numpy()
    return total, n


def measure_arms(
    patcher: Patcher,
    sequences: Sequence[TokenSequence],
    parts: Path,
    config: CausalConfig,
    advance: Callable[..., None],
    ranks: Ranks,
) -> dict[str, Bootstrap]:
    """Each measure of the arms of a patcher on conversations; only the first rank's samples are complete.

    Args:
        parts: folder of the finished batches, from which a killed run resumes.
    """
    total, n = _measure_all(patcher, sequences, parts, config.batch_tokens, advance, ranks)
    names = [arm.intervention for arm in patcher.arms]
    samples = (Bootstrap(of_measure, n, names, config.resamples, config.seed) for of_measure in total)
    return dict(zip(patcher.measures, samples, strict=True))


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
        parts: folder of the finished batches, from which a killed run resumes.
        table: the latent table of the crosscoder; None for a coder of the difference, which has none.
        ranks: the processes that share the batches; all of them see both folders, and the first writes the results.
    """
    check_fits(crosscoder, store)
    missing = [name for name in config.between if name not in crosscoder.view.reads]
    if missing:
        raise UserError(
            f"patching needs a coder that reads {' and '.join(config.between)}; this one reads "
            f"{' and '.join(crosscoder.view.reads)}"
        )
    experiment = load_experiment(config)
    pool = max(2, crosscoder.n_latents // 20) if config.pool is None else config.pool
    # On one rank for all: where latents are nearly equal, another machine might choose others.
    arms, means, principal = ranks.once(lambda: _make_arms(experiment, store, crosscoder, table, pool, config))
    sequences, n_without_assistant = read_conversations(store, config.split, config.max_conversations, config.seed)
    measures = (KL, *experiment.measures)
    patcher = Patcher(pair, crosscoder, store.layer, arms.arms, means, store.rule, principal, measures, config.between)
    samples = measure_arms(patcher, sequences, parts, config, advance, ranks)
    if not ranks.is_first:
        return
    sample = samples[KL]
    _conversation_table(samples, arms, sequences).write_parquet(folder / "causal_conversations.parquet")
    latent_results(sample, arms.arms).write_parquet(folder / "causal_latents.parquet")
    report = {
        "layer": store.layer,
        "split": config.split,
        "n_conversations": len(sequences),
        "n_without_assistant": n_without_assistant,
        "n_predictions": sample.n_predictions,
        "pool": pool,
        "skips_lower_layers": all(upper.skips_lower for upper in patcher.upper.values()),
        "measures": list(experiment.measures),
        "left_out": arms.left_out,
        "arms": {arm.name: arm.latents for arm in arms.arms},
        "results": [asdict(result) for result in arm_results(samples, arms.arms)],
        "comparisons": [asdict(result) for result in comparison_results(sample, experiment.comparisons)],
    }
    write_json(folder / "causal.json", report)


def _conversation_table(samples: Mapping[str, Bootstrap], arms: Arms, sequences: Sequence[TokenSequence]) -> pl.DataFrame:
    """One row per arm, conversation and span with tokens: document, n_tokens and the mean of each measure."""
    sample = samples[KL]
    n_arms, n_conversations, n_spans = sample.kl.shape
    documents = np.array([sequence.document for sequence in sequences])
    frame = pl.DataFrame(
        {
            "arm": np.repeat([arm.name for arm in arms.arms], n_conversations * n_spans),
            "document": np.tile(np.repeat(documents, n_spans), n_arms),
            "span": np.tile(sample.spans, n_arms * n_conversations),
            "n_tokens": np.tile(sample.n.ravel(), n_arms),
            **{name: of_measure.kl.ravel() for name, of_measure in samples.items()},
        }
    )
    return frame.filter(pl.col("n_tokens") > 0)
