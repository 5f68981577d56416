"""How much of the difference between the models something accounts for (docs/concepts.md#completeness).

    1 - var(h^chat - h^base - c) / var(h^chat - h^base),      var(y) = E||y - E y||^2

where c is the difference according to a coder, or to some of its latents. A constant difference counts for neither side.
"""

from __future__ import annotations

import torch

from crossdiff.activations.transfer import CPU
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.decoder import BASE_INDEX, CHAT_INDEX
from crossdiff.latents.stream import Chunk
from crossdiff.ranks import Ranks
from crossdiff.shapes import Float, Float64, Int64, Tensor
from crossdiff.statistics import Estimate, jackknife


class Variance:
    """The variance of a vector over tokens, from sums per block of documents in float64."""

    def __init__(self, n_blocks: int, d_model: int, device: torch.device = CPU) -> None:
        self.n: Int64[Tensor, " block"] = torch.zeros(n_blocks, dtype=torch.int64, device=device)
        self.total: Float64[Tensor, "block d_model"] = torch.zeros(n_blocks, d_model, dtype=torch.float64, device=device)
        self.square: Float64[Tensor, " block"] = torch.zeros(n_blocks, dtype=torch.float64, device=device)

    def add(self, block: int, y: Float[Tensor, "token d_model"]) -> None:
        """Add the tokens of a block."""
        wide = y.double()
        self.n[block] += len(y)
        self.total[block] += wide.sum(0)
        self.square[block] += wide.square().sum()

    def over(self, ranks: Ranks) -> Variance:
        """Sum over the ranks, in place, and bring the sums to the host."""
        self.n, self.total, self.square = (ranks.sum(tensor).cpu() for tensor in (self.n, self.total, self.square))
        return self

    def of(self, blocks: Int64[Tensor, " chosen"]) -> float:
        """E||y - E y||^2 over the tokens of some blocks."""
        n = self.n[blocks].sum()
        return float(self.square[blocks].sum() / n - (self.total[blocks].sum(0) / n).square().sum())


def explained(residual: Variance, whole: Variance) -> Estimate[float]:
    """1 - var(residual) / var(whole), with the jackknife interval over blocks of documents; NaN if `whole` does not vary."""
    filled = whole.n.nonzero().squeeze(1)
    if len(filled) < 2 or whole.of(filled) <= 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    value = 1 - residual.of(filled) / whole.of(filled)
    without = [filled[filled != block] for block in filled]
    left_out = torch.tensor([1 - residual.of(kept) / whole.of(kept) for kept in without], dtype=torch.float64)
    found = jackknife(value, left_out)
    return Estimate(value, float(found.low), float(found.high))


def difference(y: Float[Tensor, "token column"], n_sources: int) -> Float[Tensor, "token d_model"]:
    """The chat model's columns minus the base model's."""
    parts = y.view(len(y), n_sources, -1)
    return parts[:, CHAT_INDEX] - parts[:, BASE_INDEX]


class DifferenceExplained:
    """Collects how much of the difference between the models all latents of a crosscoder account for."""

    def __init__(self, crosscoder: Crosscoder, n_blocks: int) -> None:
        self._n_sources = crosscoder.n_sources
        self.whole = Variance(n_blocks, crosscoder.d_model, crosscoder.encoder.device)
        self.residual = Variance(n_blocks, crosscoder.d_model, crosscoder.encoder.device)

    def add(self, chunk: Chunk) -> None:
        """Add a chunk; a coder with one decoder does not reconstruct both models, so it collects nothing."""
        if self._n_sources > 1:
            self.whole.add(chunk.block, difference(chunk.x, self._n_sources))
            self.residual.add(chunk.block, difference(chunk.error, self._n_sources))

    def over(self, ranks: Ranks) -> DifferenceExplained:
        """Merge the passes of several ranks, in place."""
        self.whole.over(ranks)
        self.residual.over(ranks)
        return self

    def estimate(self) -> Estimate[float]:
        """The share that all latents account for."""
        return explained(self.residual, self.whole)
