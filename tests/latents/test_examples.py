"""Examples: the strongest contexts are found, duplicates are dropped, and what is stored is what the crosscoder gives."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig, BatchTopKConfig, L1Config
from crossdiff.crosscoder.model import Crosscoder, new_crosscoder
from crossdiff.latents.examples import ExampleCollector, _quantile_picks, write_examples
from crossdiff.latents.stream import chunks
from planted import planted_activations
from stores import make_store

CONFIG = AnalyzeConfig(examples=4, examples_per_quantile=1, blocks=5, batch_tokens=300)


class Decoder:
    """A tokenizer as far as the examples need one."""

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = make_store(tmp_path / "store", planted_activations(3000)[0])
    # Distinct token ids, so that no two contexts are the same.
    for shard, offset in zip(store.shards, store.offsets, strict=False):
        shard["token_id"] = torch.arange(len(shard["token_id"]), dtype=torch.int32) + int(offset)
    return store


def top_examples(path: Path, latent: int) -> list[dict[str, Any]]:
    """The strongest examples of a latent with their sequences, in the order of their rank."""
    with sqlite3.connect(path) as database:
        database.row_factory = sqlite3.Row
        query = "SELECT * FROM examples JOIN sequences USING (sequence) WHERE latent = ? AND kind = 'top' ORDER BY rank"
        return [dict(row) for row in database.execute(query, (latent,))]


def crosscoder(store: Store) -> Crosscoder:
    coder = new_crosscoder(24, store.normalisation.mean, store.normalisation.scale, L1Config(), 0.7, seed=3)
    coder.encoder_bias -= 0.5
    coder.origin = {"pair": store.pair, "layer": store.layer, "sources": ["base", "chat"]}
    return coder


def collect(coder: Crosscoder, store: Store, path: Path) -> None:
    collector = ExampleCollector(coder.n_latents, CONFIG)
    for chunk in chunks(coder, store, CONFIG.blocks, CONFIG.batch_tokens):
        collector.add(chunk, coder.norms().sum(1))
    write_examples(path, coder, store, Decoder(), collector, CONFIG)


def dense_maxima(coder: Crosscoder, store: Store) -> torch.Tensor:
    """v per sequence and latent, by brute force, without position 0."""
    h = store.gather(np.arange(store.n_tokens))
    pre = coder.pre_activations(coder.normalise(h))
    v = torch.relu(pre) * coder.norms().sum(1)
    v[torch.from_numpy(store.column("position")) == 0] = 0
    return v.view(-1, 20, coder.n_latents)


def test_the_strongest_sequences_in_order(tmp_path: Path, store: Store) -> None:
    coder = crosscoder(store)
    collect(coder, store, tmp_path / "examples.sqlite")
    v = dense_maxima(coder, store)
    for latent in (0, 5, 23):
        rows = top_examples(tmp_path / "examples.sqlite", latent)
        values, sequences = v[:, :, latent].amax(1).topk(4)
        assert [row["sequence"] for row in rows] == sequences.tolist()
        assert [row["activation"] for row in rows] == pytest.approx(values.tolist(), rel=1e-4)
        first = rows[0]
        stored = np.frombuffer(first["activations"], dtype="<f4")
        torch.testing.assert_close(torch.from_numpy(stored.copy()), v[first["sequence"], :, latent], rtol=1e-4, atol=1e-5)
        assert first["position"] == int(v[first["sequence"], :, latent].argmax())
        ids = np.frombuffer(first["token_ids"], dtype="<i4")
        assert json.loads(first["tokens"]) == [f"<{token}>" for token in ids]


def test_duplicate_contexts_are_dropped(tmp_path: Path, store: Store) -> None:
    for shard in store.shards:
        shard["token_id"] = torch.zeros_like(shard["token_id"])  # every context of one length is the same
    coder = crosscoder(store)
    collect(coder, store, tmp_path / "examples.sqlite")
    with sqlite3.connect(tmp_path / "examples.sqlite") as database:
        rows = database.execute("SELECT latent, position FROM examples WHERE kind = 'top'").fetchall()
    lengths = [(latent, min(position, 8)) for latent, position in rows]
    assert len(lengths) == len(set(lengths))


def test_a_batchtopk_crosscoder_stores_only_what_passes_the_threshold(tmp_path: Path, store: Store) -> None:
    coder = crosscoder(store)
    coder.sparsity, coder.threshold = BatchTopKConfig(k=2), 2.0
    collect(coder, store, tmp_path / "examples.sqlite")
    with sqlite3.connect(tmp_path / "examples.sqlite") as database:
        rows = database.execute("SELECT activations FROM examples").fetchall()
    values = np.concatenate([np.frombuffer(row[0], dtype="<f4") for row in rows])
    assert ((values == 0) | (values > 2.0)).all()


def test_quantile_picks() -> None:
    # values sorted: 0 1 2 3 4; the quantiles' places are 4, 3.8, 3, 2, 1 from the top: 4, 3 (nearest free to 3.8), 2, 1, 0.
    values = np.array([3.0, 0.0, 4.0, 1.0, 2.0])
    picks = _quantile_picks(values, 1)
    assert [(quantile, values[index]) for quantile, index in picks] == [
        (1.0, 4.0),
        (0.95, 3.0),
        (0.75, 2.0),
        (0.5, 1.0),
        (0.25, 0.0),
    ]
    assert _quantile_picks(np.array([]), 3) == []
