"""Harvesting: the stored residuals are the models', a killed harvest resumes, and bad activations are named."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import crossdiff.activations.harvest as module
from crossdiff.activations.harvest import harvest
from crossdiff.activations.store import Store, verify
from crossdiff.config import DatasetConfig, HarvestConfig, UserError
from crossdiff.models.access import residual_after
from crossdiff.models.pair import Pair, load_pair

SETTINGS = HarvestConfig(max_length=32, batch_tokens=256, shard_tokens=700, dtype="float32")


class Killed(Exception):
    """What the test kills the harvest with."""


@pytest.fixture(scope="module")
def pair(tiny_pair: tuple[Path, Path]) -> Pair:
    return load_pair(str(tiny_pair[0]), str(tiny_pair[1]), torch.device("cpu"))


@pytest.fixture(scope="module")
def datasets(tiny_texts: tuple[Path, Path]) -> tuple[DatasetConfig, ...]:
    return (
        DatasetConfig(path=str(tiny_texts[0]), heldout_share=0.3),
        DatasetConfig(path=str(tiny_texts[1]), label_column="kind", heldout_share=0.3),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, pair: Pair, datasets: tuple[DatasetConfig, ...]) -> Store:
    folder = tmp_path_factory.mktemp("store")
    harvest(folder, pair, 1, datasets, SETTINGS)
    return Store(folder)


def test_stored_residuals_are_those_of_each_model_on_the_same_ids(store: Store, pair: Pair) -> None:
    bounds, ids = store.sequences(), store.column("token_id")
    for number in (0, 7, len(bounds) - 2):
        rows = np.arange(bounds[number], bounds[number + 1])
        alone = torch.from_numpy(ids[rows].astype(np.int64)).unsqueeze(0)
        for source, model in enumerate(pair.models):
            expected = residual_after(model, alone, torch.ones_like(alone), 1)[0]
            torch.testing.assert_close(store.gather(rows)[:, source], expected, rtol=0, atol=1e-5)


def test_every_document_is_there_once_and_the_counts_agree(store: Store) -> None:
    documents = store.documents
    assert documents.height == 150  # 60 plain, 90 conversations
    assert verify(store.folder) == []
    counts = np.bincount(store.column("document"), minlength=150)
    assert counts.tolist() == documents["n_tokens"].to_list()
    assert int(counts.sum()) == store.n_tokens
    positions, bounds = store.column("position"), store.sequences()
    for first, last in itertools.pairwise(bounds):
        assert positions[first:last].tolist() == list(range(last - first))
    assert set(documents["label"].unique()) == {None, "greeting", "question", "order"}


def test_statistics_are_over_counted_training_tokens(store: Store) -> None:
    h = store.gather(store.rows("train")).double()
    torch.testing.assert_close(store.normalisation.mean, h.mean(0))
    x = (h - h.mean(0)) * store.normalisation.scale
    assert float(x.square().sum(2).mean()) == pytest.approx(16, rel=1e-6)


def test_a_killed_harvest_goes_on_to_the_same_store(
    tmp_path: Path, store: Store, pair: Pair, datasets: tuple[DatasetConfig, ...]
) -> None:
    original, calls = module.paired_residuals, 0

    def counted(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise Killed
        return original(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "paired_residuals", counted)
        with pytest.raises(Killed):
            harvest(tmp_path, pair, 1, datasets, SETTINGS)
    assert not (tmp_path / "manifest.json").exists()
    n_whole = len(list(tmp_path.glob("*.safetensors")))
    assert n_whole >= 2
    harvest(tmp_path, pair, 1, datasets, SETTINGS)
    again = Store(tmp_path)
    assert [s["sha256"] for s in again.manifest["shards"]] == [s["sha256"] for s in store.manifest["shards"]]
    assert torch.equal(again.normalisation.gram, store.normalisation.gram)
    assert torch.equal(again.normalisation.mean, store.normalisation.mean)


def test_values_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_pair: tuple[Path, Path], datasets: tuple[DatasetConfig, ...]
) -> None:
    pair = load_pair(str(tiny_pair[0]), str(tiny_pair[1]), torch.device("cpu"))
    pair.chat.get_input_embeddings().weight.mul_(1e9)  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match=r"do not fit torch\.float16; set harvest.dtype to bfloat16"):
        harvest(tmp_path, pair, 1, datasets, SETTINGS.model_copy(update={"dtype": "float16"}))
    pair.chat.get_input_embeddings().weight.fill_(torch.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match="NaN or infinite activations in documents"):
        harvest(tmp_path, pair, 1, datasets, SETTINGS)


def test_everything_held_out_is_refused(tmp_path: Path, pair: Pair, tiny_texts: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="no training tokens: every document is held out"):
        harvest(tmp_path, pair, 1, (DatasetConfig(path=str(tiny_texts[0]), heldout_share=1.0),), SETTINGS)


def test_two_datasets_of_one_name_are_refused(tmp_path: Path, pair: Pair, tiny_texts: tuple[Path, Path]) -> None:
    twice = (DatasetConfig(path=str(tiny_texts[0])), DatasetConfig(path=str(tiny_texts[0])))
    with pytest.raises(UserError, match="two datasets are called 'plain'"):
        harvest(tmp_path, pair, 1, twice, SETTINGS)
