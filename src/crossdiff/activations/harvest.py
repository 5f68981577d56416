"""Run both models over the same tokens and keep their residual streams after one layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossdiff.activations.store import COLUMNS, DTYPES, check_names
from crossdiff.activations.writer import Origin, ShardWriter, Statistics, finish_store
from crossdiff.config import DatasetConfig, HarvestConfig, UserError
from crossdiff.models.access import residual_after
from crossdiff.models.pair import SOURCES, Pair
from crossdiff.run import read_json, write_json
from crossdiff.shapes import Float, Tensor
from crossdiff.text.documents import Document, read_documents
from crossdiff.text.sequences import TokenSequence, bucketed, tokenise

POOL = 512
"""Sequences that are sorted by length together: large enough that batches hold little padding."""


@dataclass
class Progress:
    """What is written so far; saved with each shard, so that a killed harvest goes on after the last whole one."""

    batches: int = 0
    sequences: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    n_training: int = 0
    total: list[list[float]] = field(default_factory=list)
    products: list[list[float]] = field(default_factory=list)


def _pad(batch: list[TokenSequence], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded token ids and attention mask `[sequence, position]`."""
    longest = max(len(sequence.token_ids) for sequence in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence.token_ids)] = torch.from_numpy(sequence.token_ids.astype(np.int64))
        mask[row, : len(sequence.token_ids)] = 1
    return ids.to(device), mask.to(device)


def paired_residuals(pair: Pair, batch: list[TokenSequence], layer: int) -> Float[Tensor, "token source d_model"]:
    """Residual streams of both models on the same ids, padding removed, float32 on the CPU."""
    device = next(pair.base.parameters()).device
    pad_id = pair.tokenizer.pad_token_id if pair.tokenizer.pad_token_id is not None else 0
    ids, mask = _pad(batch, pad_id, device)
    kept = mask.bool()
    streams = [residual_after(model, ids, mask, layer)[kept].float().cpu() for model in pair.models]
    return torch.stack(streams, dim=1)


def _columns(batch: list[TokenSequence], first_sequence: int) -> dict[str, Tensor]:
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


def _narrow(streams: Tensor, dtype: torch.dtype, batch: list[TokenSequence]) -> Tensor:
    """Convert to the stored dtype.

    Raises:
        UserError: a value is not finite, or becomes so.
    """
    stored = streams.to(dtype)
    if not torch.isfinite(stored).all():
        documents = sorted({sequence.document for sequence in batch})
        if torch.isfinite(streams).all():
            raise UserError(
                f"activations up to {float(streams.abs().max()):.3g} do not fit {dtype}; set harvest.dtype to bfloat16"
            )
        raise UserError(f"a model gives NaN or infinite activations in documents {documents[0]} to {documents[-1]}")
    return stored


def _sequences(
    datasets: tuple[DatasetConfig, ...],
    tokenizer: Any,
    max_length: int,
    table: list[dict[str, Any]],
    advance: Callable[[], None],
) -> Iterator[TokenSequence]:
    """Tokenise document after document, filling the documents' table on the way."""
    for document in read_documents(datasets):
        parts = tokenise(document, tokenizer, max_length)
        table.append(_document_row(document, datasets, sum(len(part.token_ids) for part in parts)))
        advance()
        yield from parts


def _document_row(document: Document, datasets: tuple[DatasetConfig, ...], n_tokens: int) -> dict[str, Any]:
    questions = [message["content"] for message in document.messages or () if message["role"] == "user"]
    return {
        "document": document.number,
        "dataset": datasets[document.dataset].title,
        "split": document.split,
        "label": document.label,
        "sub_label": document.sub_label,
        "prompt": questions[0] if questions else None,
        "n_messages": len(document.messages) if document.messages else 0,
        "n_tokens": n_tokens,
    }


def harvest(
    folder: Path,
    pair: Pair,
    layer: int,
    datasets: tuple[DatasetConfig, ...],
    config: HarvestConfig,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write an activation store of `pair` at `layer` into `folder`, going on from what is there already.

    Args:
        advance: called once for each document read.

    Raises:
        UserError: no text, text that cannot be tokenised, activations that are not finite or do not fit the dtype.
    """
    check_names([dataset.title for dataset in datasets])
    progress = Progress(**read_json(folder / "progress.json")) if (folder / "progress.json").exists() else Progress()
    statistics = Statistics(len(SOURCES), pair.d_model)
    if progress.shards:
        statistics.n = progress.n_training
        statistics.total = torch.tensor(progress.total, dtype=torch.float64)
        statistics.products = torch.tensor(progress.products, dtype=torch.float64)
    documents: list[dict[str, Any]] = []
    sequences = _sequences(datasets, pair.tokenizer, config.max_length, documents, advance)
    writer = ShardWriter(folder, DTYPES[config.dtype], config.shard_tokens)
    started, seconds_before = time.time(), progress.seconds

    def flush() -> None:
        progress.shards.append(writer.flush(len(progress.shards)))
        progress.seconds = seconds_before + time.time() - started
        progress.n_training = statistics.n
        progress.total, progress.products = statistics.total.tolist(), statistics.products.tolist()
        write_json(folder / "progress.json", progress.__dict__)

    resumed_at = progress.batches
    for index, batch in enumerate(bucketed(sequences, config.batch_tokens, POOL)):
        if index < resumed_at:
            continue
        streams = paired_residuals(pair, batch, layer)
        columns = _columns(batch, progress.sequences)
        training = np.array([documents[document]["split"] == "train" for document in columns["document"].tolist()])
        statistics.add(streams[torch.from_numpy(training) & (columns["position"] >= config.leave_out)])
        writer.add({"activations": _narrow(streams, writer.dtype, batch), **columns})
        progress.batches, progress.sequences = index + 1, progress.sequences + len(batch)
        if writer.n_pending >= config.shard_tokens:
            flush()
    if writer.n_pending:
        flush()
    origin = Origin(pair.identity, layer, pair.n_layers, tuple(dataset.title for dataset in datasets))
    finish_store(folder, origin, config, statistics, documents, progress.shards, progress.sequences, progress.seconds)
    (folder / "progress.json").unlink(missing_ok=True)
