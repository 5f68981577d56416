"""Latent scaling of groups of latents (docs/concepts.md#group-scaling).

The contribution of a group to a token is g_i = sum of f_ij d_j over its members, and

    beta(y) = sum_i <y_i, g_i> / sum_i ||g_i||^2

which is the latent's own beta for a group of one. Numerators add up over the members, so the sums of the analysis suffice for
them, except for the part of the error's target that the group itself contributes. That part and the denominator need
sum_i f_ij f_ik of the pairs of members, collected here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from crossdiff.activations.transfer import CPU
from crossdiff.concepts.candidates import Codes, Training
from crossdiff.concepts.clustering import Grouping
from crossdiff.concepts.similarity import Matrix
from crossdiff.config import AnalyzeConfig
from crossdiff.latents.chain import of_pair
from crossdiff.latents.decoder import BASE_INDEX, CHAT_INDEX, delta_norm, delta_norm_class
from crossdiff.latents.latent_table import MIRRORED, REASONS, scaling_columns
from crossdiff.latents.scaling import TARGETS, estimates, numerators
from crossdiff.ranks import Ranks
from crossdiff.shapes import Float64, Int64, Tensor

SIDES = (BASE_INDEX, CHAT_INDEX)
"""The directions that are measured, as indices; `CHAT_INDEX` counts from the end."""


class GroupProducts:
    """Collects sum_i f_ij f_ik of the pairs of members of a concept in one training, per block of documents.

    Attributes:
        left, right: the pairs as candidates, both orders and each candidate with itself, `[pair]`.
        products: `[block, pair]`; n: tokens on which a concept is active in a training, `[training, block, concept]`.
    """

    def __init__(self, codes: Codes, grouping: Grouping, n_blocks: int) -> None:
        self._codes, self._grouping = codes, grouping
        lefts, rights = [], []
        for t in range(len(codes.trainings)):
            members = codes.candidates_of(t)
            members = members[grouping.concept[members] >= 0]
            order = members[np.argsort(grouping.concept[members], kind="stable")]
            for group in np.split(order, np.flatnonzero(np.diff(grouping.concept[order])) + 1):
                lefts.append(np.repeat(group, len(group)))
                rights.append(np.tile(group, len(group)))
        self.left = np.concatenate(lefts)
        self.right = np.concatenate(rights)
        self.products = np.zeros((n_blocks, len(self.left)))
        self.n = np.zeros((len(codes.trainings), n_blocks, grouping.n_concepts), dtype=np.int64)
        candidates = np.arange(codes.n_candidates)
        grouped = candidates[grouping.concept >= 0]
        shape = (codes.n_candidates, grouping.n_concepts)
        self._member = Matrix((np.ones(len(grouped)), (grouped, grouping.concept[grouped])), shape=shape)

    def add(self, block: int, f: Matrix) -> None:
        """Add tokens, `[token, candidate]`."""
        for t in range(len(self._codes.trainings)):
            first, last = self._codes.first[t], self._codes.first[t + 1]
            if first == last:
                continue
            own = f[:, first:last]
            mine = (self.left >= first) & (self.left < last)
            together = Matrix(own.T @ own)
            self.products[block, mine] += np.asarray(together[self.left[mine] - first, self.right[mine] - first]).ravel()
            active = own @ self._member[first:last]
            self.n[t, block] += np.bincount(active.indices[active.data > 0], minlength=self._grouping.n_concepts)

    def over(self, ranks: Ranks) -> GroupProducts:
        """Sum over the ranks, in place."""
        ranks.sum(torch.from_numpy(self.products))
        ranks.sum(torch.from_numpy(self.n))
        return self

    def sums(self, training: int, before: int = BASE_INDEX, after: int = CHAT_INDEX) -> GroupSums:
        """The sums of one training, for all concepts; 0 for those without a member in it.

        Args:
            before, after: indices of the sources that take the places of base and chat.
        """
        trained: Training = self._codes.trainings[training]
        first, last = self._codes.first[training], self._codes.first[training + 1]
        mine = (self.left >= first) & (self.left < last)
        left, right = (torch.from_numpy(side[mine] - first) for side in (self.left, self.right))
        concept = torch.from_numpy(self._grouping.concept[self.left[mine]])
        products = torch.from_numpy(self.products[:, mine])
        chosen = trained.crosscoder.of_latents(trained.latents).to(CPU)  # where the sums are
        coder, of_latent = of_pair(chosen, trained.sums, before, after)
        directions = coder.directions().double()
        member = torch.from_numpy(self._member[first:last].toarray())

        def own(m: int, d: int) -> Float64[Tensor, "block concept"]:
            """sum_i <g_i^m, g_i^d>."""
            weight = (directions[m, left] * directions[d, right]).sum(1)
            empty = torch.zeros(len(products), self._grouping.n_concepts, dtype=torch.float64)
            return empty.index_add_(1, concept, products * weight)

        found: dict[tuple[int, str], Float64[Tensor, "model block concept"]] = {}
        for d in SIDES:
            of_latents = numerators(coder, of_latent, d)
            own_parts = torch.stack([own(m, d) for m in range(coder.n_sources)])
            of_latents["error"] = of_latent.products["error"][d if d >= 0 else coder.n_sources + d]
            for target in TARGETS:
                found[d, target] = of_latents[target] @ member
            found[d, "error"] = found[d, "error"] + own_parts
        return GroupSums(
            n=torch.from_numpy(self.n[training]),
            found=found,
            norms=torch.stack([own(BASE_INDEX, BASE_INDEX), own(CHAT_INDEX, CHAT_INDEX)]),
            cross=own(BASE_INDEX, CHAT_INDEX),
        )


@dataclass(frozen=True)
class GroupSums:
    """Sums per block for every concept, in float64; those of several trainings add up.

    Attributes:
        n: tokens on which the concept is active.
        found: (direction, target) -> sum_i <y_i^m, g_i^d>, `[model, block, concept]`.
        norms: sum_i ||g_i^d||^2 of the base and of the chat contribution; cross: sum_i <g_i^base, g_i^chat>.
    """

    n: Int64[Tensor, "block concept"]
    found: dict[tuple[int, str], Float64[Tensor, "model block concept"]]
    norms: Float64[Tensor, "side block concept"]
    cross: Float64[Tensor, "block concept"]

    def __add__(self, other: GroupSums) -> GroupSums:
        found = {key: values + other.found[key] for key, values in self.found.items()}
        return GroupSums(self.n + other.n, found, self.norms + other.norms, self.cross + other.cross)


def pooled(sums: Sequence[GroupSums]) -> GroupSums:
    """The sums of all trainings together."""
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return total


def group_table(sums: GroupSums, config: AnalyzeConfig) -> pl.DataFrame:
    """One row per concept with the columns of the latent table that follow from geometry and latent scaling.

    `delta_norm` and `decoder_cosine` are those of the contributions: norms are root mean squares over tokens, and the cosine is
    sum <g^base, g^chat> over the product of the norms. For one member they are the latent's own.
    """
    n_active = sums.n.sum(0)
    base, chat = sums.norms.sum(1).sqrt()
    along_chat = estimates(
        {target: sums.found[CHAT_INDEX, target] for target in TARGETS}, sums.norms[1], BASE_INDEX, CHAT_INDEX
    )
    mirrored = {target: sums.found[BASE_INDEX, target] for target in MIRRORED}
    along_base = estimates(mirrored, sums.norms[0], CHAT_INDEX, BASE_INDEX)
    delta = delta_norm(torch.stack([base, chat], 1))
    columns = {
        "n_active": n_active.numpy(),
        "norm_base": (base / n_active.sqrt()).numpy(),
        "norm_chat": (chat / n_active.sqrt()).numpy(),
        "delta_norm": delta.numpy(),
        "delta_norm_class": [delta_norm_class(value) for value in delta.tolist()],
        "decoder_cosine": (sums.cross.sum(0) / (base * chat)).numpy(),
    }
    columns |= scaling_columns(sums.n, along_chat, along_base, config)
    return pl.DataFrame(columns, schema_overrides=REASONS)
