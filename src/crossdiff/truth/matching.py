"""Which planted concept a latent stands for, by decoder direction and by activation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.shapes import Float, Float64, Int64, Tensor
from crossdiff.sources import SOURCES
from crossdiff.truth.planted import Concepts, Tokens

NOTHING = 1e-6
SMALL_NORM = 0.1
"""A direction shorter than this share of the latent's longer one says nothing about where the latent points."""


@dataclass(frozen=True)
class Matches:
    """The concept of each latent, -1 for none, with the two measures of its best candidate."""

    concept: Int64[Tensor, " latent"]
    cosine: Float[Tensor, " latent"]
    correlation: Float64[Tensor, " latent"]


def seen_directions(crosscoder: Crosscoder, concepts: Concepts) -> Float[Tensor, "view way concept d_model"]:
    """The directions in which a concept can appear in what the coder reads: from each model alone, and from both together.

    Their norm is 1, or 0 where the concept does not appear: the difference of the models shows nothing of an unchanged concept.
    """
    placed = concepts.strength.unsqueeze(2) * concepts.directions
    alone = torch.einsum("vs,scd->vscd", crosscoder.view.matrix, placed[_read(crosscoder)])
    ways = torch.cat([alone, alone.sum(1, keepdim=True)], dim=1)
    shows = ways.norm(dim=3, keepdim=True) > NOTHING
    return torch.where(shows, torch.nn.functional.normalize(ways, dim=3), 0.0)


def direction_cosines(crosscoder: Crosscoder, concepts: Concepts) -> Float[Tensor, "latent concept"]:
    """The largest cosine between a latent's directions and the directions in which a concept appears; -1 without any."""
    unit = torch.nn.functional.normalize(crosscoder.directions(), dim=2)
    ways = seen_directions(crosscoder, concepts)
    cosines = torch.einsum("vjd,vwcd->vwjc", unit, ways)
    norms = crosscoder.norms()
    points = (norms > SMALL_NORM * norms.max(1, keepdim=True).values).T
    possible = points[:, None, :, None] & (ways.norm(dim=3) > 0).unsqueeze(2)
    largest: Tensor = torch.where(possible, cosines, -1.0).amax((0, 1))
    return largest


def _read(crosscoder: Crosscoder) -> list[int]:
    """Indices of the planted models that the coder reads."""
    return [SOURCES.index(name) for name in crosscoder.view.reads]


class Correlation:
    """Pearson correlation of latent activations with concept amplitudes, from sums in float64."""

    def __init__(self, n_latents: int, n_sources: int, n_concepts: int) -> None:
        wide = torch.float64
        self.n = 0
        self.v = torch.zeros(n_latents, dtype=wide)
        self.vv = torch.zeros(n_latents, dtype=wide)
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
        mean_v = self.v / self.n
        mean_a = self.a / self.n
        covariance = self.va / self.n - mean_v[:, None] * mean_a[:, None, :]
        spread_v = (self.vv / self.n - mean_v.square()).clamp(min=0).sqrt()
        spread_a = (self.aa / self.n - mean_a.square()).clamp(min=0).sqrt()
        correlation = covariance / (spread_v[:, None] * spread_a[:, None, :])
        largest: Tensor = correlation.nan_to_num(-1.0, -1.0, -1.0).amax(0)
        return largest


def match(
    crosscoder: Crosscoder, concepts: Concepts, tokens: Iterable[Tokens], smallest_cosine: float, smallest_correlation: float
) -> Matches:
    """Match each latent to the concept with the largest product of cosine and correlation, if both reach their limits."""
    n_sources, n_concepts = concepts.strength.shape
    sums = Correlation(crosscoder.n_latents, n_sources, n_concepts)
    for part in tokens:
        code = crosscoder.sparse_code(crosscoder.normalise(part.h[:, _read(crosscoder)]))
        v = torch.zeros(len(part.h), crosscoder.n_latents)
        v[code.token, code.latent] = crosscoder.v(code)
        sums.add(v, part.amplitude)
    cosine, correlation = direction_cosines(crosscoder, concepts), sums.finish()
    best = (cosine.clamp(min=0) * correlation.clamp(min=0)).argmax(1, keepdim=True)
    cosine, correlation = cosine.gather(1, best).squeeze(1), correlation.gather(1, best).squeeze(1)
    matched = (cosine >= smallest_cosine) & (correlation >= smallest_correlation)
    return Matches(torch.where(matched, best.squeeze(1), -1), cosine, correlation)
