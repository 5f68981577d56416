"""Twins: the latents that may carry in the base model what a chat-only latent carries in the chat model (METHOD: latent
decoupling); and the nearest latents of each latent.

All cosines are taken in blocks of latents, so that no F x F matrix is ever in memory; which tokens two latents share is counted
for the candidate pairs alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl
import torch

from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.decoder import BASE, BASE_ONLY, CHAT, CHAT_ONLY, SHARED, delta_norm
from crossdiff.latents.stream import Chunk
from crossdiff.ranks import Ranks
from crossdiff.shapes import Bool, Float, Int64, Tensor

BLOCK = 512
"""Latents whose cosines with all others are in memory at once."""
MAX_TWINS = 20
"""Candidates kept per latent, those of the highest cosine: bounds the table where directions have collapsed."""
N_NEIGHBOURS = 5

TWIN_COLUMNS = {
    "latent": "a chat-only latent (delta_norm at least 0.9)",
    "twin": "a base-only (at most 0.1) or shared (0.4 to 0.6) latent",
    "twin_class": "its delta_norm class",
    "cosine": "of the latent's chat direction with the twin's base direction",
    "n_active": "tokens on which the latent is active",
    "n_active_twin": "tokens on which the twin is active",
    "n_both": "tokens on which both are",
    "jaccard": "n_both over the tokens on which either is; NaN when neither ever is",
    "share_of_latent": "n_both / n_active",
    "share_of_twin": "n_both / n_active_twin",
}
NEIGHBOUR_COLUMNS = {
    "latent": "a latent that is ever active",
    "rank": "0 is the nearest",
    "neighbour": "another latent that is ever active",
    "cosine": "of the two chat directions",
}


@dataclass(frozen=True)
class Candidates:
    """Pairs of a chat-only latent and a possible twin, sorted by latent, then from the highest cosine down."""

    latent: Int64[Tensor, " pair"]
    twin: Int64[Tensor, " pair"]
    cosine: Float[Tensor, " pair"]


def _unit(directions: Float[Tensor, "latent d_model"]) -> Float[Tensor, "latent d_model"]:
    """Rows of norm 1; a row of zeros stays one, and has cosine 0 with everything."""
    return torch.nn.functional.normalize(directions, dim=1)


def _nearest(
    rows: Float[Tensor, "row d_model"], others: Float[Tensor, "other d_model"], n: int
) -> Iterator[tuple[int, Float[Tensor, "block n"], Int64[Tensor, "block n"]]]:
    """The `n` highest cosines of each block of rows with all others: first row, cosines, indices of the others."""
    for first in range(0, len(rows), BLOCK):
        top = (rows[first : first + BLOCK] @ others.T).topk(min(n, len(others)), dim=1)
        yield first, top.values, top.indices


def candidates(crosscoder: Crosscoder, smallest_cosine: float) -> Candidates:
    """Every chat-only latent with the base-only and shared latents whose base direction has a cosine above the limit with
    its chat direction; the best `MAX_TWINS` of each."""
    delta = delta_norm(crosscoder.norms())
    specific = (delta >= CHAT_ONLY[0]).nonzero().squeeze(1)
    in_base = (delta <= BASE_ONLY[1]) | ((delta >= SHARED[0]) & (delta <= SHARED[1]))
    carriers = in_base.nonzero().squeeze(1)
    directions = crosscoder.directions()
    rows, others = _unit(directions[CHAT][specific]), _unit(directions[BASE][carriers])
    latents, twins, cosines = [specific[:0]], [carriers[:0]], [rows.new_zeros(0)]
    for first, values, indices in _nearest(rows, others, MAX_TWINS):
        row, column = (values > smallest_cosine).nonzero(as_tuple=True)
        latents.append(specific[first + row])
        twins.append(carriers[indices[row, column]])
        cosines.append(values[row, column])
    return Candidates(torch.cat(latents), torch.cat(twins), torch.cat(cosines))


class CoActivation:
    """Counts the tokens on which both latents of each candidate pair are active."""

    def __init__(self, pairs: Candidates, n_latents: int) -> None:
        self.pairs = pairs
        self.n_both = torch.zeros(len(pairs.latent), dtype=torch.int64)
        self._degree = torch.bincount(pairs.latent, minlength=n_latents)
        self._first = self._degree.cumsum(0) - self._degree
        self._is_twin = torch.zeros(n_latents, dtype=torch.bool)
        self._is_twin[pairs.twin] = True

    def add(self, chunk: Chunk) -> None:
        """Add a chunk; the cost grows with the active pairs of the latents that have candidates."""
        if not len(self.pairs.latent):
            return
        code = chunk.code
        at_twin = self._is_twin[code.latent]
        keys = (code.token[at_twin] * code.n_latents + code.latent[at_twin]).sort().values
        asking = self._degree[code.latent] > 0
        token, latent = code.token[asking], code.latent[asking]
        degree = self._degree[latent]
        # One row for each active pair and candidate of its latent: pairs first[latent] to first[latent] + degree.
        event = torch.repeat_interleave(torch.arange(len(latent)), degree)
        pair = self._first[latent][event] + torch.arange(len(event)) - (degree.cumsum(0) - degree)[event]
        wanted = token[event] * code.n_latents + self.pairs.twin[pair]
        place = torch.searchsorted(keys, wanted).clamp(max=max(0, len(keys) - 1))
        found = keys[place] == wanted if len(keys) else torch.zeros_like(wanted, dtype=torch.bool)
        self.n_both += torch.bincount(pair[found], minlength=len(self.n_both))

    def over(self, ranks: Ranks) -> CoActivation:
        """Merge the passes of several ranks, in place."""
        ranks.sum(self.n_both)
        return self


def twin_table(crosscoder: Crosscoder, coactive: CoActivation, n_active: Int64[Tensor, " latent"]) -> pl.DataFrame:
    """One row a candidate pair, a latent's best overlap first; `TWIN_COLUMNS` documents the columns."""
    pairs = coactive.pairs
    delta = delta_norm(crosscoder.norms())[pairs.twin]
    table = pl.DataFrame({
        "latent": pairs.latent.numpy(),
        "twin": pairs.twin.numpy(),
        "twin_class": ["base_only" if value <= BASE_ONLY[1] else "shared" for value in delta.tolist()],
        "cosine": pairs.cosine.double().numpy(),
        "n_active": n_active[pairs.latent].numpy(),
        "n_active_twin": n_active[pairs.twin].numpy(),
        "n_both": coactive.n_both.numpy(),
    }, schema_overrides={"twin_class": pl.String})  # fmt: skip
    either = pl.col("n_active") + pl.col("n_active_twin") - pl.col("n_both")
    return table.with_columns(
        jaccard=pl.col("n_both") / either,
        share_of_latent=pl.col("n_both") / pl.col("n_active"),
        share_of_twin=pl.col("n_both") / pl.col("n_active_twin"),
    ).sort("latent", "n_both", "cosine", descending=[False, True, True])


def neighbour_table(crosscoder: Crosscoder, active: Bool[Tensor, " latent"]) -> pl.DataFrame:
    """The nearest latents of each active one by the cosine of the chat directions; `NEIGHBOUR_COLUMNS` has the columns."""
    members = active.nonzero().squeeze(1)
    directions = _unit(crosscoder.directions()[CHAT][members])
    n = min(N_NEIGHBOURS, max(0, len(members) - 1))
    parts = []
    for first, values, indices in _nearest(directions, directions, n + 1):
        own = torch.arange(first, first + len(values)).unsqueeze(1)
        # The latent itself is dropped; where a copy of it pushed it off the list, the last entry is.
        order = (indices == own).int().argsort(dim=1, stable=True)[:, :n]
        parts.append((own.expand(-1, n), indices.gather(1, order), values.gather(1, order)))
    own, other, cosine = (torch.cat([part[i] for part in parts]) if parts else torch.zeros(0, n) for i in range(3))
    return pl.DataFrame({
        "latent": members[own.long().flatten()].numpy(),
        "rank": torch.arange(n).repeat(len(own)).numpy(),
        "neighbour": members[other.long().flatten()].numpy(),
        "cosine": cosine.flatten().double().numpy(),
    })  # fmt: skip
