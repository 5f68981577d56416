"""Twins, the latents that may carry in the base model what a chat-only latent carries in the chat model
(docs/method.md#latent-scaling), and the nearest latents of each latent.

Cosines are computed in blocks of latents, so the full latent-by-latent matrix is never in memory. Shared tokens are counted for
the candidate pairs alone.
"""

from __future__ import annotations

from typing import NamedTuple

import polars as pl
import torch

from crossdiff.activations.transfer import CPU
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.decoder import (
    BASE_INDEX,
    BASE_ONLY,
    CHAT_INDEX,
    CHAT_ONLY,
    SHARED,
    delta_norm,
    delta_norm_class,
    nearest,
)
from crossdiff.latents.stream import Chunk
from crossdiff.ranks import Ranks
from crossdiff.shapes import Bool, Float, Int64, Tensor

MAX_TWINS = 20
"""Candidates kept per latent, those with the highest cosine; bounds the table where directions have collapsed."""
N_NEIGHBOURS = 5

TWIN_COLUMNS = {
    "latent": "a chat-only latent (delta_norm at least 0.9)",
    "twin": "a base-only (at most 0.1) or shared (0.4 to 0.6) latent",
    "twin_class": "delta_norm class of the twin",
    "cosine": "cosine of the latent's chat direction and the twin's base direction",
    "n_active": "tokens on which the latent is active",
    "n_active_twin": "tokens on which the twin is active",
    "n_both": "tokens on which both are active",
    "jaccard": "n_both over the tokens on which either is active; NaN when neither ever is",
    "share_of_latent": "n_both / n_active",
    "share_of_twin": "n_both / n_active_twin",
}
NEIGHBOUR_COLUMNS = {
    "latent": "a live latent",
    "rank": "0 is the nearest",
    "neighbour": "another live latent",
    "cosine": "cosine of the two chat directions",
}
NO_TWINS = pl.DataFrame(schema={"latent": pl.Int64, "twin": pl.Int64})


class TwinCandidates(NamedTuple):
    """Pairs of a chat-only latent and a possible twin, sorted by latent, then from the highest cosine down; on the host."""

    latent: Int64[Tensor, " pair"]
    twin: Int64[Tensor, " pair"]
    cosine: Float[Tensor, " pair"]


def twin_candidates(crosscoder: Crosscoder, smallest_cosine: float) -> TwinCandidates:
    """For every chat-only latent, the base-only and shared latents whose base direction is close to its chat direction.

    Close means a cosine above the limit; each latent keeps its best `MAX_TWINS`.
    """
    delta = delta_norm(crosscoder.norms()).cpu()
    chat_only = (delta >= CHAT_ONLY[0]).nonzero().squeeze(1)
    in_base = (delta <= BASE_ONLY[1]) | ((delta >= SHARED[0]) & (delta <= SHARED[1]))
    carriers = in_base.nonzero().squeeze(1)
    directions = crosscoder.directions()
    latents, twins, cosines = [chat_only[:0]], [carriers[:0]], [torch.zeros(0)]
    for first, values, indices in nearest(directions[CHAT_INDEX][chat_only], directions[BASE_INDEX][carriers], MAX_TWINS):
        row, column = (values > smallest_cosine).nonzero(as_tuple=True)
        latents.append(chat_only[first + row])
        twins.append(carriers[indices[row, column]])
        cosines.append(values[row, column])
    return TwinCandidates(torch.cat(latents), torch.cat(twins), torch.cat(cosines))


class CoActivation:
    """Counts the tokens on which both latents of each candidate pair are active, on the device of the chunks."""

    def __init__(self, pairs: TwinCandidates, n_latents: int, device: torch.device = CPU) -> None:
        self.pairs = pairs
        self.n_both = torch.zeros(len(pairs.latent), dtype=torch.int64, device=device)
        self._twin = pairs.twin.to(device)
        self._degree = torch.bincount(pairs.latent, minlength=n_latents).to(device)
        self._first = self._degree.cumsum(0) - self._degree
        self._is_twin = torch.zeros(n_latents, dtype=torch.bool, device=device)
        self._is_twin[self._twin] = True

    def add(self, chunk: Chunk) -> None:
        """Add a chunk; the cost grows with the active pairs of the latents that have candidates."""
        if not len(self.pairs.latent):
            return
        code = chunk.code
        at_twin = self._is_twin[code.latent]
        keys = (code.token[at_twin] * code.n_latents + code.latent[at_twin]).sort().values
        has_candidates = self._degree[code.latent] > 0
        token, latent = code.token[has_candidates], code.latent[has_candidates]
        degree = self._degree[latent]
        # One row for each active pair and candidate of its latent: pairs first[latent] to first[latent] + degree.
        event = torch.repeat_interleave(torch.arange(len(latent), device=latent.device), degree)
        within = torch.arange(len(event), device=latent.device) - (degree.cumsum(0) - degree)[event]
        pair = self._first[latent][event] + within
        wanted = token[event] * code.n_latents + self._twin[pair]
        place = torch.searchsorted(keys, wanted).clamp(max=max(0, len(keys) - 1))
        found = keys[place] == wanted if len(keys) else torch.zeros_like(wanted, dtype=torch.bool)
        self.n_both += torch.bincount(pair[found], minlength=len(self.n_both))

    def over(self, ranks: Ranks) -> CoActivation:
        """Merge the passes of several ranks, in place, and bring the counts to the host."""
        self.n_both = ranks.sum(self.n_both).cpu()
        return self


def twin_table(crosscoder: Crosscoder, coactive: CoActivation, n_active: Int64[Tensor, " latent"]) -> pl.DataFrame:
    """One row per candidate pair, a latent's best overlap first; `TWIN_COLUMNS` documents the columns."""
    pairs = coactive.pairs
    delta = delta_norm(crosscoder.norms())[pairs.twin]
    table = pl.DataFrame({
        "latent": pairs.latent.numpy(),
        "twin": pairs.twin.numpy(),
        "twin_class": [delta_norm_class(value) for value in delta.tolist()],
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
    """The nearest live latents of each live one by the cosine of chat directions; `NEIGHBOUR_COLUMNS` has the columns."""
    members = active.nonzero().squeeze(1)
    directions = crosscoder.directions()[CHAT_INDEX][members]
    n = min(N_NEIGHBOURS, max(0, len(members) - 1))
    neighbours, cosines = [members.new_zeros(0, n)], [torch.zeros(0, n)]
    for first, values, indices in nearest(directions, directions, n + 1):
        own = torch.arange(first, first + len(values)).unsqueeze(1)
        # Drop the latent itself. Where copies of it pushed it off the list, drop the last entry instead.
        order = (indices == own).int().argsort(dim=1, stable=True)[:, :n]
        neighbours.append(members[indices.gather(1, order)])
        cosines.append(values.gather(1, order))
    return pl.DataFrame({
        "latent": members.repeat_interleave(n).numpy(),
        "rank": torch.arange(n).repeat(len(members)).numpy(),
        "neighbour": torch.cat(neighbours).flatten().numpy(),
        "cosine": torch.cat(cosines).flatten().double().numpy(),
    })  # fmt: skip
