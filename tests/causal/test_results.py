"""Estimates over conversations, against numbers made by hand and by loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from setting import arm

from crossdiff.causal.interventions import Comparison
from crossdiff.causal.results import Bootstrap, arm_results, comparison_results, latent_results

# Two conversations; the second has no token in the last span. [arm, conversation, span]
TOTAL = np.array(
    [
        [[1.0, 4.0, 9.0], [3.0, 2.0, 0.0]],  # none
        [[0.5, 2.0, 3.0], [1.5, 1.0, 0.0]],  # half
        [[1.0, 4.0, 9.0], [1.0, 0.0, 0.0]],  # one latent, which changes the second conversation only
    ]
)
N = np.array([[1, 2, 3], [1, 1, 0]])


def test_means_over_conversations_by_hand() -> None:
    bootstrap = Bootstrap(TOTAL, N, ["none", "half", "single"], 200, 0)
    results = {(r.intervention, r.span): r for r in arm_results({"kl": bootstrap}, [arm("none"), arm("half"), arm("single")])}
    assert results["none", "first"].kl.value == pytest.approx((1 + 3) / 2)
    assert results["none", "2_to_10"].kl.value == pytest.approx((4 / 2 + 2 / 1) / 2)
    assert results["none", "from_11"].kl.value == pytest.approx(9 / 3)
    assert results["none", "from_11"].n_conversations == 1
    assert results["none", "response"].kl.value == pytest.approx((14 / 6 + 5 / 2) / 2)
    assert results["half", "first"].closed.value == pytest.approx(0.5)
    assert results["half", "from_11"].closed.value == pytest.approx(1 - 1 / 3)
    assert results["none", "first"].closed.value == 0


def test_other_measures_stand_beside_kl_with_the_same_draws() -> None:
    arms = [arm("none"), arm("half"), arm("single")]
    one, twice = (Bootstrap(TOTAL * factor, N, ["none", "half", "single"], 200, 0) for factor in (1, 2))
    for result in arm_results({"kl": one, "nll": twice}, arms):
        ends = (result.measures["nll"].value, result.measures["nll"].low, result.measures["nll"].high)
        assert ends == pytest.approx((2 * result.kl.value, 2 * result.kl.low, 2 * result.kl.high), nan_ok=True)


def test_the_interval_is_the_bootstraps() -> None:
    generator = np.random.default_rng(1)
    kl = generator.exponential(size=(1, 40, 1))
    total = np.concatenate([kl, np.zeros((1, 40, 2))], axis=2)
    n = np.tile([1, 0, 0], (40, 1))
    got = arm_results({"kl": Bootstrap(total, n, ["none"], 4000, 0)}, [arm("none")])[0].kl
    draws = [kl[0, generator.integers(0, 40, 40), 0].mean() for _ in range(4000)]
    assert (got.low, got.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.04)


def test_the_paired_difference_is_tighter_than_the_two_means() -> None:
    # worse = better + 1 on every conversation: the difference is certain although the means are not.
    spread = np.random.default_rng(0).exponential(5, size=(30, 1))
    total = np.stack([np.concatenate([spread + shift, np.zeros((30, 2))], 1) for shift in (2.0, 0.0, 1.0)])
    bootstrap = Bootstrap(total, np.tile([1, 0, 0], (30, 1)), ["none", "good", "bad"], 500, 0)
    found = comparison_results(bootstrap, [Comparison(name="c", better="good", worse="bad")])
    difference = next(entry.difference for entry in found if entry.span == "first")
    assert (difference.value, difference.low, difference.high) == pytest.approx((1, 1, 1))
    assert np.isnan(next(entry.difference.value for entry in found if entry.span == "from_11"))  # no token there


def test_arms_of_one_intervention_are_averaged_and_their_spread_kept() -> None:
    total = np.array([[[4.0, 0, 0]], [[1.0, 0, 0]], [[3.0, 0, 0]]])
    bootstrap = Bootstrap(total, np.array([[1, 0, 0]]), ["none", "random", "random"], 100, 0)
    found = arm_results({"kl": bootstrap}, [arm("none"), arm("random"), arm("random")])
    random = next(entry for entry in found if (entry.intervention, entry.span) == ("random", "first"))
    assert (random.kl.value, random.n_arms, random.spread) == (2.0, 2, (1.0, 3.0))


def test_latents_alone() -> None:
    arms = [arm("none"), arm("half"), arm("single")]
    arms[2] = replace(arms[2], latent=7)
    table = latent_results(Bootstrap(TOTAL, N, ["none", "half", "single"], 200, 0), arms)
    row = table.row(0, named=True)
    assert row["latent"] == 7
    assert row["kl_reduction_first"] == pytest.approx((0 + 2) / 2)
    assert row["closed_first"] == pytest.approx(1 / 2)
    assert row["conversations_changed"] == 0.5


def test_no_gap_is_nan_and_not_a_number() -> None:
    total = np.zeros((2, 3, 3))
    found = arm_results({"kl": Bootstrap(total, np.ones((3, 3), dtype=int), ["none", "b"], 100, 0)}, [arm("none"), arm("b")])
    assert all(np.isnan(entry.closed.value) for entry in found)
    assert all(entry.kl.value == 0 for entry in found)


def test_the_order_of_the_arms_has_no_influence() -> None:
    names = ["none", "half", "single"]
    one = Bootstrap(TOTAL, N, names, 100, 0)
    other = Bootstrap(TOTAL[::-1], N, names[::-1], 100, 0)
    for name in names:
        np.testing.assert_array_equal(one.mean(name, "response"), other.mean(name, "response"))
