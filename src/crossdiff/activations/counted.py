"""Which tokens take part in training and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from crossdiff.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class Counted:
    """The rule that omits the leading positions of a sequence and tokens of massive activation norm.

    A few tokens anywhere in a text may have activations of hundreds of times the usual norm, the same for every text
    (attention sinks). They would dominate the scale, the loss and the mean, and leave nothing for the others.

    Attributes:
        leave_out: number of leading positions.
        norm_limits: for each source, the norm above which a token is massive, in the models' own space; empty: no limit.
    """

    leave_out: int
    norm_limits: tuple[float, ...] = ()

    def __call__(
        self, position: Int[Tensor, " position"], streams: Sequence[Float[Tensor, "*sequence position d_model"]]
    ) -> Bool[Tensor, "*sequence position"]:
        """Whether each token counts, in one sequence or several; `streams` has the activations of one source each."""
        return (position >= self.leave_out) & self.ordinary(streams)

    def ordinary(self, streams: Sequence[Float[Tensor, "*token d_model"]]) -> Bool[Tensor, "*token"]:
        """Whether the norm of each token is within the limit of every source."""
        return self.within([torch.linalg.vector_norm(stream, dim=-1) for stream in streams])

    def within(self, norms: Sequence[Float[Tensor, "*token"]]) -> Bool[Tensor, "*token"]:
        """The same, from the norms of the tokens in each source."""
        found = torch.ones(norms[0].shape, dtype=torch.bool, device=norms[0].device)
        for norm, limit in zip(norms, self.norm_limits, strict=False):
            found &= norm.to(found.device) <= limit
        return found
