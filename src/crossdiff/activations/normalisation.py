"""Moments of the activations, shard by shard, and the normalisation that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crossdiff.errors import UserError
from crossdiff.shapes import Float, Float64, Int64, Tensor


@dataclass(frozen=True)
class Normalisation:
    """First and second moments of the sources over the training tokens, and the scale of any view that follows from them.

    A view is linear in the sources: y_v = sum_s matrix[v, s] h_s. Two sources side by side are the identity, a source
    alone is a row of it, a difference is [[-1, 1]]. Views are normalised by subtracting the mean, then multiplying by
    one scalar (METHOD: data).

    mean: mean of h_s. gram: mean of <h_s, h_t>, not centred. Both float64.
    """

    mean: Float64[Tensor, "source d_model"]
    gram: Float64[Tensor, "source source"]

    def scale_of(self, matrix: Float64[Tensor, "view source"]) -> float:
        """The scalar after which the mean over tokens and rows of the view of ||x_v||^2 is d_model.

        With the covariance C_st = gram_st - <mean_s, mean_t> of the sources, summed over dimensions, the view's variance
        is the trace of matrix C matrix^T, so scale^2 = d_model * n_view / trace.

        Raises:
            UserError: the view does not vary.
        """
        covariance = self.gram - self.mean @ self.mean.T
        variance = float(torch.trace(matrix @ covariance @ matrix.T)) / len(matrix)
        # What rounding leaves of a difference between two equal sources is no variation.
        if not variance > 1e-12 * float(torch.trace(matrix.abs() @ self.gram.abs() @ matrix.abs().T)):
            raise UserError("the activations do not vary over the training tokens; is this the right layer?")
        return float((self.mean.shape[1] / variance) ** 0.5)

    @property
    def scale(self) -> float:
        """The scale of all sources side by side."""
        return self.scale_of(torch.eye(len(self.gram), dtype=torch.float64))


@dataclass
class Moments:
    """Sums over training tokens: `total` of h_s, `products` of <h_s, h_t>, and how many tokens. Moments add up."""

    total: Float64[Tensor, "source d_model"]
    products: Float64[Tensor, "source source"]
    n_tokens: Int64[Tensor, ""]

    @classmethod
    def zero(cls, n_sources: int, d_model: int) -> Moments:
        double = torch.float64
        return cls(
            torch.zeros(n_sources, d_model, dtype=double), torch.zeros(n_sources, n_sources, dtype=double), torch.tensor(0)
        )

    def add(self, streams: list[Float[Tensor, "token d_model"]]) -> None:
        """Add the tokens of a batch, one tensor a source.

        Only a token's own product and the sum over one batch are taken in the streams' float32 (torch sums pairwise),
        which costs 1e-7 of what they sum; across tokens and batches it is float64.
        """
        self.n_tokens += len(streams[0])
        for s, stream in enumerate(streams):
            self.total[s] += stream.sum(0).double().cpu()
            for t in range(s + 1):
                product = (stream * streams[t]).sum(1).double().sum().cpu()
                self.products[s, t] += product
                if t < s:
                    self.products[t, s] += product

    def __iadd__(self, other: Moments) -> Moments:
        self.total += other.total
        self.products += other.products
        self.n_tokens += other.n_tokens
        return self

    def finish(self) -> Normalisation:
        """The means.

        Raises:
            UserError: there were no tokens.
        """
        if not self.n_tokens:
            raise UserError("no training tokens: every document is held out or too short; lower heldout_share or add text")
        return Normalisation(self.total / self.n_tokens, self.products / self.n_tokens)
