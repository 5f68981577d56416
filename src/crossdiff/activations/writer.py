"""Writing an activation store: shards, statistics over the training tokens, the table of documents and the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import save_file

from crossdiff.activations.store import FORMAT, Normalisation, sha256
from crossdiff.config import HarvestConfig, UserError
from crossdiff.models.pair import SOURCES
from crossdiff.run import write_json
from crossdiff.shapes import Float, Tensor

DOCUMENT_COLUMNS = {
    "document": pl.Int32, "dataset": pl.String, "split": pl.String, "label": pl.String, "sub_label": pl.String,
    "prompt": pl.String, "n_messages": pl.Int32, "n_tokens": pl.Int32,
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """What a store's activations come from: the pair's identity, the layer, and the names of the datasets."""

    pair: dict[str, Any]
    layer: int
    n_layers: int
    datasets: tuple[str, ...]


class ShardWriter:
    """Collects batches and writes them as one shard when there are enough tokens."""

    def __init__(self, folder: Path, dtype: torch.dtype, shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.pending: list[dict[str, Tensor]] = []
        self.n_pending = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        self.pending.append(tensors)
        self.n_pending += len(tensors["token_id"])

    def flush(self, index: int) -> dict[str, Any]:
        """Write the pending tokens as shard `index`, atomically; returns its entry in the manifest."""
        tensors = {name: torch.cat([part[name] for part in self.pending]) for name in self.pending[0]}
        path = self.folder / f"shard-{index:05d}.safetensors"
        temporary = path.with_suffix(".partial")
        save_file(tensors, temporary)
        temporary.replace(path)
        entry = {"file": path.name, "n_tokens": self.n_pending, "bytes": path.stat().st_size, "sha256": sha256(path)}
        self.pending, self.n_pending = [], 0
        return entry


class Statistics:
    """Sums of h_s and of <h_s, h_t> over the training tokens, in float64."""

    def __init__(self, n_sources: int, d_model: int) -> None:
        self.n = 0
        self.total = torch.zeros(n_sources, d_model, dtype=torch.float64)
        self.products = torch.zeros(n_sources, n_sources, dtype=torch.float64)

    def add(self, streams: Float[Tensor, "token source d_model"]) -> None:
        self.n += len(streams)
        wide = streams.double()
        self.total += wide.sum(0)
        self.products += torch.einsum("nsd,ntd->st", wide, wide)

    def finish(self) -> Normalisation:
        """The moments.

        Raises:
            UserError: no training tokens, or activations that do not vary.
        """
        if not self.n:
            raise UserError("no training tokens: every document is held out or too short; lower heldout_share or add text")
        normalisation = Normalisation(self.total / self.n, self.products / self.n)
        assert normalisation.scale > 0  # raises if nothing varies, before a store is made of it
        return normalisation


def finish_store(
    folder: Path,
    origin: Origin,
    config: HarvestConfig,
    statistics: Statistics,
    documents: list[dict[str, Any]],
    shards: list[dict[str, Any]],
    n_sequences: int,
    seconds: float,
) -> None:
    """Write what makes the shards in `folder` a store; `documents` are rows of `DOCUMENT_COLUMNS`.

    Raises:
        UserError: no training tokens, or activations that do not vary.
    """
    moments = statistics.finish()
    save_file({"mean": moments.mean, "gram": moments.gram}, folder / "statistics.safetensors")
    pl.DataFrame(documents, schema=DOCUMENT_COLUMNS).write_parquet(folder / "documents.parquet")
    manifest = {
        "format": FORMAT,
        "pair": origin.pair,
        "sources": list(SOURCES),
        "layer": origin.layer,
        "n_layers": origin.n_layers,
        "d_model": moments.mean.shape[1],
        "dtype": config.dtype,
        "max_length": config.max_length,
        "leave_out": config.leave_out,
        "datasets": list(origin.datasets),
        "n_documents": len(documents),
        "n_sequences": n_sequences,
        "n_tokens": sum(shard["n_tokens"] for shard in shards),
        "n_training_tokens": statistics.n,
        "seconds": round(seconds, 1),
        "shards": shards,
        "files": {name: sha256(folder / name) for name in ("documents.parquet", "statistics.safetensors")},
    }
    write_json(folder / "manifest.json", manifest)
