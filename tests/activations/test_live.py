"""A live store returns the same bits as a store on disk, and runs the models no more often than necessary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.testing import assert_close

import crossdiff.activations.live as module
from crossdiff.activations.harvest import harvest
from crossdiff.activations.live import LiveStore, open_store
from crossdiff.activations.loader import Batches
from crossdiff.activations.store import Store, verify
from crossdiff.config import BatchTopKConfig, CrosscoderConfig, DatasetConfig, HarvestConfig, L1Config, RunConfig, validate
from crossdiff.crosscoder.train import Job, train_together
from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.models.pair import Pair
from crossdiff.run import Run
from crossdiff.stages.compare import compare
from crossdiff.stages.pipeline import run_until
from crossdiff.stages.session import Session

SETTINGS = HarvestConfig(max_length=32, batch_tokens=256, shard_tokens=700, dtype="float32", storage="passes")


def make_both(folder: Path, pair: Pair, texts: tuple[Path, Path], dtype: str) -> tuple[Store, Store]:
    """Make the same harvest on disk and live."""
    datasets = tuple(DatasetConfig(path=str(path), heldout_share=0.3) for path in texts)
    for storage in ("passes", "live"):
        (folder / storage).mkdir()
        settings = SETTINGS.model_copy(update={"dtype": dtype, "storage": storage})
        harvest({1: folder / storage}, pair, datasets, settings)
    return Store(folder / "passes"), open_store(folder / "live", lambda: pair)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, pair: Pair, tiny_texts: tuple[Path, Path]) -> tuple[Store, Store]:
    return make_both(tmp_path_factory.mktemp("both"), pair, tiny_texts, "float16")


class Counter:
    """Counts the passes that a live store runs."""

    def __init__(self, store: Store, patch: pytest.MonkeyPatch) -> None:
        assert isinstance(store, LiveStore)
        self.n, original = 0, store._passes.run

        def counted(index: int) -> Any:
            self.n += 1
            return original(index)

        patch.setattr(store._passes, "run", counted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_activations_are_those_of_the_store_to_the_last_bit(
    tmp_path: Path, pair: Pair, tiny_texts: tuple[Path, Path], dtype: str
) -> None:
    stored, live = make_both(tmp_path, pair, tiny_texts, dtype)
    assert isinstance(live, LiveStore) and not isinstance(stored, LiveStore)
    rows = np.random.default_rng(0).permutation(stored.n_tokens)
    assert torch.equal(live.gather(rows), stored.gather(rows))
    for name in ("token_id", "document", "sequence", "position", "flags"):
        assert np.array_equal(live.column(name), stored.column(name))
    assert live.documents.equals(stored.documents)
    torch.testing.assert_close(live.normalisation.mean, stored.normalisation.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(live.normalisation.gram, stored.normalisation.gram, rtol=1e-12, atol=0)
    assert verify(live.folder) == []


@pytest.mark.parametrize("buffer_tokens", [700, 10**6])
def test_batches_are_the_same_and_each_pass_is_run_once_an_epoch(
    both: tuple[Store, Store], pair: Pair, buffer_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, live = both[0], open_store(both[1].folder, lambda: pair)
    buffer = buffer_tokens * 2 * 16 * 2
    expected, batches = (Batches(store, 64, seed=5, buffer_bytes=buffer) for store in (stored, live))
    counter = Counter(live, monkeypatch)
    for step in range(expected.per_epoch):
        assert torch.equal(batches[step], expected[step])
    n_passes, n_buffers = len(live.passes) - 1, -(-expected.per_epoch * 64 // buffer_tokens)
    # The reader is one buffer ahead, and a pass that spans two buffers is run for both.
    assert counter.n <= n_passes + (2 * n_buffers + 4 if buffer_tokens == 700 else 0)
    assert counter.n >= n_passes - 1
    before = counter.n
    for step in range(expected.per_epoch, 2 * expected.per_epoch):
        assert torch.equal(batches[step], expected[step])
    assert (counter.n == before) == (buffer_tokens == 10**6), "what fits into memory is computed once"


def test_the_order_differs_from_that_of_blocks(both: tuple[Store, Store]) -> None:
    """Passes are shuffled, not blocks, so a small buffer holds entire passes of the harvest."""
    _, live = both
    batches = Batches(live, 64, seed=5, buffer_bytes=700 * 2 * 16 * 2)
    rows = batches._read((0, 0)).rows
    touched = np.unique(np.searchsorted(live.passes, rows, side="right"))
    assert len(touched) <= 700 // 200 + 2, "three passes of about 230 tokens, not five blocks of 128 from up to five passes"


def test_crosscoders_trained_live_are_those_trained_from_the_store(
    tmp_path: Path, both: tuple[Store, Store], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    live_store = open_store(both[1].folder, lambda: pair)
    shared: dict[str, Any] = {"n_latents": 32, "batch_size": 64, "epochs": 2, "warmup_steps": 2}
    configs = {
        "l1": CrosscoderConfig(sparsity=L1Config(), **shared),
        "topk": CrosscoderConfig(sparsity=BatchTopKConfig(k=4), **shared),
    }
    counter, found = Counter(live_store, monkeypatch), {}
    for store in (both[0], live_store):
        jobs = []
        for name, config in configs.items():
            folder = tmp_path / store.folder.name / name
            folder.mkdir(parents=True)
            jobs.append(Job(folder, config, folder))
        found[store.is_live] = train_together(jobs, store, torch.device("cpu"))
    for stored, live in zip(found[False], found[True], strict=True):
        for name, parameter in stored.parameters().items():
            assert torch.equal(parameter, live.parameters()[name]), name
    assert counter.n <= len(both[1].passes) - 1, "one pass for two crosscoders and two epochs"


def test_a_sample_of_the_passes_gives_the_statistics_of_a_large_corpus(
    tmp_path: Path, pair: Pair, tiny_texts: tuple[Path, Path], both: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STATISTICS_TOKENS", 1500)
    _, live = make_both(tmp_path, pair, tiny_texts, "float16")
    found, whole = live.normalisation, both[0].normalisation
    assert 1500 <= live.manifest["n_statistics_tokens"] < 1500 + 256
    assert live.manifest["n_statistics_tokens"] < 0.5 * both[0].manifest["n_statistics_tokens"]
    assert found.scale == pytest.approx(whole.scale, rel=0.1)
    assert found.scale != whole.scale


def test_every_stage_of_a_run_works_live(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    settings = tiny_settings | {"compare": {"max_tokens": 1000}}
    settings["crosscoders"] = {"batchtopk": settings["crosscoders"]["batchtopk"]}
    results = {}
    for storage in ("passes", "live"):
        config = validate(RunConfig, settings | {"harvest": settings["harvest"] | {"storage": storage}}, "the test")
        run = Run.open(tmp_path / storage, create=True)
        try:
            session = Session(run, config, Console(quiet=True))
            run_until(session)
            compare(session)
        finally:
            run.close()
        results[storage] = read_json(tmp_path / storage / "comparison.json")
    assert results["live"] == results["passes"]
    live, passes = (tmp_path / storage / "batchtopk" for storage in ("live", "passes"))
    assert (live / "latents.parquet").read_bytes() == (passes / "latents.parquet").read_bytes()
    assert_close(load_file(live / "model.safetensors"), load_file(passes / "model.safetensors"), rtol=0, atol=0)
    sizes = {s: sum(file.stat().st_size for file in (tmp_path / s / "activations").glob("shard*")) for s in results}
    assert sizes["live"] < 0.3 * sizes["passes"]


def test_a_live_store_needs_its_own_models(both: tuple[Store, Store], pair: Pair) -> None:
    _, live = both
    with pytest.raises(UserError, match=r"live stores no activations; open it with the models that compute them"):
        Store(live.folder).gather(np.arange(3))
    other = Pair(pair.base, pair.chat, pair.tokenizer, pair.identity | {"tokenizer": "another"})
    with pytest.raises(UserError, match=r"the live store .* was harvested from .*, not from .*'another'.*; harvest again"):
        open_store(live.folder, lambda: other)
