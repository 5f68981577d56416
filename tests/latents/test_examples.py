"""Examples: the strongest distinct contexts are found, and what is stored is what the crosscoder gives."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig, BatchTopKConfig, L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.latents import example_collector
from crossdiff.latents.example_collector import ExampleCollector, context_hashes, quantile_picks, ranking_of
from crossdiff.latents.example_database import write_examples
from crossdiff.latents.stream import chunks
from planted import planted_activations
from stores import make_store

CONFIG = AnalyzeConfig(examples=4, examples_per_quantile=1, blocks=5, batch_tokens=300)
N_SAMPLED = 20  # 1 example for each of 5 quantiles, 4 sampled for each


class Decoder:
    """A tokenizer as far as the examples need one."""

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """150 sequences of 20 tokens; the tokens repeat in such a way that some contexts occur several times."""
    store = make_store(tmp_path / "store", planted_activations(3000)[0])
    number = torch.arange(3000)
    for shard, first, last in zip(store.shards, store.offsets, store.offsets[1:], strict=False):
        shard["token_id"] = ((number % 20) + 20 * (number // 20 % 2)).int()[first:last]
    return store


def crosscoder(store: Store) -> Crosscoder:
    coder = new_crosscoder(24, store.normalisation.mean, store.normalisation.scale, L1Config(), 0.7, seed=3)
    coder.encoder_bias -= 0.5
    coder.encoder_bias[7] = -1e6  # dead
    coder.origin = {"pair": store.pair, "layer": store.layer, "sources": ["base", "chat"]}
    return coder


def collect(coder: Crosscoder, store: Store, config: AnalyzeConfig = CONFIG) -> ExampleCollector:
    collector = ExampleCollector(store, coder.n_latents, config)
    for chunk in chunks(coder, store, config.blocks, config.batch_tokens):
        collector.add(chunk)
    return collector


def write(coder: Crosscoder, store: Store, path: Path) -> list[dict[str, Any]]:
    """All examples with their sequences, in the order of latent, kind and rank."""
    write_examples(path, *collect(coder, store).finish(), store, Decoder(), coder.n_latents)
    with sqlite3.connect(path) as database:
        database.row_factory = sqlite3.Row
        query = "SELECT * FROM examples JOIN sequences USING (sequence) ORDER BY latent, kind DESC, rank"
        return [dict(row) for row in database.execute(query)]


def dense(coder: Crosscoder, store: Store) -> torch.Tensor:
    """v `[sequence, position, latent]` by brute force in float64, without position 0."""
    h = store.gather(np.arange(store.n_tokens)).double()
    x = (h - coder.mean.double()) * coder.scale
    v = torch.relu(x.flatten(1) @ coder.encoder.double().T + coder.encoder_bias.double()) * coder.norms().double().sum(1)
    v[torch.from_numpy(store.column("position")) == 0] = 0
    return v.view(-1, 20, coder.n_latents)


def best_of_each_context(v: torch.Tensor, ids: np.ndarray) -> dict[tuple[int, ...], tuple[float, int]]:
    """Context -> largest maximum of one latent, and its sequence. v: [sequence, position]; ids: [sequence, position]."""
    best: dict[tuple[int, ...], tuple[float, int]] = {}
    for sequence, values in enumerate(v.tolist()):
        peak = int(np.argmax(values))
        if values[peak] > 0:
            context = tuple(ids[sequence, max(0, peak - 8) : peak + 1])
            best[context] = max(best.get(context, (0.0, 0)), (values[peak], sequence))
    return best


def test_the_strongest_distinct_contexts_in_order(tmp_path: Path, store: Store) -> None:
    coder = crosscoder(store)
    rows = write(coder, store, tmp_path / "examples.sqlite")
    v, ids, dropped = dense(coder, store), store.column("token_id").reshape(-1, 20), 0
    for latent in range(24):
        top = [row for row in rows if row["latent"] == latent and row["kind"] == "top"]
        expected = sorted(best_of_each_context(v[:, :, latent], ids).values(), reverse=True)[:4]
        assert [row["sequence"] for row in top] == [sequence for _, sequence in expected]
        assert [row["activation"] for row in top] == pytest.approx([value for value, _ in expected], rel=1e-4)
        dropped += top != [] and [s for _, s in expected] != v[:, :, latent].amax(1).topk(4).indices.tolist()
    assert dropped > 0, "the texts must hold duplicates among the strongest"
    assert not [row for row in rows if row["latent"] == 7], "a dead latent has no examples"


def test_the_stored_activations_are_those_of_the_whole_sequence(tmp_path: Path, store: Store) -> None:
    coder = crosscoder(store)
    v = dense(coder, store)
    for row in write(coder, store, tmp_path / "examples.sqlite"):
        stored = np.zeros(20)
        stored[np.frombuffer(row["positions"], "<i4")] = np.frombuffer(row["activations"], "<f4")
        np.testing.assert_allclose(stored, v[row["sequence"], :, row["latent"]], rtol=1e-4, atol=1e-5)
        assert row["position"] == int(np.argmax(stored)) and row["activation"] == pytest.approx(stored.max())
        assert row["document"] == row["sequence"] and row["dataset"] == "planted" and len(row["flags"]) == 20
        np.testing.assert_array_equal(np.frombuffer(row["token_ids"], "<i4"), 20 * (row["sequence"] % 2) + np.arange(20))
    with sqlite3.connect(tmp_path / "examples.sqlite") as database:
        assert dict(database.execute("SELECT token_id, text FROM vocabulary")) == {i: f"<{i}>" for i in range(40)}


def test_a_batchtopk_crosscoder_stores_only_what_passes_the_threshold(tmp_path: Path, store: Store) -> None:
    coder = crosscoder(store)
    coder.sparsity, coder.threshold = BatchTopKConfig(k=2), 2.0
    rows = write(coder, store, tmp_path / "examples.sqlite")
    values = np.concatenate([np.frombuffer(row["activations"], dtype="<f4") for row in rows])
    assert len(values) and (values > 2.0).all()


def shown(collector: ExampleCollector) -> set[tuple[Any, ...]]:
    candidates, chosen = collector.finish()
    return {(e.latent, e.kind, e.quantile, e.rank, int(candidates.sequence[e.candidate])) for e in chosen}


@pytest.mark.parametrize(("room", "batch_tokens"), [(1, 40), (200, 300), (10**9, 3000)])
def test_the_result_depends_neither_on_the_room_nor_on_the_chunks(
    store: Store, monkeypatch: pytest.MonkeyPatch, room: int, batch_tokens: int
) -> None:
    expected = shown(collect(crosscoder(store), store))
    monkeypatch.setattr(example_collector, "ROOM", room)
    assert shown(collect(crosscoder(store), store, CONFIG.model_copy(update={"batch_tokens": batch_tokens}))) == expected


def test_memory_is_bounded_per_latent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_collector, "ROOM", 1)
    coder = crosscoder(store)
    collector, most = ExampleCollector(store, 24, CONFIG), 0
    for chunk in chunks(coder, store, CONFIG.blocks, 40):
        collector.add(chunk)
        most = max(most, sum(len(part.latent) for part in collector._parts))
        # At most twice what was last kept, and a chunk of 2 sequences.
        assert collector._n_pairs <= 2 * 24 * (4 + N_SAMPLED) * 20 + 1 + 2 * 24 * 20
    candidates, _ = collector.finish()
    assert np.bincount(candidates.latent).max() <= 4 + N_SAMPLED
    assert most > len(candidates.latent) / 2


def test_the_sample_is_a_uniform_one_of_distinct_contexts(store: Store) -> None:
    # Each context of a latent is among the 20 sampled with the same chance, whether it occurs once or often: over many seeds
    # the share of seeds in which a context is sampled is 20 / n_contexts.
    coder = crosscoder(store)
    chunk_list = list(chunks(coder, store, CONFIG.blocks, 3000))
    hits: dict[tuple[int, float], int] = defaultdict(int)
    n_seeds = 60
    for seed in range(n_seeds):
        collector = ExampleCollector(store, 24, CONFIG.model_copy(update={"seed": seed}))
        for chunk in chunk_list:
            collector.add(chunk)
        candidates, _ = collector.finish()
        for c in np.flatnonzero(ranking_of(candidates).by_key < N_SAMPLED):
            hits[int(candidates.latent[c]), float(candidates.value[c])] += 1
    v, ids = dense(coder, store), store.column("token_id").reshape(-1, 20)
    for latent in (0, 5, 23):
        n_contexts = len(best_of_each_context(v[:, :, latent], ids))
        counts = np.array([n for (which, _), n in hits.items() if which == latent])
        assert len(counts) == n_contexts > N_SAMPLED
        p = N_SAMPLED / n_contexts
        z = (counts - n_seeds * p) / np.sqrt(n_seeds * p * (1 - p))
        assert counts.sum() == n_seeds * N_SAMPLED
        assert 0.6 < z.var() < 1.6 and np.abs(z).max() < 4.5


def test_contexts_are_the_same_when_the_last_nine_tokens_are() -> None:
    # Two sequences of 12: the second differs at position 2 alone, and a third starts in the middle of the first's tokens.
    ids = np.concatenate([np.arange(12), np.arange(12), np.arange(5, 12)]).astype(np.int32)
    ids[12 + 2] = 99
    positions = np.concatenate([np.arange(12), np.arange(12), np.arange(7)])
    hashes = context_hashes(ids, np.arange(len(ids)), positions)
    first, second, third = hashes[:12], hashes[12:24], hashes[24:]
    # Position 2 is within the context of 2 to 10.
    assert (first == second).tolist() == [True] * 2 + [False] * 9 + [True]
    assert not np.isin(third, first).any(), "what begins a sequence has another context"
    assert len(np.unique(hashes)) == 12 + 9 + 7


def test_quantile_picks() -> None:
    # values sorted: 0 1 2 3 4; the quantiles' places are 4, 3.8, 3, 2, 1 from the top: 4, 3 (nearest free to 3.8), 2, 1, 0.
    values = np.array([3.0, 0.0, 4.0, 1.0, 2.0])
    picks = quantile_picks(values, 1)
    assert [(quantile, values[index]) for quantile, index in picks] == [
        (1.0, 4.0),
        (0.95, 3.0),
        (0.75, 2.0),
        (0.5, 1.0),
        (0.25, 0.0),
    ]
    assert quantile_picks(np.array([]), 3) == []


def test_a_crosscoder_that_is_never_active_and_no_quantile_examples(tmp_path: Path, store: Store) -> None:
    coder = crosscoder(store)
    coder.encoder_bias -= 1e6
    assert write(coder, store, tmp_path / "examples.sqlite") == []
    top_only = CONFIG.model_copy(update={"examples_per_quantile": 0})
    assert {kind for _, kind, *_ in shown(collect(crosscoder(store), store, top_only))} == {"top"}
