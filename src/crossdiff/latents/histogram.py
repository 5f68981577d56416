"""How strongly each latent is active: a histogram of v over the tokens with v > 0.

The largest v is unknown before the pass. So a latent's bins have a width that is a power of two, and double when a larger value
comes: pairs of bins become one, which loses nothing. The result does not depend on the order of the tokens.
"""

from __future__ import annotations

import torch

from crossdiff.activations.transfer import CPU
from crossdiff.latents.stream import Coded
from crossdiff.ranks import Ranks
from crossdiff.shapes import Float, Int64, Tensor

BINS = 64
"""Bins per latent; between half of them and all of them are in use."""
_LOG_BINS = BINS.bit_length() - 1
UNSET = -(1 << 20)
"""The exponent of a latent that has not been active."""


class Histograms:
    """Counts of v: bin k of a latent has the tokens with k w <= v < (k + 1) w, where w = 2^exponent.

    Attributes:
        counts: `[latent, bin]`; exponent: of each latent's width, `[latent]`; both on the device of the chunks until `over`.
    """

    counts: Int64[Tensor, "latent bin"]
    exponent: Int64[Tensor, " latent"]

    def __init__(self, n_latents: int, device: torch.device = CPU) -> None:
        self.counts = torch.zeros((n_latents, BINS), dtype=torch.int64, device=device)
        self.exponent = torch.full((n_latents,), UNSET, dtype=torch.int64, device=device)

    def add(self, chunk: Coded) -> None:
        """Add a chunk; values of 0 are not counted."""
        self.count(chunk.code.latent, chunk.v)

    def count(self, latent: Int64[Tensor, " pair"], v: Float[Tensor, " pair"]) -> None:
        """Add active pairs: a latent, and its v."""
        latent, v = latent[v > 0], v[v > 0].double()
        largest = torch.zeros(len(self.exponent), dtype=torch.float64, device=v.device).scatter_reduce_(0, latent, v, "amax")
        # frexp: v = m 2^e with m < 1, so BINS bins of 2^e / BINS hold it.
        needed = torch.where(largest > 0, torch.frexp(largest).exponent.long() - _LOG_BINS, UNSET)
        self._widen(torch.maximum(needed, self.exponent))
        place = (v * torch.pow(2.0, -self.exponent[latent].double())).long()
        flat = latent * BINS + place
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(flat))

    def _widen(self, exponent: Int64[Tensor, " latent"]) -> None:
        """Double the width of bins until each latent has the given exponent, which is at least its own."""
        steps = torch.where(self.exponent == UNSET, 0, exponent - self.exponent).clamp(max=_LOG_BINS + 1)
        for step in range(int(steps.max()) if len(steps) else 0):
            chosen = (steps > step).nonzero().squeeze(1)
            pairs = self.counts[chosen].view(-1, BINS // 2, 2).sum(2)
            self.counts[chosen] = torch.nn.functional.pad(pairs, (0, BINS // 2))
        self.exponent = exponent

    def merge(self, counts: Int64[Tensor, "latent bin"], exponent: Int64[Tensor, " latent"]) -> None:
        """Add the counts of other tokens."""
        other = Histograms(len(exponent), counts.device)
        other.counts, other.exponent = counts.clone(), exponent
        common = torch.maximum(self.exponent, exponent)
        other._widen(common)
        self._widen(common)
        self.counts += other.counts

    def over(self, ranks: Ranks) -> Histograms:
        """Merge the passes of several ranks, in place, on the host; only the first rank has the result."""
        self.counts, self.exponent = self.counts.cpu(), self.exponent.cpu()
        for counts, exponent in ranks.collect((self.counts, self.exponent))[1:]:
            self.merge(counts, exponent)
        return self

    def rows(self) -> list[tuple[int, float, bytes]]:
        """The latent, the width and the counts (int64, little-endian, without empty bins at the end) of each active latent."""
        found = []
        for latent in self.counts.any(1).nonzero().squeeze(1).tolist():
            counts = self.counts[latent]
            kept = counts[: int(counts.nonzero().max()) + 1].numpy()
            found.append((latent, 2.0 ** int(self.exponent[latent]), kept.astype("<i8").tobytes()))
        return found
