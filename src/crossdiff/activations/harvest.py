"""Run both models over the same tokens, in one pass, and keep their residual streams after one or several layers.

A live harvest keeps the tokens alone: `live` runs the models when activations are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossdiff.activations.live import sampled_moments
from crossdiff.activations.passes import paired_residuals
from crossdiff.activations.place import MANIFEST, Place
from crossdiff.activations.shards import LOG, ProgressLog, ShardWriters
from crossdiff.activations.store import COLUMNS, FORMAT, check_names
from crossdiff.activations.texts import Texts
from crossdiff.activations.writer import Origin, finish_store, summed_moments
from crossdiff.config import DatasetConfig, HarvestConfig, UserError
from crossdiff.models.pair import SOURCES, Pair
from crossdiff.shapes import Int, Tensor
from crossdiff.text.documents import check_datasets
from crossdiff.text.sequences import POOL, TokenSequence, bucketed


def token_columns(batch: Sequence[TokenSequence], first_sequence: int) -> dict[str, Tensor]:
    """The columns of a batch's tokens, its sequences numbered from `first_sequence` on."""
    lengths = [len(sequence.token_ids) for sequence in batch]
    values: dict[str, Any] = {
        "token_id": np.concatenate([sequence.token_ids for sequence in batch]),
        "document": np.repeat([sequence.document for sequence in batch], lengths),
        "sequence": np.repeat(np.arange(first_sequence, first_sequence + len(batch)), lengths),
        "position": np.concatenate([np.arange(length) for length in lengths]),
        "dataset": np.repeat([sequence.dataset for sequence in batch], lengths),
        "flags": np.concatenate([sequence.flags for sequence in batch]),
        "template_index": np.concatenate([sequence.template_index for sequence in batch]),
        "turn": np.concatenate([sequence.turn for sequence in batch]),
    }
    return {name: torch.from_numpy(values[name]).to(dtype) for name, dtype in COLUMNS.items()}


def _counted(batch: Sequence[TokenSequence], is_training: Sequence[bool], leave_out: int) -> Int[Tensor, " token"]:
    """Which tokens of a batch the statistics count: those of training documents after the left-out positions."""
    parts, start = [], 0
    for sequence in batch:
        stop = start + len(sequence.token_ids)
        if is_training[sequence.document]:
            parts.append(np.arange(start + leave_out, stop))
        start = stop
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.long)


def harvest(
    folders: Mapping[int, str | Path | Place],
    pair: Pair,
    datasets: tuple[DatasetConfig, ...],
    config: HarvestConfig,
    advance: Callable[[], None] = lambda: None,
) -> list[str]:
    """Write an activation store of each layer into its folder, going on from what is there already.

    However many layers, it is one pass. The stores hold the same tokens in the same order.

    Args:
        folders: by layer; local ones, or URLs of remote ones.
        advance: called once for each document read.

    Returns:
        What the user should know: datasets shorter than asked for, damaged records that were left out.

    Raises:
        UserError: no text, text that cannot be tokenised, activations that are not finite or do not fit the dtype.
    """
    check_names([dataset.title for dataset in datasets])
    check_datasets(datasets)
    texts = Texts(datasets, pair.tokenizer, config, advance)
    logs = {layer: ProgressLog(folders[layer], _settings(pair, layer, datasets, config)) for layer in sorted(folders)}
    # A kill between two layers' shards leaves one more of the first.
    n_shards = min(len(log.entries) for log in logs.values())
    for log in logs.values():
        log.keep(n_shards)
    _fill(logs, pair, texts, config)
    for layer, log in logs.items():
        names = tuple(record.name for record in texts.records)
        origin = Origin(pair.identity, layer, pair.n_layers, names, texts.report(), pair.revisions)
        if config.storage == "live":
            moments = sampled_moments(log.place, log.entries, pair, layer, config, texts.is_training)
        else:
            moments = summed_moments(log.place, log.entries)
        finish_store(log.place, origin, config, log.entries, texts.table(), moments)
    for log in logs.values():
        log.end()
    return _remarks(texts)


def is_whole(place: Place) -> bool:
    """Whether a harvest into this place came to its end."""
    names = place.sizes()
    return MANIFEST in names and LOG not in names


def _fill(logs: Mapping[int, ProgressLog], pair: Pair, texts: Texts, config: HarvestConfig) -> None:
    """Write the shards of the layers that `logs` do not have yet."""
    entries = next(iter(logs.values())).entries
    done, n_sequences, seconds = (entries[-1].batches, entries[-1].sequences, entries[-1].seconds) if entries else (0, 0, 0.0)
    started, n_batches, capacity = time.time() - seconds, done, config.shard_tokens + config.batch_tokens
    kept = None if config.storage == "live" else config.dtype
    writers = ShardWriters(list(logs.values()), capacity, len(SOURCES), pair.d_model, kept)
    try:
        for index, batch in enumerate(bucketed(texts.sequences(), config.batch_tokens, POOL)):
            if index < done:
                continue
            columns, counted = token_columns(batch, n_sequences), _counted(batch, texts.is_training, config.leave_out)
            ids = [sequence.token_ids for sequence in batch]
            computed: list[list[Tensor]] = paired_residuals(pair, ids, list(logs)) if kept else [[] for _ in logs]
            for buffer, streams in zip(writers.buffers, computed, strict=True):
                try:
                    buffer.add(streams, columns, counted)
                except UserError as error:
                    numbers = [sequence.document for sequence in batch]
                    raise UserError(f"{error} (in documents {min(numbers)} to {max(numbers)})") from error
            n_batches, n_sequences = index + 1, n_sequences + len(batch)
            if writers.n_tokens >= config.shard_tokens:
                writers.flush(n_batches, n_sequences, time.time() - started)
        if writers.n_tokens:
            writers.flush(n_batches, n_sequences, time.time() - started)
        writers.wait()
    finally:
        writers.close()


def _settings(pair: Pair, layer: int, datasets: tuple[DatasetConfig, ...], config: HarvestConfig) -> dict[str, Any]:
    """What an unfinished harvest must have in common with the one that goes on with it."""
    return {
        "format": FORMAT, "pair": pair.identity, "layer": layer, "settings": config.model_dump(mode="json", exclude={"store"}),
        "datasets": [dataset.model_dump(mode="json") for dataset in datasets],
    }  # fmt: skip


def _remarks(texts: Texts) -> list[str]:
    short = [remark for record in texts.records if (remark := record.shortfall())]
    damaged = [
        f"{record.damaged:,} damaged records of {record.name} were left out; the first: {record.reasons[0]}"
        for record in texts.records
        if record.damaged
    ]
    return short + damaged
