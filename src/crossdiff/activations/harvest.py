"""Run both models over the same tokens, in one pass, and keep their residual streams after one or several layers.

Ranks that share a harvest all read the texts, which is cheap, and take the shards in turn; so the store is the same to the last
bit however many they are.

A live harvest keeps the tokens alone: `live` runs the models when activations are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossdiff.activations.folder import MANIFEST, Folder
from crossdiff.activations.live import sampled_moments
from crossdiff.activations.passes import paired_residuals
from crossdiff.activations.shards import ProgressLog, ShardWriters, logs_among, shard_name
from crossdiff.activations.store import COLUMNS, FORMAT, check_names
from crossdiff.activations.texts import Texts
from crossdiff.activations.writer import Origin, finish_store, summed_moments
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.models.pair import Pair
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Int, Tensor
from crossdiff.sources import SOURCES
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
    folders: Mapping[int, str | Path | Folder],
    pair: Pair,
    datasets: tuple[DatasetConfig, ...],
    config: HarvestConfig,
    advance: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> list[str]:
    """Write an activation store of each layer into its folder, going on from what is there already.

    However many layers, it is one pass. The stores hold the same tokens in the same order.

    Args:
        folders: by layer; local ones, or URLs of remote ones.
        advance: called once for each document read.
        ranks: the processes that share the work, all of which see the folders.

    Returns:
        What the user should know: datasets shorter than asked for, damaged records that were left out.

    Raises:
        UserError: no text, text that cannot be tokenised, activations that are not finite or do not fit the dtype.
    """
    check_names([dataset.title for dataset in datasets])
    check_datasets(datasets)
    texts = Texts(datasets, pair.tokenizer, config, advance)
    settings = {layer: _settings(pair, layer, datasets, config) for layer in sorted(folders)}
    logs = {layer: ProgressLog(folders[layer], each, ranks.rank) for layer, each in settings.items()}
    ranks.wait()
    n_shards = _fill(logs, pair, texts, config, ranks)
    ranks.wait()
    for layer, log in logs.items() if ranks.is_first else ():
        names = tuple(record.name for record in texts.records)
        origin = Origin(pair.identity, layer, pair.n_layers, names, texts.report(), pair.revisions)
        entries = log.entries()
        assert len(entries) == n_shards, f"{log.place.where} has {len(entries)} of {n_shards} shards"
        if config.storage == "live":
            moments = sampled_moments(log.place, entries, pair, layer, config, texts.is_training)
        else:
            moments = summed_moments(log.place, entries)
        finish_store(log.place, origin, config, entries, texts.table(), moments)
        log.remove()
    return _remarks(texts)


def is_whole(place: Folder) -> bool:
    """Whether a harvest into this place came to its end."""
    names = place.sizes()
    return MANIFEST in names and not logs_among(names)


def _fill(logs: Mapping[int, ProgressLog], pair: Pair, texts: Texts, config: HarvestConfig, ranks: Ranks) -> int:
    """Write this rank's shards of every layer, where they are not there yet; returns how many shards all ranks have."""
    done = set.intersection(*({entry.file for entry in log.entries()} for log in logs.values()))
    ranks.wait()  # before any of them writes
    kept = None if config.storage == "live" else config.dtype
    writers = ShardWriters(list(logs.values()), config.shard_tokens + config.batch_tokens, len(SOURCES), pair.d_model, kept)
    number, n_before, since = -1, 0, time.time()
    try:
        for number, batches in enumerate(_shards(texts.sequences(), config)):
            n_sequences = sum(map(len, batches))
            if ranks.has(number) and shard_name(number) not in done:
                first = n_before
                for batch in batches:
                    _add(writers, batch, first, pair, list(logs), texts.is_training, config)
                    first += len(batch)
                writers.flush(number, n_sequences, (time.time() - since) / ranks.size)
                since = time.time()
            n_before += n_sequences
        writers.wait()
    finally:
        writers.close()
    return number + 1


def _shards(sequences: Iterable[TokenSequence], config: HarvestConfig) -> Iterator[list[list[TokenSequence]]]:
    """The batches of each shard: so many that they reach `shard_tokens`, fewer in the last one."""
    shard: list[list[TokenSequence]] = []
    n_tokens = 0
    for batch in bucketed(sequences, config.batch_tokens, POOL):
        shard.append(batch)
        n_tokens += sum(len(sequence.token_ids) for sequence in batch)
        if n_tokens >= config.shard_tokens:
            yield shard
            shard, n_tokens = [], 0
    if shard:
        yield shard


def _add(
    writers: ShardWriters,
    batch: list[TokenSequence],
    first_sequence: int,
    pair: Pair,
    layers: list[int],
    is_training: Sequence[bool],
    config: HarvestConfig,
) -> None:
    """Run the models over a batch, and put what comes out into the buffers of the layers."""
    columns, counted = token_columns(batch, first_sequence), _counted(batch, is_training, config.leave_out)
    computed: list[list[Tensor]] = [[] for _ in layers]
    if config.storage != "live":
        computed = paired_residuals(pair, [sequence.token_ids for sequence in batch], layers)
    for buffer, streams in zip(writers.buffers, computed, strict=True):
        try:
            buffer.add(streams, columns, counted)
        except UserError as error:
            numbers = [sequence.document for sequence in batch]
            raise UserError(f"{error} (in documents {min(numbers)} to {max(numbers)})") from error


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
