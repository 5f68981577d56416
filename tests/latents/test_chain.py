"""Chains of models: every pair against least squares in float64, changes and first appearances by hand."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from test_scaling import BLOCKS, chunk_of

import oracles
from crossdiff.config import AnalyzeConfig, L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.view import identity
from crossdiff.latents.chain import KEPT, emergence, of_pair, pairs_of, step_table
from crossdiff.latents.latent_table import scaling_columns
from crossdiff.latents.ranking import RANKED
from crossdiff.latents.scaling import ScalingAccumulator, Sums, scaling

SOURCES = ("base", "sft", "chat")
D, LATENTS = 6, 5


def chain() -> tuple[Crosscoder, Sums, torch.Tensor]:
    """A crosscoder on three models in float64, its sums, and the activations `[token, source, d_model]`."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    coder = Crosscoder(
        encoder=random(LATENTS, 3 * D), encoder_bias=random(LATENTS),
        decoder=random(LATENTS, 3 * D), decoder_bias=random(3 * D),
        mean=random(3, D), scale=1.7, sparsity=L1Config(), view=identity(SOURCES),
    )  # fmt: skip
    accumulator = ScalingAccumulator(coder, BLOCKS)
    parts = [random(40, 3, D) for _ in range(BLOCKS)]
    for block, h in enumerate(parts):
        accumulator.add(chunk_of(coder, h, block))
    return coder, accumulator.sums, torch.cat(parts)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 2), (0, 2), (2, 0)])
def test_each_pair_is_measured_as_if_it_were_base_and_chat(before: int, after: int) -> None:
    coder, sums, h = chain()
    result = scaling(*of_pair(coder, sums, before, after), -1, 0, -1)
    f = torch.relu((h - coder.mean).flatten(1) * coder.scale @ coder.encoder.T + coder.encoder_bias)
    directions = coder.decoder.view(LATENTS, 3, D) / coder.scale
    bias = coder.mean + coder.decoder_bias.view(3, D) / coder.scale
    reconstruction = torch.einsum("tf,fsd->tsd", f, directions) + bias
    for latent in range(LATENTS):
        expected = {}
        for model in (before, after):
            error = (h - reconstruction)[:, model] + torch.outer(f[:, latent], directions[latent, model])
            nobias = reconstruction[:, model] - bias[model]
            along = directions[latent, after]
            expected[model] = [oracles.beta(f[:, latent], y, along) for y in (error, nobias)]
        for number, target in enumerate(("error", "reconstruction_nobias")):
            nu = expected[before][number] / expected[after][number]
            assert float(result.betas[target, 0].value[latent]) == pytest.approx(expected[before][number], rel=1e-9)
            found = float(result.nus[target].value[latent])
            assert found == pytest.approx(nu, rel=1e-9) or found != found  # undefined where the denominator may be 0


def test_two_models_are_their_own_pair_to_the_last_bit() -> None:
    coder, sums, _ = chain()
    two, of_two = of_pair(coder, sums, 0, 2)
    again, sums_again = of_pair(two, of_two, 0, -1)
    assert again.sources == ("base", "chat")
    assert all(torch.equal(values, again.parameters()[name]) for name, values in two.parameters().items())
    assert torch.equal(two.mean, again.mean)
    assert torch.equal(of_two.directions, sums_again.directions)
    assert all(torch.equal(values, sums_again.products[target]) for target, values in of_two.products.items())


def test_random_directions_stay_behind_those_of_the_pair() -> None:
    coder, sums, _ = chain()
    random = torch.full((1, LATENTS, D), 7.0, dtype=torch.float64)
    products = {target: torch.cat([values, values[:1]]) for target, values in sums.products.items()}
    more = Sums(torch.cat([sums.directions, random]), sums.n, sums.f, sums.f2, products)
    _, pair = of_pair(coder, more, 1, 2)
    assert len(pair.directions) == 3 and torch.equal(pair.directions[2], random[0])
    assert torch.equal(pair.products["error"][2], sums.products["error"][0][[1, 2]])


def test_pairs_are_the_steps_and_the_whole() -> None:
    assert pairs_of(("base", "chat")) == [("base", "chat")]
    assert pairs_of(SOURCES) == [("base", "sft"), ("sft", "chat"), ("base", "chat")]


def judged(**columns: list[object]) -> pl.DataFrame:
    """A table with verdicts as `step_table` reads it; what is not given is 0."""
    n = len(next(iter(columns.values())))
    return pl.DataFrame({name: columns.get(name, [0.0] * n) for name in KEPT} | {"latent": list(range(n))})


def test_a_step_is_named_by_its_verdict_and_by_the_intervals() -> None:
    verdicts = ["chat_specific", "base_specific", "rotated", "undecided", "dead", "shared", "shared", "shared", "shared",
                "latent_decoupling"]  # fmt: skip
    delta = [0.9, 0.1, 0.5, 0.5, 0.5, 0.65, 0.65, 0.35, 0.5, 0.95]
    high = [1.0] * 5 + [0.9, 1.1, 2.0, 0.9, 0.9]
    mirrored = [1.0] * 5 + [2.0, 2.0, 0.8, 0.9, 2.0]
    table = judged(
        verdict=list(verdicts), verdict_reason=[""] * 10, delta_norm=list(delta),
        **{f"{nu}_high": list(high) for nu in RANKED}, **{f"{nu}_mirrored_high": list(mirrored) for nu in RANKED},
    )  # fmt: skip
    found = step_table(table, "base", "sft")["change"].to_list()
    assert found == ["appears", "vanishes", "turns", "undecided", "dead", "grows", "steady", "shrinks", "steady", "steady"]


def test_a_latent_emerges_where_the_model_before_lacks_it() -> None:
    rows = {  # changes base -> sft, sft -> chat, base -> chat
        0: ("appears", "steady", "appears"),
        1: ("steady", "turns", "turns"),
        2: ("steady", "grows", "steady"),
        3: ("steady", "undecided", "steady"),
        4: ("vanishes", "appears", "steady"),  # comes back
        5: ("grows", "grows", "appears"),  # by degrees: no step adds it, but the last model has it alone
        6: ("dead", "dead", "dead"),
        7: ("vanishes", "steady", "vanishes"),
    }
    table = pl.DataFrame([
        {"latent": latent, "before": before, "after": after, "change": change}
        for latent, changes in rows.items()
        for (before, after), change in zip(pairs_of(SOURCES), changes, strict=True)
    ])  # fmt: skip
    found = dict(emergence(table, SOURCES).iter_rows())
    assert found == {0: "sft", 1: "chat", 2: "base", 3: None, 4: "chat", 5: None, 6: None, 7: "base"}


def test_the_columns_of_a_step_are_those_of_the_latent_table() -> None:
    coder, sums, _ = chain()
    pair, of_two = of_pair(coder, sums, 0, 1)
    along = [scaling(pair, of_two, direction, 1 + direction, direction) for direction in (-1, 0)]
    columns = scaling_columns(sums.n, along[0], along[1], AnalyzeConfig(min_active=1))
    assert {name for name in KEPT if name.startswith("nu_")} <= set(columns)
