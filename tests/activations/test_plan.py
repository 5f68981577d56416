"""Estimates are close to what a harvest takes, and a disk that is too small is reported."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

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


def test_documents_are_read_whole_so_a_limit_in_tokens_is_exceeded(pair: Pair, tmp_path: Path) -> None:
    config = HarvestConfig(max_length=32, batch_tokens=256)

    def planned(n_records: int, n_letters: int, **options: Any) -> int:
        path = tmp_path / f"{n_records}.jsonl"
        path.write_text((json.dumps({"text": "a" * n_letters}) + "\n") * n_records)
        return plan(pair, 1, (DatasetConfig(path=str(path), **options),), config).n_tokens

    # A BOS and 9 letters are 10 tokens. One of 62 letters is two windows with a BOS each.
    assert planned(5, 62, max_tokens=10) == 64
    assert planned(5, 9, max_tokens=123_456) == 50
    assert planned(100, 9, max_tokens=123_456) == 1000
    assert planned(100, 9, max_tokens=801) == 806  # beyond the 64 documents that are read, by half a document


def test_a_mix_ends_with_its_first_dataset_and_the_plan_knows_cut_answers(pair: Pair, tiny_texts: tuple[Path, Path]) -> None:
    config = HarvestConfig(max_length=32, batch_tokens=256)
    alone = [plan(pair, 1, (DatasetConfig(path=str(path)),), config).n_tokens for path in tiny_texts]
    mixed = tuple(DatasetConfig(path=str(path), weight=weight) for path, weight in zip(tiny_texts, (1, 3), strict=True))
    found = plan(pair, 1, mixed, config)
    assert found.n_tokens == pytest.approx(min(alone[0], alone[1] / 3) * 4, abs=1)
    assert any("of the assistant's tokens of chat are beyond harvest.max_length 32" in remark for remark in found.remarks)
