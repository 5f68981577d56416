"""Controls that can fail: other cuts, permuted documents, two disjoint halves of the trainings (docs/concepts.md#controls)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from crossdiff.concepts.clustering import Grouping, group
from crossdiff.concepts.similarity import Matrix, Products
from crossdiff.config import ConceptsConfig
from crossdiff.ranks import Ranks
from crossdiff.statistics import bootstrap

CUTS = (0.5, 0.6, 0.7, 0.8)
RESAMPLES = 500


@dataclass(frozen=True)
class Pool:
    """The candidates of all trainings.

    Attributes:
        training, energy: training of each candidate and its energy, `[candidate]`.
        specific: whether its verdict is chat_specific, `[candidate]`.
    """

    training: npt.NDArray[np.int64]
    energy: npt.NDArray[np.float64]
    specific: npt.NDArray[np.bool_]

    @property
    def trainings(self) -> npt.NDArray[np.int64]:
        """The trainings that have a candidate."""
        return np.unique(self.training)

    def shares(self, among: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Each candidate's share of the energy of those in `among` in its training, divided by the number of trainings.

        The sum over a set of candidates is the mean share of the energy that the set holds.
        """
        total = np.bincount(self.training[among], self.energy[among], minlength=int(self.training.max(initial=0)) + 1)
        n_trainings = max(1, int((total > 0).sum()))
        whole = total[self.training]
        found: npt.NDArray[np.float64] = np.divide(
            self.energy * among, whole * n_trainings, out=np.zeros_like(self.energy), where=whole > 0
        )
        return found

    def of_concepts(self, shares: npt.NDArray[np.float64], grouping: Grouping) -> npt.NDArray[np.float64]:
        """The sum of shares over the members of each concept."""
        total = np.zeros(grouping.n_concepts)
        grouped = grouping.concept >= 0
        np.add.at(total, grouping.concept[grouped], shares[grouped])
        return total


def cut_table(
    r: sparse.coo_array, permuted: sparse.coo_array, pool: Pool, chosen: Sequence[int], config: ConceptsConfig
) -> Any:
    """For every cut: number of concepts, how many replicate, the energy that those hold, and how many do if permuted."""
    rows = []
    used = np.array(chosen, dtype=np.int64)
    for cut in sorted({*CUTS, config.correlation}):
        found = group(r, pool.training, used, cut, config.replicated)
        control = group(permuted, pool.training, used, cut, config.replicated)
        rows.append({
            "correlation": cut,
            "n_concepts": found.n_concepts,
            "n_replicated": int(found.replicated.sum()),
            "energy": float(pool.shares(np.ones_like(pool.specific))[found.in_replicated].sum()),
            "specific_energy": float(pool.shares(pool.specific)[found.in_replicated].sum()),
            "n_replicated_permuted": int(control.replicated.sum()),
        })  # fmt: skip
    return rows


def halves(trainings: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """Two disjoint sets of the same number of trainings, at least two each; None if there are fewer than four."""
    size = len(trainings) // 2
    if size < 2:
        return None
    return np.array(trainings[:size], dtype=np.int64), np.array(trainings[size : 2 * size], dtype=np.int64)


class Halves:
    """The replicated concepts of two disjoint sets of trainings, and their activations together per block of documents."""

    def __init__(self, r: sparse.coo_array, pool: Pool, sets: Sequence[npt.NDArray[np.int64]], config: ConceptsConfig, n: int):
        self.sets = tuple(sets)
        groups = [group(r, pool.training, chosen, config.correlation, config.replicated) for chosen in sets]
        self.groups = [found.only(found.replicated) for found in groups]
        shares = pool.shares(np.ones_like(pool.specific))
        self.energy = [pool.of_concepts(shares, found) for found in self.groups]
        self._weights = Matrix(sparse.hstack([found.weights(pool.training) for found in self.groups]))
        self._limit = config.correlation
        self.blocks = [Products.empty(self._weights.shape[1]) for _ in range(n)]

    def add(self, block: int, v: Matrix) -> None:
        """Add tokens, `[token, candidate]`."""
        self.blocks[block].add(Matrix(v @ self._weights))

    def over(self, ranks: Ranks) -> Halves:
        """Merge the passes of several ranks, in place."""
        for products in self.blocks:
            products.over(ranks)
        return self

    def results(self, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
        """Of each half, the share of its replicated concepts that a replicated concept of the other half correlates with."""
        n = np.array([products.n for products in self.blocks], dtype=np.float64)
        total = np.stack([products.total for products in self.blocks])
        products = np.stack([products.products.toarray() for products in self.blocks])
        draws = np.random.default_rng(seed).multinomial(len(n), np.full(len(n), 1 / len(n)), RESAMPLES)
        weights = np.concatenate([np.ones((1, len(n))), draws])
        size = self.groups[0].n_concepts
        best: list[list[Any]] = [[], []]
        for weight in weights:
            r = _correlations(weight @ n, weight @ total, np.tensordot(weight, products, 1))[:size, size:]
            for half, found in enumerate((r, r.T)):
                best[half].append(found.max(1, initial=-1.0) >= self._limit)
        rows = []
        for half, (chosen, energy) in enumerate(zip(self.sets, self.energy, strict=True)):
            found_again = np.array(best[half], dtype=np.float64)
            by_number = found_again.mean(1) if found_again.shape[1] else np.full(len(weights), np.nan)
            by_energy = found_again @ energy / energy.sum() if energy.sum() else np.full(len(weights), np.nan)
            rows.append({
                "trainings": [names[training] for training in chosen],
                "n_replicated": self.groups[half].n_concepts,
                "found": asdict(bootstrap(float(by_number[0]), by_number[1:])),
                "found_energy": asdict(bootstrap(float(by_energy[0]), by_energy[1:])),
            })  # fmt: skip
        return rows


def _correlations(n: float, total: npt.NDArray[np.float64], products: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Pearson correlations from sums; 0 where one side does not vary."""
    covariance = products - np.outer(total, total) / max(1.0, n)
    deviation = np.sqrt(np.clip(np.diagonal(covariance), 0, None))
    scale = np.outer(deviation, deviation)
    found: npt.NDArray[np.float64] = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    return found
