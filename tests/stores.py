"""Activation stores from tensors, for tests that need no model."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import torch
from safetensors.torch import save_file

from crossdiff.activations.store import COLUMNS, FORMAT, Store
from crossdiff.files import sha256, write_json

PAIR = {"base": {"name": "a"}, "chat": {"name": "b"}, "tokenizer": "t"}


def make_store(
    folder: Path,
    activations: torch.Tensor,
    length: int = 20,
    shard: int = 1000,
    heldout: float = 0.2,
    token_ids: torch.Tensor | None = None,
) -> Store:
    """Make a store of sequences of `length` tokens, one document each, with leave_out 1. activations: [token, source, d]."""
    folder.mkdir(parents=True, exist_ok=True)
    n, n_sources, d_model = activations.shape
    number = torch.arange(n)
    columns = {name: torch.zeros(n, dtype=dtype) for name, dtype in COLUMNS.items()}
    columns |= {"document": (number // length).int(), "sequence": (number // length).int(), "position": (number % length).int()}
    columns["token_id"] = (number % 50 if token_ids is None else token_ids).int()
    columns["template_index"] -= 1
    columns["turn"] -= 1
    n_documents = -(-n // length)
    held = [document >= (1 - heldout) * n_documents for document in range(n_documents)]
    shards = []
    for index, first in enumerate(range(0, n, shard - shard % length)):
        last = min(n, first + shard - shard % length)
        path = folder / f"shard-{index:05d}.safetensors"
        tensors = {"activations": activations[first:last], **{name: c[first:last] for name, c in columns.items()}}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        shards.append({"file": path.name, "n_tokens": last - first, "bytes": path.stat().st_size, "sha256": sha256(path)})
    schema = {
        "document": pl.Int32, "dataset": pl.String, "split": pl.String, "label": pl.String, "sub_label": pl.String,
        "prompt": pl.String, "n_messages": pl.Int32, "n_tokens": pl.Int32,
    }  # fmt: skip
    rows = [(i, "planted", "heldout" if held[i] else "train", None, None, None, 0, length) for i in range(n_documents)]
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(folder / "documents.parquet")
    keep = (columns["position"] > 0) & ~torch.tensor(held)[columns["document"].long()]
    training = activations[keep].double()
    gram = torch.stack([(training * training[:, [source]]).sum(2).mean(0) for source in range(n_sources)])
    save_file({"mean": training.mean(0), "gram": gram}, folder / "statistics.safetensors")
    manifest = {
        "format": FORMAT, "pair": PAIR, "sources": ["base", "chat", "third"][:n_sources], "layer": 1, "n_layers": 2,
        "d_model": d_model, "dtype": "float32", "max_length": length, "leave_out": 1, "datasets": ["planted"],
        "n_documents": n_documents, "n_sequences": n_documents, "n_tokens": n, "n_statistics_tokens": len(training),
        "seconds": 1.0, "shards": shards,
        "files": {name: sha256(folder / name) for name in ("documents.parquet", "statistics.safetensors")},
    }  # fmt: skip
    write_json(folder / "manifest.json", manifest)
    return Store(folder)
