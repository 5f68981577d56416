"""Estimates of what a harvest will take, from the first documents and a few seconds of both models."""

from __future__ import annotations

import math
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crossdiff.activations.folder import LocalFolder
from crossdiff.activations.locations import open_folder
from crossdiff.activations.passes import paired_residuals
from crossdiff.activations.store import COLUMNS, DTYPES
from crossdiff.activations.texts import DatasetRecord, sample
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.models.pair import Pair
from crossdiff.text.documents import check_datasets
from crossdiff.text.readers import count_records
from crossdiff.text.sequences import POOL, bucketed

SECONDS = 5.0
"""Time for which the models are run, at most one batch longer."""

COLUMN_BYTES = sum(column.itemsize for column in COLUMNS.values())
"""Bytes per token of the columns."""


@dataclass(frozen=True)
class Plan:
    """Estimates for one harvest of one layer.

    memory_bytes: peak of the process, without the system's file cache. remarks: what the first documents show about layouts and
    answers beyond max_length.
    """

    n_tokens: int
    store_bytes: int
    memory_bytes: int
    seconds: float
    tokens_per_second: float
    remarks: tuple[str, ...] = ()

    def check_disk(self, folder: Path, config: HarvestConfig) -> int:
        """Return the free bytes on the disk of the store: that of `harvest.store` if it is set, otherwise that of `folder`.

        For a remote store it is the disk for temporary files, which holds one shard before its upload and the columns.
        A `UserError` reports too little space. `folder` need not exist yet.
        """
        target = open_folder(folder if config.store is None else config.store)
        if not isinstance(target, LocalFolder):
            return self._check_temporary(Path(tempfile.gettempdir()), config)
        path = target.location.absolute()
        existing = next(path for path in (path, *path.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < self.store_bytes:
            advice = "" if config.dtype == "int8" else "set harvest.dtype to int8, "
            advice += "" if config.storage == "live" else "set harvest.storage to live, "
            raise UserError(
                f"the store needs {self.store_bytes / 1e9:.2f} GB and the disk of {existing} has {free / 1e9:.2f} GB left; "
                f"{advice}lower max_documents or max_tokens, or choose a run directory on another disk"
            )
        return free

    def _check_temporary(self, folder: Path, config: HarvestConfig) -> int:
        shard = min(1.0, (config.shard_tokens + config.batch_tokens) / self.n_tokens) * self.store_bytes
        needed = shard + self.n_tokens * COLUMN_BYTES
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"a remote store needs {needed / 1e9:.2f} GB for temporary files (one shard and the columns) and the disk of "
                f"{folder} has {free / 1e9:.2f} GB left; set TMPDIR to a folder on another disk, or lower harvest.shard_tokens"
            )
        return free


def bytes_per_token(d_model: int, config: HarvestConfig, n_sources: int = 2) -> int:
    """Number of bytes that the store needs for one token, with its columns."""
    if config.storage == "live":
        return COLUMN_BYTES
    per_source = d_model * DTYPES[config.dtype].itemsize + (4 if config.dtype == "int8" else 0)
    return n_sources * per_source + COLUMN_BYTES


def plan(pair: Pair, layer: int, datasets: tuple[DatasetConfig, ...], config: HarvestConfig) -> Plan:
    """Measure a sample of the documents and scale the result up to the whole corpus."""
    check_datasets(datasets)
    counts = [count_records(dataset) for dataset in datasets]
    for dataset, count in zip(datasets, counts, strict=True):
        if count is None and dataset.max_tokens is None:
            raise UserError(
                f"the length of {dataset.title} cannot be known before it is read; set its max_documents or max_tokens"
            )
    started = time.perf_counter()
    texts, sequences = sample(datasets, pair.tokenizer, config, pair.unreadable)
    if not sequences:
        raise UserError("the first documents of the datasets hold no text, so nothing can be estimated; remove them")
    reading = (time.perf_counter() - started) / sum(record.n_tokens for record in texts.records)
    sizes = [_size(*each) for each in zip(datasets, counts, texts.records, strict=True)]
    n_tokens = round(_mixed(sizes, datasets))
    batches = [[sequence.token_ids for sequence in batch] for batch in bucketed(sequences, config.batch_tokens, POOL)]
    if config.compile:
        pair.compile()
    paired_residuals(pair, batches[-1], [layer])  # the first pass is slower than the others
    started, measured = time.perf_counter(), 0
    for batch in batches:
        paired_residuals(pair, batch, [layer])
        measured += sum(map(len, batch))
        if time.perf_counter() - started > SECONDS:
            break
    per_token = reading + (time.perf_counter() - started) / measured
    size = bytes_per_token(pair.d_model, config, len(pair.sources))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # Two shards are in memory: one is filled while the other is written.
    shards = 2 * size * min(config.shard_tokens + config.batch_tokens, n_tokens)
    remarks = [*texts.layouts(), *texts.lost()]
    try:
        texts.check_sides()
    except UserError as error:
        remarks.append(f"the harvest will refuse these texts: {error}")
    return Plan(n_tokens, n_tokens * size, peak + shards, n_tokens * per_token, 1 / per_token, tuple(remarks))


def _size(dataset: DatasetConfig, count: int | None, record: DatasetRecord) -> float:
    """Estimated number of tokens of a dataset with this many records, of which the record's have been read."""
    n_read = record.n_records
    mean = record.n_tokens / n_read
    whole = math.inf if count is None else float(record.n_tokens) if n_read >= count else mean * count
    limit = dataset.max_tokens
    if limit is None:
        return whole
    # Documents are read whole; the one that reaches the limit goes beyond it by half of its length, if nothing else is known.
    return min(whole, float(record.n_tokens) if record.n_tokens >= limit else limit + mean / 2)


def _mixed(sizes: list[float], datasets: Sequence[DatasetConfig]) -> float:
    """Number of tokens of all datasets. A mix by weights ends with the first of them that ends."""
    if datasets[0].weight is None:
        return sum(sizes)
    weights = [dataset.weight or 1.0 for dataset in datasets]
    return min(size / weight for size, weight in zip(sizes, weights, strict=True)) * sum(weights)
