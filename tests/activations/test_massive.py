"""Tokens of massive norm in mid-sequence are left out like the first positions, in every architecture, and counted."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crossdiff.activations.harvest as module
from conftest import make_model, make_tokenizer
from crossdiff.activations.counted import Counted
from crossdiff.activations.harvest import harvest
from crossdiff.activations.store import Store
from crossdiff.config import BatchTopKConfig, DatasetConfig, HarvestConfig
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.errors import UserError
from crossdiff.models.access import residuals_after
from crossdiff.models.pair import Pair
from crossdiff.text.chat import Flag
from crossdiff.text_activations import active_pairs, read_text

SETTINGS = HarvestConfig(max_length=64, batch_tokens=512, shard_tokens=900, dtype="float32")
SINK = "0"
"""The character whose activation is massive."""


def pair_with_sink(kind: str, factor: float = 100.0) -> Pair:
    """A pair of which both models give the sink many times the usual norm."""
    tokenizer = make_tokenizer()
    models = []
    for seed in (0, 1):
        model = make_model(kind)
        weights = model.get_input_embeddings().weight
        with torch.no_grad():
            weights += 0.005 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed))
            weights[tokenizer.convert_tokens_to_ids(SINK)] *= factor
        models.append(model)
    identity = {"base": {"name": "a"}, "chat": {"name": "b"}, "tokenizer": "bytes"}
    return Pair(models[0], models[1], tokenizer, identity)


def texts(folder: Path) -> tuple[DatasetConfig, ...]:
    path = folder / "plain.jsonl"
    words = "the sea is cold and a small boat sails far from land"
    lines = [{"text": f"{words[n % 20 :]} {SINK if n % 3 == 0 else '1'} {words[: n % 17]}"} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (DatasetConfig(path=str(path), heldout_share=0.2),)


def collect(folder: Path, *args: Any) -> list[str]:
    folder.mkdir(exist_ok=True)
    return harvest({1: folder}, *args)


@pytest.mark.parametrize(("kind", "factor"), [("llama", 100), ("gpt2", 100), ("gemma2", 1000), ("qwen3", 100)])
def test_massive_tokens_are_left_out_and_counted(tmp_path: Path, kind: str, factor: float) -> None:
    """Each layer of gemma2 adds normalised vectors, so its sink needs a larger factor."""
    pair = pair_with_sink(kind, factor)
    datasets = texts(tmp_path)
    (remark,) = collect(tmp_path / "store", pair, datasets, SETTINGS)
    store = Store(tmp_path / "store")
    sink = pair.tokenizer.convert_tokens_to_ids(SINK)
    is_sink = store.column("token_id") == sink
    assert 15 < is_sink.sum() < 25 and not is_sink[store.column("position") == 0].any()
    assert np.array_equal(store.counted, (store.column("position") >= 1) & ~is_sink)
    assert not is_sink[store.rows("train")].any()
    assert (
        remark.startswith(f"{is_sink.sum()} of {store.n_tokens:,} tokens (") and f"most often '0' ({is_sink.sum()})" in remark
    )
    # The statistics are those of the other training tokens, computed anew in float64.
    h = store.gather(store.rows("train")).double()
    torch.testing.assert_close(store.normalisation.mean, h.mean(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(store.normalisation.gram, torch.einsum("nsd,ntd->st", h, h) / len(h), rtol=1e-6, atol=1e-9)


def test_the_limits_are_multiples_of_the_median_norm(tmp_path: Path) -> None:
    pair = pair_with_sink("llama")
    settings = SETTINGS.model_copy(update={"shard_tokens": 10_000})  # the median is taken from the first shard
    for name in ("store", "above"):
        (tmp_path / name).mkdir()
    harvest({1: tmp_path / "store", 2: tmp_path / "above"}, pair, texts(tmp_path), settings)
    for store in (Store(tmp_path / "store"), Store(tmp_path / "above")):
        ids, bounds = store.column("token_id"), store.sequences()
        norms = np.zeros((2, store.n_tokens))
        for start, stop in pairwise(bounds):
            read = torch.from_numpy(ids[start:stop].astype(np.int64)).unsqueeze(0)
            for source, model in enumerate(pair.models):
                norms[source, start:stop] = residuals_after(model, read, [store.layer])[0][0].double().norm(dim=1).numpy()
        medians = [np.quantile(of_source[store.column("position") >= 1], 0.5, method="lower") for of_source in norms]
        assert store.rule.norm_limits == pytest.approx([10 * median for median in medians], rel=1e-5)


def test_ordinary_tokens_and_a_multiple_of_null_are_kept(tmp_path: Path) -> None:
    ordinary = collect(tmp_path / "ordinary", pair_with_sink("llama", factor=3.0), texts(tmp_path), SETTINGS)
    assert ordinary == [] and Store(tmp_path / "ordinary").manifest["massive"]["n_tokens"] == 0
    settings = SETTINGS.model_copy(update={"max_norm_multiple": None})
    assert collect(tmp_path / "all", pair_with_sink("llama"), texts(tmp_path), settings) == []
    store = Store(tmp_path / "all")
    assert np.array_equal(store.counted, store.column("position") >= 1) and store.rule == Counted(1)


def test_a_resumed_harvest_finds_the_same_tokens(tmp_path: Path) -> None:
    pair, datasets = pair_with_sink("llama"), texts(tmp_path)
    collect(tmp_path / "whole", pair, datasets, SETTINGS)
    flush = module.ShardWriters.flush

    def stop(self: module.ShardWriters, number: int, sequences: int, seconds: float) -> None:
        flush(self, number, sequences, seconds)
        if number == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.ShardWriters, "flush", stop)
        collect(tmp_path / "resumed", pair, datasets, SETTINGS)
    assert list((tmp_path / "resumed").glob("shard-*"))
    collect(tmp_path / "resumed", pair, datasets, SETTINGS)
    whole, resumed = Store(tmp_path / "whole").manifest, Store(tmp_path / "resumed").manifest
    assert (whole["shards"], whole["massive"]) == (resumed["shards"], resumed["massive"])


def test_a_live_store_refuses_them(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"storage": "live"})
    with pytest.raises(UserError, match=r"1\d of \d+ sampled tokens .* 10 times the median norm, .* to blocks"):
        collect(tmp_path / "store", pair_with_sink("llama"), texts(tmp_path), settings)
    assert collect(tmp_path / "calm", pair_with_sink("llama", factor=1.0), texts(tmp_path), settings) == []


def test_no_latent_is_active_on_them(tmp_path: Path) -> None:
    """Neither in Python nor in the dashboard, which read a text with the rule of the training."""
    pair = pair_with_sink("llama")
    collect(tmp_path / "store", pair, texts(tmp_path), SETTINGS)
    store = Store(tmp_path / "store")
    coder = new_crosscoder(24, store.normalisation.mean.float(), store.normalisation.scale, BatchTopKConfig(k=4), 1.0, 0)
    coder.origin = {"layer": 1}
    sequence = read_text(pair.tokenizer, f"the sea {SINK} is cold", 64)
    (sink,) = np.flatnonzero(sequence.token_ids == pair.tokenizer.convert_tokens_to_ids(SINK))
    everywhere = set(range(1, len(sequence.token_ids)))
    assert set(active_pairs(pair, coder, sequence, Counted(1)).token.tolist()) == everywhere
    assert set(active_pairs(pair, coder, sequence, store.rule).token.tolist()) == everywhere - {int(sink)}


def test_the_rule() -> None:
    base, chat = torch.tensor([[3.0, 4.0], [3.0, 4.0], [6.0, 8.0], [1.0, 0.0]]), torch.ones(4, 2)
    chat[3] *= 9  # a norm of 12.7
    position = torch.arange(4)
    assert Counted(1)(position, [base, chat]).tolist() == [False, True, True, True]
    assert Counted(0, (5.0, 12.0))(position, [base, chat]).tolist() == [True, True, False, False]
    assert int(Flag.MASSIVE) == 16  # stores hold it
