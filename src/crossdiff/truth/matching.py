"""Which planted concept a latent stands for: by decoder direction and by activation, both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from crossdiff.crosscoder.model import Crosscoder
from crossdiff.shapes import Float, Float64, Int64, Tensor
from crossdiff.truth.planted import Concepts, Tokens

SMALL_NORM = 0.1
"""A direction shorter than this share of the latent's longer one says nothing about where it points."""


@dataclass(frozen=True)
class Matches:
    """The concept of each latent, -1 for none, with the two measures of its best candidate."""

    concept: Int64[Tensor, " latent"]
    cosine: Float[Tensor, " latent"]
    correlation: Float64[Tensor, " latent"]


def direction_cosines(crosscoder: Crosscoder, concepts: Concepts) -> Float[Tensor, "latent concept"]:
    """The larger of the cosines in the two sources, where the latent has a direction and the concept a place; else -1."""
    unit = torch.nn.functional.normalize(crosscoder.directions(), dim=2)
    cosines = torch.einsum("sjd,scd->sjc", unit, concepts.directions)
    norms = crosscoder.norms()
    points = (norms > SMALL_NORM * norms.max(1, keepdim=True).values).T
    possible = points.unsqueeze(2) & (concepts.strength > 0).unsqueeze(1)
    largest: Tensor = torch.where(possible, cosines, -1.0).amax(0)
    return largest


class Correlation:
    """Pearson correlation of latent activations with concept amplitudes, from sums in float64."""

    def __init__(self, n_latents: int, n_sources: int, n_concepts: int) -> None:
        wide = torch.float64
        self.n = 0
        self.v, self.vv = torch.zeros(n_latents, dtype=wide), torch.zeros(n_latents, dtype=wide)
        self.a = torch.zeros(n_sources, n_concepts, dtype=wide)
        self.aa = torch.zeros(n_sources, n_concepts, dtype=wide)
        self.va = torch.zeros(n_sources, n_latents, n_concepts, dtype=wide)

    def add(self, v: Float[Tensor, "token latent"], amplitude: Float[Tensor, "source token concept"]) -> None:
        self.n += len(v)
        wide, other = v.double(), amplitude.double()
        self.v += wide.sum(0)
        self.vv += wide.square().sum(0)
        self.a += other.sum(1)
        self.aa += other.square().sum(1)
        self.va += wide.T @ other

    def finish(self) -> Float64[Tensor, "latent concept"]:
        """The larger of the correlations with the two sources' amplitudes; -1 where one side does not vary."""
        covariance = self.va / self.n - (self.v / self.n)[:, None] * (self.a / self.n)[:, None, :]
        spread_v = (self.vv / self.n - (self.v / self.n).square()).clamp(min=0).sqrt()
        spread_a = (self.aa / self.n - (self.a / self.n).square()).clamp(min=0).sqrt()
        correlation = covariance / (spread_v[:, None] * spread_a[:, None, :])
        largest: Tensor = correlation.nan_to_num(-1.0, -1.0, -1.0).amax(0)
        return largest


def match(
    crosscoder: Crosscoder, concepts: Concepts, tokens: Iterable[Tokens], smallest_cosine: float, smallest_correlation: float
) -> Matches:
    """The concept with the largest product of cosine and correlation, where both reach their limits."""
    n_sources, n_concepts = concepts.strength.shape
    sums, norms = Correlation(crosscoder.n_latents, n_sources, n_concepts), crosscoder.norms().sum(1)
    for part in tokens:
        code = crosscoder.sparse_code(crosscoder.normalise(part.h))
        v = torch.zeros(len(part.h), crosscoder.n_latents)
        v[code.token, code.latent] = code.values * norms[code.latent]
        sums.add(v, part.amplitude)
    cosine, correlation = direction_cosines(crosscoder, concepts), sums.finish()
    best = (cosine.clamp(min=0) * correlation.clamp(min=0)).argmax(1, keepdim=True)
    cosine, correlation = cosine.gather(1, best).squeeze(1), correlation.gather(1, best).squeeze(1)
    matched = (cosine >= smallest_cosine) & (correlation >= smallest_correlation)
    return Matches(torch.where(matched, best.squeeze(1), -1), cosine, correlation)
