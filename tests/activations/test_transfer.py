"""Activations that are computed, copied and read on an accelerator are those of the CPU. Without one, the CPU stands in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch

import crossdiff.activations.transfer as module
from crossdiff.activations.ahead import after_next, read_ahead
from crossdiff.activations.harvest import harvest
from crossdiff.activations.live import LiveStore, open_store
from crossdiff.activations.loader import Batches
from crossdiff.activations.store import COLUMNS, Store
from crossdiff.activations.transfer import CPU, ToDevice, ToHost
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.models.pair import Pair, load_pair

SETTINGS = HarvestConfig(max_length=32, batch_tokens=256, shard_tokens=700, dtype="float16", storage="passes")
BUFFER = 700 * 2 * 16 * 2


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def device_pair(tiny_pair: tuple[Path, Path], device: torch.device) -> Pair:
    return load_pair(str(tiny_pair[0]), str(tiny_pair[1]), device, dtype="float32")


def test_copies_to_the_host_are_complete(device: torch.device) -> None:
    """Also when their sources are computed late, and dropped at once."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(512, 512, generator=generator, dtype=torch.float64)
    expected, h = matrix, matrix.to(device)
    for _ in range(20):
        expected = torch.nn.functional.normalize(expected @ matrix)
        h = torch.nn.functional.normalize(h @ matrix.to(device))
    numbers = torch.arange(10**6, device=device) * 2
    arriving = ToHost([h, numbers])
    del h, numbers
    torch.zeros(10**6, dtype=torch.int64, device=device).fill_(7)  # takes the memory, if it is free
    found, counted = arriving.wait()
    assert found.device == counted.device == CPU
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(counted, torch.arange(10**6) * 2)


def test_a_copy_to_the_device_has_the_same_bits(device: torch.device) -> None:
    batch = torch.randn(100, 2, 3).half()
    found = ToDevice(batch, device).wait()
    assert found.device.type == device.type
    assert torch.equal(found.cpu(), batch)


def test_copies_wait_for_what_they_copy_and_readers_for_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls with CUDA, with its streams replaced."""
    monkeypatch.setattr(module, "is_asynchronous", lambda device: True)
    streams = {way: create_autospec(torch.cuda.Stream, instance=True) for way in ("to the host", "to the device", "current")}
    monkeypatch.setattr(module, "_stream", lambda device, way: streams[way])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["current"])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device, pin_memory: torch.empty(tensor.shape))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", record := Mock())
    arriving = ToHost([torch.ones(3)])
    streams["to the host"].wait_stream.assert_called_once_with(streams["current"])
    done = streams["to the host"].record_event.return_value
    done.synchronize.assert_not_called()
    assert torch.equal(arriving.wait()[0], torch.ones(3))
    done.synchronize.assert_called_once_with()
    sent = ToDevice(torch.ones(3), CPU)
    assert torch.equal(sent.wait(), torch.ones(3))
    streams["current"].wait_event.assert_called_once_with(streams["to the device"].record_event.return_value)
    record.assert_called_once_with(streams["current"])


def test_a_harvest_on_a_device_has_the_activations_of_the_cpu(
    tmp_path: Path, pair: Pair, device_pair: Pair, datasets: tuple[DatasetConfig, ...], device: torch.device
) -> None:
    for name, each in (("cpu", pair), ("device", device_pair)):
        (tmp_path / name).mkdir()
        harvest({1: tmp_path / name}, each, datasets, SETTINGS.model_copy(update={"dtype": "float32"}))
    expected, found = Store(tmp_path / "cpu"), Store(tmp_path / "device")
    rows = np.arange(expected.n_tokens)
    torch.testing.assert_close(found.gather(rows), expected.gather(rows), rtol=0, atol=1e-4)
    for name in COLUMNS:
        assert np.array_equal(found.column(name), expected.column(name)), name
    torch.testing.assert_close(found.normalisation.mean, expected.normalisation.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.normalisation.gram, expected.normalisation.gram, rtol=1e-4, atol=0)


@pytest.mark.parametrize("buffer_bytes", [BUFFER, 10**9])
def test_batches_are_the_same_on_every_device(
    tmp_path: Path,
    device_pair: Pair,
    datasets: tuple[DatasetConfig, ...],
    device: torch.device,
    buffer_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a store on disk and from a live one, whose activations stay where they are computed; in any order of steps."""
    for storage in ("passes", "live"):
        (tmp_path / storage).mkdir()
        harvest({1: tmp_path / storage}, device_pair, datasets, SETTINGS.model_copy(update={"storage": storage}))
    stored, live = Store(tmp_path / "passes"), open_store(tmp_path / "live", lambda: device_pair)
    assert isinstance(live, LiveStore)
    assert live.home(device_pair.device) == device_pair.device
    expected = Batches(stored, 64, 5, buffer_bytes)
    of_live = Batches(live, 64, 5, buffer_bytes, device)
    with monkeypatch.context() as patch:
        if device == CPU:
            patch.setattr(Store, "home", lambda store, device: torch.device("cpu:0"))  # as if it were not the same device
        sent = Batches(stored, 64, 5, buffer_bytes, device)
    for step in (*range(expected.per_epoch + 3), 2, 3, 0):
        for batches in (sent, of_live):
            assert batches[step].device == device_pair.device
            assert torch.equal(batches[step].cpu(), expected[step]), step
    for batches in (expected, sent, of_live):
        batches.close()


def test_items_are_read_ahead_in_order_and_errors_are_raised() -> None:
    def numbers() -> Iterator[int]:
        yield from range(10)
        raise ValueError("the end")

    found = []
    with pytest.raises(ValueError, match="the end"):
        for number in read_ahead(numbers(), 4):
            found.append(number)
    assert found == list(range(8)), "the error comes in place of the numbers that are made with it"
    assert list(read_ahead(iter(range(9)), 4)) == list(range(9))
    assert list(read_ahead([], 4)) == []


def test_an_item_comes_when_the_next_one_is_made() -> None:
    made = []

    def make(number: int) -> int:
        made.append(number)
        return number

    found = [(number, list(made)) for number in after_next(make(number) for number in range(3))]
    assert found == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])]
    assert list(after_next([])) == []
