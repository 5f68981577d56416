"""Average linkage of candidates by correlation, cut at a limit (docs/concepts.md#concept).

Two clusters merge while the mean correlation between their members, with negative ones counted as 0, is at least the limit.
Some pair of their members then correlates at least as much. So every concept lies within one connected component of the graph
of such pairs, components are clustered one by one, and the matrix of all candidates is never needed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

ROUNDING = 1e-9
"""Correlations this far below the limit count as equal to it."""


def clusters(r: sparse.coo_array, limit: float) -> npt.NDArray[np.int64]:
    """The cluster of each candidate, numbered from 0 in the order of their first members.

    Args:
        r: correlations of the pairs that were ever active together, both ways; all others count as 0.
    """
    n = r.shape[0]
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    row, column = r.coords
    close = (r.data >= limit - ROUNDING) & (row != column)
    graph = sparse.coo_array((np.ones(int(close.sum())), (row[close], column[close])), shape=(n, n))
    n_components, component = connected_components(graph, directed=False)
    place = _place_within(component)
    sizes = np.bincount(component, minlength=n_components)
    inside = (component[row] == component[column]) & (row != column)
    order = np.argsort(component[row[inside]], kind="stable")
    row, column, value = (part[inside][order] for part in (row, column, r.data))
    bounds = np.searchsorted(component[row], np.arange(n_components + 1))
    label = np.zeros(n, dtype=np.int64)
    for number, size in enumerate(sizes):
        if size > 1:
            pairs = slice(bounds[number], bounds[number + 1])
            distance = np.ones((size, size))
            distance[place[row[pairs]], place[column[pairs]]] = 1 - np.clip(value[pairs], 0, 1)
            np.fill_diagonal(distance, 0)
            tree = linkage(squareform(distance, checks=False), method="average")
            label[component == number] = fcluster(tree, 1 - limit + ROUNDING, criterion="distance")
    _, first, found = np.unique(np.stack([component, label]), axis=1, return_index=True, return_inverse=True)
    renumbered: npt.NDArray[np.int64] = np.argsort(np.argsort(first))[found.ravel()]
    return renumbered


def _place_within(component: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Position of each candidate among those of its component."""
    order = np.argsort(component, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order)) - np.searchsorted(component[order], component[order])
    return place


class Grouping(NamedTuple):
    """Candidates in groups.

    Attributes:
        concept: group of each candidate, -1 for those in none, `[candidate]`.
        n_trainings: number of trainings with a member, `[concept]`.
        replicated: whether those are enough, `[concept]`.
    """

    concept: npt.NDArray[np.int64]
    n_trainings: npt.NDArray[np.int64]
    replicated: npt.NDArray[np.bool_]

    @property
    def n_concepts(self) -> int:
        return len(self.n_trainings)

    @property
    def in_replicated(self) -> npt.NDArray[np.bool_]:
        """Whether a candidate belongs to a concept that replicates, `[candidate]`."""
        grouped = self.concept >= 0
        found = np.zeros(len(self.concept), dtype=np.bool_)
        found[grouped] = self.replicated[self.concept[grouped]]
        return found

    def only(self, chosen: npt.NDArray[np.bool_]) -> Grouping:
        """The chosen concepts alone, renumbered."""
        number = np.where(chosen, np.cumsum(chosen) - 1, -1)
        concept = np.where(self.concept >= 0, number[self.concept], -1) if len(chosen) else self.concept
        return Grouping(concept, self.n_trainings[chosen], self.replicated[chosen])

    def reordered(self, order: npt.NDArray[np.int64]) -> Grouping:
        """The same concepts with other numbers; `order` lists the present ones."""
        number = np.argsort(order)
        concept = np.where(self.concept >= 0, number[self.concept], -1) if len(order) else self.concept
        return Grouping(concept, self.n_trainings[order], self.replicated[order])

    def weights(self, training: npt.NDArray[np.int64]) -> sparse.csr_array:
        """Weights that sum a concept's members within each training and average over the trainings that have it.

        Returns:
            `[candidate, concept]`.
        """
        members = np.flatnonzero(self.concept >= 0)
        concept = self.concept[members]
        shape = (len(self.concept), self.n_concepts)
        return sparse.csr_array((1 / self.n_trainings[concept], (members, concept)), shape=shape)


def group(
    r: sparse.coo_array, training: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64], limit: float, share: float
) -> Grouping:
    """Group the candidates of some trainings.

    Args:
        r: correlations of all candidates, see `clusters`.
        training: training of each candidate.
        chosen: the trainings to use; candidates of the others are in no group.
        share: share of the chosen trainings in which a concept must have a member to be replicated, of at least two.
    """
    used = np.flatnonzero(np.isin(training, chosen))
    concept = np.full(len(training), -1, dtype=np.int64)
    concept[used] = clusters(sparse.csr_array(r)[used][:, used].tocoo(), limit)
    present = np.unique(np.stack([concept[used], training[used]]), axis=1)[0]
    n_trainings = np.bincount(present, minlength=concept.max(initial=-1) + 1)
    return Grouping(concept, n_trainings, n_trainings >= needed(len(chosen), share))


def needed(n_trainings: int, share: float) -> int:
    """Number of trainings in which a concept must have a member to be replicated."""
    return max(2, int(np.ceil(share * n_trainings - ROUNDING)))
