"""Writing an activation store: shards, statistics over the training tokens, the table of documents and the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import save_file

from crossdiff.activations.store import FORMAT, sha256
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
    """Sums over the training tokens, in float64: one mean per source, one mean square over all."""

    def __init__(self, n_sources: int, d_model: int) -> None:
        self.n, self.square_sum = 0, 0.0
        self.total = torch.zeros(n_sources, d_model, dtype=torch.float64)

    def add(self, streams: Float[Tensor, "token source d_model"]) -> None:
        wide = streams.double()
        self.n += len(wide)
        self.total += wide.sum(0)
        self.square_sum += float(wide.square().sum())

    def finish(self) -> tuple[Float[Tensor, "source d_model"], float]:
        """Mean per source, and the scale that makes the mean of ||x_s - mean_s||^2 equal d_model.

        Raises:
            UserError: no training tokens, or activations that do not vary.
        """
        if not self.n:
            raise UserError("no training tokens: every document is held out or too short; lower heldout_share or add text")
        n_sources, d_model = self.total.shape
        mean = self.total / self.n
        variance = (self.square_sum / self.n - float(mean.square().sum())) / n_sources
        if not variance > 0:
            raise UserError("the activations do not vary over the training tokens; is this the right layer?")
        return mean, (d_model / variance) ** 0.5


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
    mean, scale = statistics.finish()
    save_file({"mean": mean}, folder / "statistics.safetensors")
    pl.DataFrame(documents, schema=DOCUMENT_COLUMNS).write_parquet(folder / "documents.parquet")
    manifest = {
        "format": FORMAT,
        "pair": origin.pair,
        "sources": list(SOURCES),
        "layer": origin.layer,
        "n_layers": origin.n_layers,
        "d_model": mean.shape[1],
        "dtype": config.dtype,
        "max_length": config.max_length,
        "leave_out": config.leave_out,
        "datasets": list(origin.datasets),
        "n_documents": len(documents),
        "n_sequences": n_sequences,
        "n_tokens": sum(shard["n_tokens"] for shard in shards),
        "n_training_tokens": statistics.n,
        "scale": scale,
        "seconds": round(seconds, 1),
        "shards": shards,
        "files": {name: sha256(folder / name) for name in ("documents.parquet", "statistics.safetensors")},
    }
    write_json(folder / "manifest.json", manifest)
