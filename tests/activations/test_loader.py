"""Every training token occurs once per epoch for any buffer size, and the batch of a step is always the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crossdiff.activations.loader import Batches
from crossdiff.activations.store import Store
from crossdiff.errors import UserError
from stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Activations that contain the number of their row."""
    n = 3000
    activations = torch.zeros(n, 2, 3)
    activations[:, 0, 0] = torch.arange(n)
    activations[:, 1, 2] = -torch.arange(n)
    return make_store(tmp_path_factory.mktemp("store"), activations)


ROW_BYTES = 2 * 3 * 4
SMALL, LARGE = 300 * ROW_BYTES, 10**9


def rows_of(batch: torch.Tensor) -> list[int]:
    assert torch.equal(batch[:, 0, 0], -batch[:, 1, 2]), "the sources of a token stay together"
    return [int(value) for value in batch[:, 0, 0]]


@pytest.mark.parametrize("buffer", [SMALL, LARGE])
def test_each_training_token_once_per_epoch(store: Store, buffer: int) -> None:
    batches = Batches(store, 100, seed=3, buffer_bytes=buffer)
    training = set(store.rows("train").tolist())
    seen = []
    for epoch in range(2):
        rows = [row for step in range(batches.per_epoch) for row in rows_of(batches[epoch * batches.per_epoch + step])]
        assert len(rows) == len(set(rows)) == 100 * batches.per_epoch
        assert set(rows) <= training and len(training) - len(rows) < 100
        seen.append(rows)
    assert seen[0] != seen[1], "every epoch has its own order"


@pytest.mark.parametrize("buffer", [SMALL, LARGE])
def test_the_batch_of_a_step_does_not_depend_on_earlier_reads(store: Store, buffer: int) -> None:
    batches = Batches(store, 100, seed=3, buffer_bytes=buffer)
    forwards = [rows_of(batches[step]) for step in range(2 * batches.per_epoch)]
    for step in (40, 3, 29, 0):
        assert rows_of(Batches(store, 100, seed=3, buffer_bytes=buffer)[step]) == forwards[step]
    assert rows_of(Batches(store, 100, seed=4, buffer_bytes=buffer)[0]) != forwards[0]


def test_a_batch_of_a_small_buffer_still_comes_from_all_over_the_store(store: Store) -> None:
    rows = np.array(rows_of(Batches(store, 100, seed=3, buffer_bytes=600 * ROW_BYTES)[0]))
    assert rows.max() - rows.min() > 1000
    assert np.abs(np.diff(rows)).min() < 1000 and (np.diff(rows) < 0).sum() > 30, "not in the order of the store"


def test_a_batch_larger_than_the_store(store: Store) -> None:
    with pytest.raises(UserError, match=r"batch_size 100000 is larger than the \d+ training tokens"):
        Batches(store, 100_000, seed=0)
