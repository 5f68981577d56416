"""Estimates are close to what a harvest takes, and a disk that is too small is reported."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from crossdiff.activations.harvest import harvest
from crossdiff.activations.plan import plan
from crossdiff.activations.store import Store
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.models.pair import Pair

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_estimate_is_near_the_truth(
    tmp_path: Path, pair: Pair, tiny_texts: tuple[Path, Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = tuple(DatasetConfig(path=str(path)) for path in tiny_texts)
    config = HarvestConfig(max_length=32, batch_tokens=256, shard_tokens=3000, dtype=dtype)  # type: ignore[arg-type]
    found = plan(pair, 1, datasets, config)
    harvest({1: tmp_path}, pair, datasets, config)
    store = Store(tmp_path)
    assert found.n_tokens == pytest.approx(store.n_tokens, rel=0.05)
    assert found.store_bytes == pytest.approx(sum(shard["bytes"] for shard in store.manifest["shards"]), rel=0.1)
    assert found.seconds == pytest.approx(found.n_tokens / found.tokens_per_second)
    assert found.memory_bytes > 1e7
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, found.store_bytes))
    assert found.check_disk(tmp_path / "not" / "yet", config) == found.store_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, found.store_bytes - 1))
    advice = r"left; set harvest\.dtype to int8, set" if dtype == "float16" else "left; set"
    advice += r" harvest\.storage to live, lower max_documents"
    with pytest.raises(UserError, match=rf"the store needs 0\.00 GB and the disk of {tmp_path} has 0\.00 GB {advice}"):
        found.check_disk(tmp_path / "not" / "yet", config)


def test_a_size_that_cannot_be_known_is_requested(pair: Pair, tiny_texts: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"the length of name cannot be known .*; set its max_documents or max_tokens"):
        plan(pair, 1, (DatasetConfig(path="org/name"),), HarvestConfig())
    limited = DatasetConfig(path=str(tiny_texts[0]), max_tokens=123_456)
    assert plan(pair, 1, (limited,), HarvestConfig(max_length=32, batch_tokens=256)).n_tokens == 123_456
