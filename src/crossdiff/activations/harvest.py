"""Run both models over the same tokens and store their residual streams after one or several layers.

Ranks that share a harvest all read the texts, which is cheap, and take turns with the shards. So the store is the same, to the
last bit, for any number of ranks. A live harvest stores only the tokens, see `live`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from crossdiff.activations.folder import MANIFEST, Folder
from crossdiff.activations.live import sampled_moments
from crossdiff.activations.passes import NotFiniteError, paired_residuals
from crossdiff.activations.shards import ProgressLog, ShardWriters, log_names, shard_name
from crossdiff.activations.store import COLUMNS, FORMAT
from crossdiff.activations.texts import Texts
from crossdiff.activations.writer import Origin, finish_store, summed_moments
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.models.pair import Pair
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Tensor
from crossdiff.sources import SOURCES
from crossdiff.text.documents import check_datasets
from crossdiff.text.sequences import POOL, TokenSequence, bucketed


def _token_columns(batch: Sequence[TokenSequence], first_sequence: int) -> dict[str, Tensor]:
    """The columns of a batch's tokens. `first_sequence` is the number of its first sequence."""
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


def harvest(
    folders: Mapping[int, str | Path | Folder],
    pair: Pair,
    datasets: tuple[DatasetConfig, ...],
    config: HarvestConfig,
    advance: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    one_sided: bool = False,
) -> list[str]:
    """Write an activation store per layer, in one pass over the texts, and resume unfinished ones.

    The stores hold the same tokens in the same order.

    Args:
        folders: folder of each layer's store, local or at a URL.
        advance: called after each document.
        ranks: the processes that share the work. All of them must see the folders.
        one_sided: accept conversations without any token of the user, or of the assistant.

    Returns:
        Remarks for the user: layouts that were found, datasets shorter than requested, omitted damaged records, cut answers.
    """
    check_datasets(datasets)
    texts = Texts(datasets, pair.tokenizer, config, advance, pair.unreadable)
    settings = {layer: _settings(pair, layer, datasets, config) for layer in sorted(folders)}
    logs = {layer: ProgressLog(folders[layer], each, ranks.rank) for layer, each in settings.items()}
    ranks.wait()
    n_shards = _write_shards(logs, pair, texts, config, ranks)
    if not one_sided:
        texts.check_sides()  # the shards stay, so a repetition with one_sided finishes at once
    ranks.wait()
    for layer, log in logs.items() if ranks.is_first else ():
        names = tuple(record.name for record in texts.records)
        origin = Origin(pair.identity, layer, pair.n_layers, names, texts.report(), pair.revisions, pair.dtype)
        entries = log.entries()
        assert len(entries) == n_shards, f"{log.folder.location} has {len(entries)} of {n_shards} shards"
        assert sum(entry.n_tokens for entry in entries) == sum(record.n_tokens for record in texts.records)
        if config.storage == "live":
            moments = sampled_moments(log.folder, entries, pair, layer, config, texts.is_training)
        else:
            moments = summed_moments(log.folder, entries)
        finish_store(log.folder, origin, config, entries, texts.table(), moments)
        log.remove()
    return texts.remarks()


def is_finished(folder: Folder) -> bool:
    """Whether a harvest into this folder has finished."""
    names = folder.sizes()
    return MANIFEST in names and not log_names(names)


def _write_shards(logs: Mapping[int, ProgressLog], pair: Pair, texts: Texts, config: HarvestConfig, ranks: Ranks) -> int:
    """Write this rank's missing shards of every layer. Returns the number of shards of all ranks."""
    done = set.intersection(*({entry.file for entry in log.entries()} for log in logs.values()))
    ranks.wait()  # all ranks must read the logs before any of them writes
    dtype = None if config.storage == "live" else config.dtype
    writers = ShardWriters(list(logs.values()), config.shard_tokens + config.batch_tokens, len(SOURCES), pair.d_model, dtype)
    number, n_before, since = -1, 0, time.time()
    try:
        for number, batches in enumerate(_shards(texts.sequences(), config)):
            n_sequences = sum(map(len, batches))
            if ranks.has(number) and shard_name(number) in done:
                _check_stored(logs.values(), number, batches, n_before)
            elif ranks.has(number):
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


def _check_stored(logs: Iterable[ProgressLog], number: int, batches: list[list[TokenSequence]], first: int) -> None:
    """Check that the texts give the tokens that a finished shard holds; `first` is the number of its first sequence.

    Raises:
        UserError: they do not, because the texts or the tokenizer's rules changed in between.
    """
    firsts = np.cumsum([first, *map(len, batches)])
    parts = [_token_columns(batch, int(start)) for batch, start in zip(batches, firsts, strict=False)]
    for log in logs:
        (path,) = log.folder.headers([shard_name(number)])
        with safe_open(path, framework="pt") as file:
            for name in COLUMNS:
                found, stored = torch.cat([part[name] for part in parts]), file.get_tensor(name)
                if len(found) == len(stored) and torch.equal(found, stored):
                    continue
                raise UserError(
                    f"{log.folder.path_of(shard_name(number))} holds {len(stored)} tokens of an earlier start of this harvest, "
                    f"but the texts now give {len(found)} tokens there, with another {name}: the texts, the chat template or "
                    "the tokenizer changed in between. Delete the unfinished harvest with `crossdiff clean RUN "
                    "--unfinished-harvests`, and start it again"
                )


def _shards(sequences: Iterable[TokenSequence], config: HarvestConfig) -> Iterator[list[list[TokenSequence]]]:
    """Yield the batches of each shard. All shards but the last reach `shard_tokens`."""
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
    """Run the models over a batch and append the activations to the layers' buffers. The moments count the training tokens
    after the omitted leading positions."""
    columns = _token_columns(batch, first_sequence)
    lengths = [len(sequence.token_ids) for sequence in batch]
    in_training = np.repeat([is_training[sequence.document] for sequence in batch], lengths)
    counted = torch.from_numpy(np.flatnonzero(in_training & (columns["position"].numpy() >= config.leave_out)))
    computed: list[list[Tensor]] = [[] for _ in layers]
    if config.storage != "live":
        try:
            computed = paired_residuals(pair, [sequence.token_ids for sequence in batch], layers)
        except NotFiniteError as error:
            raise error.in_document(int(columns["document"][error.row])) from None
    for buffer, streams in zip(writers.buffers, computed, strict=True):
        try:
            buffer.add(streams, columns, counted)
        except UserError as error:
            numbers = [sequence.document for sequence in batch]
            raise UserError(f"{error} (in documents {min(numbers)} to {max(numbers)})") from error


def _settings(pair: Pair, layer: int, datasets: tuple[DatasetConfig, ...], config: HarvestConfig) -> dict[str, Any]:
    """The settings that a resumed harvest must share with the unfinished one."""
    settings = {
        "format": FORMAT, "pair": pair.identity, "layer": layer, "settings": config.model_dump(mode="json", exclude={"store"}),
        "datasets": [dataset.model_dump(mode="json") for dataset in datasets],
    }  # fmt: skip
    # Harvests in float32 that an earlier version left unfinished can be resumed.
    return settings if pair.dtype == "float32" else settings | {"model_dtype": pair.dtype}
