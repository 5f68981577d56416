"""The cost model: its own rates are found again, and its sizes are those that tensors have."""

from __future__ import annotations

import pytest
import torch

from crossdiff.crosscoder.cost import PER_PRE_ACTIVATION, Rates, Size, calibrate, fit, time_step


def test_the_fit_finds_the_rates_of_times_that_follow_the_model() -> None:
    truth = Rates(dense=80e9, pairs=3e9, parameters=0.5e9)
    sizes = [Size(256, 4096, 32, 1024), Size(576, 2048, 100, 512), Size(64, 16384, 8, 256)]
    found = fit([(size, truth.seconds(size)) for size in sizes])
    for name in ("dense", "pairs", "parameters"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    other = Size(1024, 8192, 50, 2048)
    assert found.seconds(other) == pytest.approx(truth.seconds(other))


def test_work_is_split_and_traffic_does_not_grow_with_the_latents() -> None:
    size, large = Size(256, 4096, 32, 1024), Size(256, 65536, 32, 1024)
    whole, half = size.work(), size.work(latent_ranks=2)
    assert [amount / 2 for amount in whole] == list(half)
    assert whole == (1024 * 4096 * (512 + PER_PRE_ACTIVATION), 4 * 1024 * 32 * 512, 2 * 4096 * 512)
    assert size.traffic_bytes(8, 1) == large.traffic_bytes(8, 1) > 0
    assert size.traffic_bytes(1, 1) == 0
    assert large.traffic_bytes(1, 8) > size.traffic_bytes(1, 8) > size.n_parameters * 4


def test_a_timed_step_and_a_prediction_are_of_the_same_order() -> None:
    """Its accuracy is a benchmark's business: machines are noisy."""
    size = Size(64, 4096, 16, 512)
    predicted = calibrate(size, torch.device("cpu")).seconds(size)
    assert 0.02 < predicted / time_step(size, torch.device("cpu")) < 50
    assert size.memory_bytes() > 4 * 4 * size.n_parameters
