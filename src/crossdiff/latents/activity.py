"""Where each latent fires: counts, means, maxima and the groups of tokens it fires on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.latents.stream import Chunk
from crossdiff.ranks import Ranks
from crossdiff.shapes import Float, Float64, Int64, Tensor
from crossdiff.text.chat import Flag

GROUPS = ("plain", "bos", "template", "user", "assistant")
"""Each token lies in one: a token with several flags counts as template before user or assistant."""


def group_of(flags: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Index into `GROUPS` of each token."""
    group = np.zeros(len(flags), dtype=np.int64)
    for name, flag in (("assistant", Flag.ASSISTANT), ("user", Flag.USER), ("template", Flag.TEMPLATE), ("bos", Flag.BOS)):
        group[(flags & flag) != 0] = GROUPS.index(name)
    return group


@dataclass
class Activity:
    """Sums over tokens, in v = f * sum of decoder norms.

    Attributes:
        tokens: number of tokens of each group.
        counts: active tokens `[group, latent]`; total: sum of v; maximum: largest v.
    """

    tokens: Int64[Tensor, " group"]
    counts: Int64[Tensor, "group latent"]
    total: Float64[Tensor, " latent"]
    maximum: Float[Tensor, " latent"]

    @classmethod
    def empty(cls, n_latents: int) -> Activity:
        return cls(
            torch.zeros(len(GROUPS), dtype=torch.int64),
            torch.zeros(len(GROUPS), n_latents, dtype=torch.int64),
            torch.zeros(n_latents, dtype=torch.float64),
            torch.zeros(n_latents),
        )

    def add(self, chunk: Chunk, groups: npt.NDArray[np.int64], norms: Float[Tensor, " latent"]) -> None:
        """Add a chunk; `groups` are those of its tokens, `norms` the sums of the decoder norms."""
        group, code = torch.from_numpy(groups), chunk.code
        v = code.values * norms[code.latent]
        self.tokens += torch.bincount(group, minlength=len(GROUPS))
        flat = group[code.token] * code.n_latents + code.latent
        self.counts += torch.bincount(flat, minlength=self.counts.numel()).view_as(self.counts)
        self.total += code.sum_tokens(v.double())
        self.maximum.scatter_reduce_(0, code.latent, v, "amax")

    def over(self, ranks: Ranks) -> Activity:
        """Merge the passes of several ranks, in place."""
        for tensor in (self.tokens, self.counts, self.total):
            ranks.sum(tensor)
        ranks.maximum(self.maximum)
        return self

    def __add__(self, other: Activity) -> Activity:
        """Merge two passes over disjoint tokens."""
        return Activity(
            self.tokens + other.tokens,
            self.counts + other.counts,
            self.total + other.total,
            torch.maximum(self.maximum, other.maximum),
        )
