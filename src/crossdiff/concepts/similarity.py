"""Which latents are active on the same tokens: Pearson correlations of v over all tokens (docs/concepts.md#similarity).

    r_jk = (n sum v_j v_k - sum v_j sum v_k) / sqrt((n sum v_j^2 - (sum v_j)^2) (n sum v_k^2 - (sum v_k)^2))

A latent that is not active counts with v = 0. Only tokens on which both are active contribute to sum v_j v_k, so it is summed
from sparse codes, in float64. Pairs that are never active together are not stored; their correlation is negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse

from crossdiff.concepts.candidates import Codes
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents.stream import Read
from crossdiff.ranks import Ranks
from crossdiff.shapes import Tensor

Matrix: TypeAlias = sparse.csr_array


def matrix_of(codes: Sequence[SparseCode], first: npt.NDArray[np.int64], values: Sequence[Tensor]) -> Matrix:
    """The codes of all trainings side by side, `[token, candidate]`, in float64, on the host."""
    token = np.concatenate([code.token.cpu().numpy() for code in codes])
    candidate = np.concatenate([code.latent.cpu().numpy() + start for code, start in zip(codes, first, strict=False)])
    entries = np.concatenate([value.double().cpu().numpy() for value in values])
    return sparse.csr_array((entries, (token, candidate)), shape=(codes[0].n_tokens, int(first[-1])))


@dataclass
class Products:
    """Sums over tokens: their number, sum v of each candidate, and sum v v' of each pair that is active together."""

    n: int
    total: npt.NDArray[np.float64]
    products: Matrix

    @classmethod
    def empty(cls, n_candidates: int) -> Products:
        return cls(0, np.zeros(n_candidates), Matrix((n_candidates, n_candidates)))

    def add(self, v: Matrix) -> None:
        """Add tokens, `[token, candidate]`."""
        self.n += v.shape[0]
        self.total += v.sum(0)
        self.products = self.products + v.T @ v

    def over(self, ranks: Ranks) -> Products:
        """Merge the passes of several ranks, in place; only the first rank has the result."""
        for n, total, products in ranks.collect((self.n, self.total, self.products))[1:]:
            self.n += n
            self.total = self.total + total
            self.products = self.products + products
        return self

    def covariance(self, weights: Matrix, others: Matrix) -> npt.NDArray[np.float64]:
        """n times the covariance of weighted sums of candidates, `[column of weights, column of others]`.

        Args:
            weights, others: `[candidate, sum]`.
        """
        both = (weights.T @ self.products @ others).toarray()
        means = np.outer(weights.T @ self.total, others.T @ self.total) / max(1, self.n)
        found: npt.NDArray[np.float64] = both - means
        return found

    def variance(self, weights: Matrix) -> npt.NDArray[np.float64]:
        """n times the variance of weighted sums of candidates, `[column of weights]`."""
        squares = (weights * (self.products @ weights)).sum(0)
        return np.asarray(squares - (weights.T @ self.total) ** 2 / max(1, self.n))

    def correlation(self, weights: Matrix, others: Matrix) -> npt.NDArray[np.float64]:
        """Pearson correlations of weighted sums of candidates; NaN where one of them does not vary."""
        variances = np.outer(self.variance(weights), self.variance(others))
        with np.errstate(divide="ignore", invalid="ignore"):
            found: npt.NDArray[np.float64] = np.where(
                variances > 0, self.covariance(weights, others) / np.sqrt(np.abs(variances)), np.nan
            )
        return found

    def pairs(self) -> sparse.coo_array:
        """Correlations of the pairs of candidates that are active together, `[candidate, candidate]`."""
        found = self.products.tocoo()
        row, column = found.coords
        variance = self.products.diagonal() - self.total**2 / max(1, self.n)
        covariance = found.data - self.total[row] * self.total[column] / max(1, self.n)
        scale = np.sqrt(np.maximum(variance[row], 0) * np.maximum(variance[column], 0))
        kept = scale > 0
        r = np.divide(covariance, scale, out=np.zeros_like(covariance), where=kept)
        return sparse.coo_array((r[kept], (row[kept], column[kept])), shape=found.shape)


def permuted_rows(read: Read, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """The tokens of a batch with its sequences in another order, for the control in which nothing may replicate.

    Several sequences are needed; a batch of one is returned as it is, so `Similarity` leaves it out of the control.
    """
    sequence = read.sequence.numpy()
    rank = np.zeros(int(sequence.max()) + 1, dtype=np.int64)
    present = np.unique(sequence)
    rank[present] = generator.permutation(len(present))
    return np.argsort(rank[sequence], kind="stable")


class Similarity:
    """Collects the products of all candidates, and again with the documents of all trainings but the first permuted."""

    def __init__(self, codes: Codes, seed: int) -> None:
        self._codes = codes
        self._seed = seed
        self.products = Products.empty(codes.n_candidates)
        self.permuted = Products.empty(codes.n_candidates)

    def add(self, read: Read) -> None:
        """Add a batch of whole sequences."""
        codes = self._codes.of(read)
        matrix = matrix_of(codes, self._codes.first, self._codes.v(codes))
        self.products.add(matrix)
        if len(np.unique(read.sequence)) < 2:
            return
        generator = np.random.default_rng([self._seed, int(read.numbers[0])])
        blocks = [matrix[:, self._codes.candidates_of(t)] for t in range(len(codes))]
        for t in range(1, len(blocks)):
            blocks[t] = blocks[t][permuted_rows(read, generator)]
        self.permuted.add(Matrix(sparse.hstack(blocks)))

    def over(self, ranks: Ranks) -> Similarity:
        """Merge the passes of several ranks, in place."""
        self.products.over(ranks)
        self.permuted.over(ranks)
        return self
