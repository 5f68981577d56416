"""Turning a folder of shards into a store: statistics over the training tokens, the table of documents, and the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from safetensors import safe_open
from safetensors.torch import save_file

from crossdiff.activations.folder import DOCUMENTS, MANIFEST, Folder
from crossdiff.activations.normalisation import Moments
from crossdiff.activations.shards import ShardEntry
from crossdiff.activations.store import FORMAT, STATISTICS
from crossdiff.config import HarvestConfig
from crossdiff.files import sha256, write_json
from crossdiff.sources import SOURCES

DOCUMENT_COLUMNS = {
    "document": pl.Int32, "dataset": pl.String, "split": pl.String, "label": pl.String, "sub_label": pl.String,
    "prompt": pl.String, "n_messages": pl.Int32, "n_tokens": pl.Int32, "left_out": pl.String,
}  # fmt: skip
"""`left_out`: why a document has no tokens in the store; null if it has some."""


@dataclass(frozen=True)
class Origin:
    """Where a store's activations come from.

    pair: identity of the models. datasets: names. texts: record of each dataset. revisions: Hub commit of each model.
    model_dtype: dtype that the models ran in. massive: `norm_limits` of the rule `Counted`, and what it found.
    sources: names of the models, in the order of the source axis.
    """

    pair: dict[str, Any]
    layer: int
    n_layers: int
    datasets: tuple[str, ...]
    texts: list[dict[str, Any]] = field(default_factory=list)
    revisions: dict[str, str | None] = field(default_factory=dict)
    model_dtype: str = "float32"
    massive: dict[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = SOURCES


def finish_store(
    folder: Folder,
    origin: Origin,
    config: HarvestConfig,
    entries: Sequence[ShardEntry],
    documents: pl.DataFrame,
    moments: Moments,
) -> None:
    """Write the files that turn the shards in `folder` into a store, the manifest last.

    Args:
        documents: a table with the columns of `DOCUMENT_COLUMNS`.
        moments: over the training tokens, or a sample of them.
    """
    normalisation = moments.finish()
    assert normalisation.scale > 0  # raises if the activations do not vary, before they become a store
    digests = {}
    with folder.writing(DOCUMENTS) as path:
        documents.write_parquet(path)
        digests[DOCUMENTS] = sha256(path)
    with folder.writing(STATISTICS) as path:
        save_file({"mean": normalisation.mean, "gram": normalisation.gram}, path)
        digests[STATISTICS] = sha256(path)
    manifest = {
        "format": FORMAT,
        "pair": origin.pair,
        "revisions": origin.revisions,
        "model_dtype": origin.model_dtype,
        "sources_equal": normalisation.sources_equal,
        "base_tokens": config.base_tokens,
        "template_date": None if config.template_date is None else config.template_date.isoformat(),
        "sources": list(origin.sources),
        "layer": origin.layer,
        "n_layers": origin.n_layers,
        "d_model": normalisation.mean.shape[1],
        "dtype": config.dtype,
        "storage": config.storage,
        "batch_tokens": config.batch_tokens,
        **({"compile": True} if config.compile else {}),
        "max_length": config.max_length,
        "leave_out": config.leave_out,
        "max_norm_multiple": config.max_norm_multiple,
        "massive": origin.massive,
        "datasets": list(origin.datasets),
        "texts": origin.texts,
        "n_documents": documents.height,
        "n_sequences": sum(entry.sequences for entry in entries),
        "n_tokens": sum(entry.n_tokens for entry in entries),
        "n_statistics_tokens": int(moments.n_tokens),
        "seconds": round(sum(entry.seconds for entry in entries), 1),
        "shards": [
            {"file": entry.file, "n_tokens": entry.n_tokens, "bytes": entry.bytes, "sha256": entry.sha256} for entry in entries
        ],
        "files": digests,
    }
    with folder.writing(MANIFEST) as path:
        write_json(path, manifest)


def summed_moments(folder: Folder, entries: Sequence[ShardEntry]) -> Moments:
    """Sum the moments stored in the shards. A resumed harvest gives the same sum, to the last bit."""
    parts = []
    for path in folder.headers([entry.file for entry in entries]):
        with safe_open(path, framework="pt") as file:
            parts.append(Moments(*(file.get_tensor(name) for name in ("total", "products", "n_training"))))
    moments = Moments.zero(*parts[0].total.shape)
    for part in parts:
        moments += part
    return moments
