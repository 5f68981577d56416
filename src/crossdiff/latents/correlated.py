"""Latents that are active together: the Pearson correlation of their v over tokens, 0 where silent (docs/concepts.md).

All pairs of latents over all tokens would cost more than the rest of the analysis. So the sums run over a random sample of
about `SAMPLE` tokens (over all of them in a smaller store), and over a block of latents at a time. The sample is chosen by a
hash of the token's row, so it is the same in any order of the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from crossdiff.latents.example_collector import mixed
from crossdiff.latents.stream import Coded
from crossdiff.ranks import Ranks

SAMPLE = 1 << 16
"""Tokens in the sample, more or less."""
N_CORRELATED = 5
"""Correlated latents that are stored of each latent."""
LEAST, LEAST_ACTIVE = 0.1, 10
"""The smallest correlation that is stored, and the sampled tokens on which a latent must be active to have one."""
BLOCK = 256
"""Latents whose products with all others are in memory at once."""

Floats = npt.NDArray[np.float64]


class Sampled(NamedTuple):
    """Some tokens of the sample: their number, and their active pairs; `token` counts from 0."""

    n_tokens: int
    token: npt.NDArray[np.int64]
    latent: npt.NDArray[np.int64]
    v: npt.NDArray[np.float32]


class Correlations:
    """Collects the sample, and correlates its latents.

    Args:
        n_tokens: tokens of the whole pass.
    """

    def __init__(self, n_latents: int, n_tokens: int, seed: int) -> None:
        self.n_latents = n_latents
        share = min(1.0, SAMPLE / max(1, n_tokens))
        self._below = np.uint64(min(int(share * 2**64), 2**64 - 1))
        self._seed = mixed(np.array([seed], np.uint64))[0]
        self._parts: list[Sampled] = []

    def add(self, chunk: Coded) -> None:
        """Add the tokens of a chunk that belong to the sample."""
        chosen = mixed(mixed(chunk.rows.astype(np.uint64)) ^ self._seed) <= self._below
        if not chosen.any():
            return
        number = np.cumsum(chosen) - 1
        token, latent, v = (values.cpu().numpy() for values in (chunk.code.token, chunk.code.latent, chunk.v.float()))
        kept = chosen[token]
        self._parts.append(Sampled(int(chosen.sum()), number[token[kept]], latent[kept], v[kept]))

    def over(self, ranks: Ranks) -> Correlations:
        """Merge the samples of several ranks on the first one."""
        self._parts = [part for parts in ranks.collect(self._parts) for part in parts]
        return self

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the sample."""
        return sum(part.n_tokens for part in self._parts)

    def rows(self) -> list[tuple[int, int, int, float, int]]:
        """Latent, rank, other latent, correlation, and the tokens of the sample on which both are active; the highest first."""
        matrix = self._matrix()
        by_token = matrix.tocsr()
        n, active = max(1, matrix.shape[0]), (matrix > 0).astype(np.int64)
        total = np.asarray(matrix.sum(0), np.float64).ravel()
        deviation = np.sqrt(np.maximum(np.asarray(matrix.power(2).sum(0)).ravel() - total**2 / n, 0))
        deviation[np.asarray(active.sum(0)).ravel() < LEAST_ACTIVE] = 0
        found = []
        for first in range(0, self.n_latents, BLOCK):
            block = slice(first, min(first + BLOCK, self.n_latents))
            products = (matrix[:, block].T @ by_token).tocoo()
            mine, other = products.coords
            mine = mine + first
            scale = deviation[mine] * deviation[other]
            r = np.divide(products.data - total[mine] * total[other] / n, scale, out=np.zeros(len(mine)), where=scale > 0)
            kept = np.flatnonzero((r >= LEAST) & (mine != other))
            best = kept[np.lexsort((other[kept], -r[kept], mine[kept]))]
            rank = np.arange(len(best)) - np.searchsorted(mine[best], mine[best])
            best, rank = best[rank < N_CORRELATED], rank[rank < N_CORRELATED]
            both = _both(active, mine[best], other[best])
            columns = (mine[best], rank, other[best], r[best], both)
            found += list(zip(*(column.tolist() for column in columns), strict=True))
        return found

    def _matrix(self) -> sparse.csc_array:
        """v of the sample, `[token, latent]`."""
        first = np.cumsum([0, *(part.n_tokens for part in self._parts)])
        token = [part.token + start for part, start in zip(self._parts, first, strict=False)]
        empty = np.empty(0, np.int64)
        entries = (
            np.concatenate([np.empty(0), *(part.v for part in self._parts)]),
            (np.concatenate([empty, *token]), np.concatenate([empty, *(part.latent for part in self._parts)])),
        )
        return sparse.csc_array(entries, shape=(int(first[-1]), self.n_latents))


def _both(active: sparse.csc_array, mine: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The number of tokens on which both latents of each pair are active."""
    return np.asarray(active[:, mine].multiply(active[:, other]).sum(0), np.int64).ravel()
