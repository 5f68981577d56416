"""Every latent-scaling target against least squares in float64, and the planted cases whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import oracles
from crossdiff.config import L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents.scaling import ScalingAccumulator, Sums, scaling
from crossdiff.latents.stream import Chunk

BLOCKS, D, LATENTS = 4, 6, 5


def crosscoder(seed: int = 0) -> Crosscoder:
    generator = torch.Generator().manual_seed(seed)
    return Crosscoder(
        encoder=torch.randn(LATENTS, 2 * D, generator=generator), encoder_bias=torch.randn(LATENTS, generator=generator),
        decoder=torch.randn(LATENTS, 2 * D, generator=generator), decoder_bias=torch.randn(2 * D, generator=generator),
        mean=torch.randn(2, D, generator=generator), scale=1.7, sparsity=L1Config(),
    )  # fmt: skip


def chunk_of(coder: Crosscoder, h: torch.Tensor, block: int) -> Chunk:
    x = coder.normalise(h)
    code = coder.sparse_code(x)
    assert isinstance(code, SparseCode)
    reconstruction = code.decode(coder.decoder)
    error = x.flatten(1) - reconstruction - coder.decoder_bias
    return Chunk(
        block=block, rows=np.arange(len(h)), sequence=torch.zeros(len(h), dtype=torch.int64), numbers=np.array([0]),
        x=x.flatten(1), code=code, v=coder.v(code), reconstruction=reconstruction, error=error, h=h,
    )  # fmt: skip


def collect(coder: Crosscoder, parts: list[torch.Tensor]) -> Sums:
    accumulator = ScalingAccumulator(coder, BLOCKS)
    for block, h in enumerate(parts):
        for piece in h.split(11):
            accumulator.add(chunk_of(coder, piece, block))
    return accumulator.sums


def part_of(sums: Sums, key: str) -> torch.Tensor:
    found: torch.Tensor = sums.products[key] if key in sums.products else getattr(sums, key)
    return found


def activations(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(30, 2, D, generator=generator) for _ in range(BLOCKS)]


def widened(coder: Crosscoder) -> Crosscoder:
    """The same crosscoder in float64: what is left to differ from the oracle is the algebra alone."""
    tensors = {name: getattr(coder, name).double() for name in (*coder.parameters(), "mean")}
    return replace(coder, **tensors)


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("target", ["error", "reconstruction", "reconstruction_nobias", "activation", "activation_nobias"])
@pytest.mark.parametrize(("wide", "tolerance"), [(False, 2e-5), (True, 1e-9)])
def test_each_target_is_the_least_squares_solution(
    direction: int, source: int, target: str, wide: bool, tolerance: float
) -> None:
    coder, parts = crosscoder(), activations()
    if wide:
        coder, parts = widened(coder), [part.double() for part in parts]
    result = scaling(coder, collect(coder, parts), direction, 1 - direction, direction)
    # In the models' own space, as the definition says: directions over the scale, bias mean + b / scale.
    h = torch.cat(parts).double()
    x = (h - coder.mean.double()) * coder.scale
    f = torch.relu(x.flatten(1) @ coder.encoder.double().T + coder.encoder_bias.double())
    directions = coder.decoder.double().view(LATENTS, 2, D) / coder.scale
    bias = coder.mean.double() + coder.decoder_bias.double().view(2, D) / coder.scale
    reconstruction = torch.einsum("tf,fsd->tsd", f, directions) + bias
    for latent in range(LATENTS):
        eps = h - reconstruction
        y = {
            "error": eps[:, source] + torch.outer(f[:, latent], directions[latent, source]),
            "reconstruction": reconstruction[:, source],
            "reconstruction_nobias": reconstruction[:, source] - bias[source],
            "activation": h[:, source],
            "activation_nobias": h[:, source] - bias[source],
        }[target]
        expected = oracles.beta(f[:, latent], y, directions[latent, direction])
        assert float(result.betas[target, source].value[latent]) == pytest.approx(expected, rel=tolerance, abs=tolerance / 20)


def test_many_tokens_do_not_cost_precision() -> None:
    # Float32 chunks of 1,000 tokens against the whole in float64: sums in float32 throughout would drift.
    generator = torch.Generator().manual_seed(2)
    coder, h = crosscoder(), 3 + torch.randn(40_000, 2, D, generator=generator)
    accumulator, wide = ScalingAccumulator(coder, 1), ScalingAccumulator(widened(coder), 1)
    for piece in h.split(1000):
        accumulator.add(chunk_of(coder, piece, 0))
    wide.add(chunk_of(widened(coder), h.double(), 0))
    for key in ("f", "f2", "reconstruction", "error"):
        found, expected = part_of(accumulator.sums, key), part_of(wide.sums, key)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_sums_of_disjoint_tokens_add_up() -> None:
    coder, parts = crosscoder(), activations()
    whole = collect(coder, parts)
    first, second = collect(coder, [part[:15] for part in parts]), collect(coder, [part[15:] for part in parts])
    for key in ("n", "f", "f2", "reconstruction", "error"):
        torch.testing.assert_close(part_of(first, key) + part_of(second, key), part_of(whole, key), rtol=1e-5, atol=1e-4)


def planted(kind: str) -> Crosscoder:
    """A crosscoder that reads one chat concept perfectly: latent 0 along e0; the base side depends on the kind."""
    coder = crosscoder()
    coder.mean.zero_()
    coder.scale, coder.decoder_bias[:] = 1.0, 0.0
    for parameter, value in ((coder.encoder, 0.0), (coder.decoder, 0.0), (coder.encoder_bias, -1.0)):
        parameter.fill_(value)
    coder.encoder[0, D], coder.encoder_bias[0] = 1.0, 0.0  # reads chat along e0
    coder.decoder[0, D] = 1.0  # writes chat along e0
    if kind == "shared":
        coder.decoder[0, 0] = 1.0
    if kind == "decoupled":  # another latent, reading the base, carries the concept there
        coder.encoder[1, 0], coder.encoder_bias[1] = 1.0, 0.0
        coder.decoder[1, 0] = 1.0
    return coder


@pytest.mark.parametrize(
    ("kind", "in_base", "nu_error", "nu_reconstruction"),
    [
        ("chat_only", 0.0, 0.0, 0.0),  # the base model has nothing there
        ("shrunk", 0.6, 0.6, 0.0),  # the base model has 0.6 of it, unmodelled: it is in the error
        ("decoupled", 1.0, 0.0, 1.0),  # the base model has it all, carried by the other latent
        ("shared", 1.0, 1.0, 1.0),
    ],
)
def test_known_cases(kind: str, in_base: float, nu_error: float, nu_reconstruction: float) -> None:
    generator = torch.Generator().manual_seed(5)
    parts = []
    for _ in range(BLOCKS):
        h = 0.01 * torch.randn(400, 2, D, generator=generator)
        concept = torch.rand(400, generator=generator) * (torch.rand(400, generator=generator) < 0.5)
        h[:, 1, 0] += concept
        h[:, 0, 0] += in_base * concept
        parts.append(h)
    coder = planted(kind)
    result = scaling(coder, collect(coder, parts), direction=1, numerator=0, denominator=1)
    for target, expected in (("error", nu_error), ("reconstruction", nu_reconstruction)):
        assert float(result.nus[target].value[0]) == pytest.approx(expected, abs=0.03), target
    assert bool(result.nus["error"].value[3].isnan()), "a latent that never fires has no nu"
