"""Intervals: by hand, by their definition, and their coverage on planted concepts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from crossdiff.config import L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.scaling import ScalingAccumulator, Sums, numerators, scaling
from crossdiff.latents.stream import Chunk
from crossdiff.statistics import jackknife_se, ratio, student_t, wilson
from crossdiff.truth.planted import BASE_INDEX, CHAT_INDEX, KINDS, Concepts, Tokens, draw, plant
from crossdiff.truth.truth_config import PlantedConfig

BLOCKS = 20


def left_out(values: torch.Tensor) -> torch.Tensor:
    """Means without each block."""
    return (values.sum(0) - values) / (len(values) - 1)


def test_wilson_by_hand() -> None:
    # 8 of 10: centre (0.8 + 3.8415 / 20) / 1.38415 = 0.7167, half 1.96 / 1.38415 * sqrt(0.016 + 0.0096) = 0.2266
    found = wilson(8, 10)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-3)
    assert wilson(0, 5).low == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="no observations"):
        wilson(0, 0)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    # For equal blocks the jackknife of a mean is the standard error of the block means: sd([1, 2, 3, 6], ddof 1) / 2.
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64).unsqueeze(1)
    without_each = (values.sum() - values) / 3
    assert float(jackknife_se(without_each)) == pytest.approx(float(values.std()) / 2)


def test_the_ends_are_where_the_difference_is_at_the_edge_of_its_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    b = 2 + torch.randn(12, 6, generator=generator, dtype=torch.float64)
    a = 0.3 * b + torch.randn(12, 6, generator=generator, dtype=torch.float64)
    found = ratio(a.mean(0), b.mean(0), left_out(a), left_out(b))
    for end in (found.low, found.high):
        # For the mean of blocks the jackknife is the standard error of the mean.
        difference = a - end * b
        error = difference.std(0) / np.sqrt(12)
        torch.testing.assert_close(difference.mean(0).abs(), student_t(12) * error)
    assert ((found.low < found.value) & (found.value < found.high)).all()
    torch.testing.assert_close(found.value, a.mean(0) / b.mean(0))


def test_a_denominator_that_may_be_0_leaves_no_ratio() -> None:
    b = torch.tensor([[1.0, 1.0], [-1.0, 1.1], [1.0, 0.9], [-0.5, 1.0]], dtype=torch.float64)
    a = torch.ones_like(b) + 0.1 * torch.arange(4).unsqueeze(1)
    found = ratio(a.mean(0), b.mean(0), left_out(a), left_out(b))
    assert found.value[0].isnan() and found.low[0].isnan() and found.high[0].isnan()
    assert found.low[1] < found.value[1] < found.high[1]


def test_a_small_denominator_stretches_the_upper_side() -> None:
    # a is 1 in every block; b has mean 1 and standard deviation 1, so its interval is 1 +- 2.093 / sqrt(20) = [0.532, 1.468].
    z = torch.arange(20, dtype=torch.float64).unsqueeze(1)
    a, b = torch.ones_like(z), 1 + (z - z.mean()) / z.std()
    found = ratio(a.mean(0), b.mean(0), left_out(a), left_out(b))
    assert float(found.low) == pytest.approx(1 / 1.468, abs=1e-3)
    assert float(found.high) == pytest.approx(1 / 0.532, abs=4e-3)


def frozen(concepts: Concepts) -> Crosscoder:
    """A crosscoder made from the concepts, with the base direction of the weaker ones shrunk to 0."""
    strength = concepts.strength.clone()
    strength[BASE_INDEX, concepts.kind == KINDS.index("weaker")] = 0.0
    directions = concepts.directions * (strength > 0).unsqueeze(2)
    decoder = directions.transpose(0, 1).flatten(1)
    readers = (strength > 0).sum(0).unsqueeze(1)
    return Crosscoder(
        encoder=decoder / readers, encoder_bias=torch.full((len(decoder),), -0.3), decoder=decoder,
        decoder_bias=torch.zeros(decoder.shape[1]), mean=concepts.mean, scale=1.0, sparsity=L1Config(),
    )  # fmt: skip


def sums_of(coder: Crosscoder, documents: Iterable[Tokens], n_blocks: int) -> Sums:
    """One pass; document i lies in block i % n_blocks."""
    parts: list[list[torch.Tensor]] = [[] for _ in range(n_blocks)]
    accumulator = ScalingAccumulator(coder, n_blocks)

    def add(block: int, h: torch.Tensor) -> None:
        x = coder.normalise(h)
        code = coder.sparse_code(x)
        reconstruction = code.decode(coder.decoder)
        error = x.flatten(1) - reconstruction - coder.decoder_bias
        chunk = Chunk(
            block=block, rows=np.arange(len(h)), sequence=torch.zeros(len(h), dtype=torch.int64), numbers=np.array([0]),
            x=x.flatten(1), code=code, v=coder.v(code), reconstruction=reconstruction, error=error, h=h,
        )  # fmt: skip
        accumulator.add(chunk)

    for tokens in documents:
        if n_blocks == 1:  # the truth, from many documents: not kept
            add(0, tokens.h)
            continue
        for block in range(n_blocks):
            parts[block].append(tokens.h[tokens.document % n_blocks == block])
    for block, held in enumerate(parts):
        if held:
            add(block, torch.cat(held))
    return accumulator.sums


@pytest.mark.slow
def test_the_interval_holds_the_truth_in_95_percent_of_the_latents() -> None:
    # Truth: the same frozen crosscoder on 50 times as many other documents. 4 stores x 36 latents x 2 ratios.
    covered = []
    for seed in range(2):
        config = PlantedConfig(
            d_model=16, shared=14, chat_only=6, base_only=3, weaker=6, rotated=3, decoupled=4, active=2.0, documents=400,
            document_tokens=16, seed=seed,
        )  # fmt: skip
        concepts = plant(config)
        coder = frozen(concepts)
        many = config.model_copy(update={"documents": 50 * config.documents})
        exact = numerators(coder, sums_of(coder, draw(concepts, many, stream=1), 1), CHAT_INDEX)
        for stream in (2, 3):
            sums = sums_of(coder, draw(concepts, config, stream), BLOCKS)
            found = scaling(coder, sums, CHAT_INDEX, BASE_INDEX, CHAT_INDEX)
            enough = (sums.n.sum(0) >= 100) & ((sums.n > 0).sum(0) >= BLOCKS / 2)
            for target in ("error", "reconstruction"):
                nu = found.nus[target]
                usable = enough & nu.value.isfinite()
                truth = exact[target][BASE_INDEX, 0] / exact[target][CHAT_INDEX, 0]
                covered.append(((nu.low <= truth) & (truth <= nu.high))[usable])
    share = torch.cat(covered).double()
    assert len(share) > 200
    assert 0.90 <= float(share.mean()) <= 0.99
