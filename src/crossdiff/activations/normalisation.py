"""Moments of the activations, summed shard by shard, and the normalisation that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crossdiff.errors import UserError
from crossdiff.shapes import Float, Float64, Int64, Tensor


@dataclass(frozen=True)
class Normalisation:
    """First and second moments of the sources over the training tokens, which give the scale of any view.

    A view is a linear map of the sources, y_v = sum_s matrix[v, s] h_s: the identity for two sources side by side, one row of
    it for a single source, [[-1, 1]] for a difference. A view is normalised by subtracting its mean and multiplying by one
    scalar (docs/method.md#activations).

    mean: mean of h_s. gram: mean of <h_s, h_t>, not centred. Both float64.
    """

    mean: Float64[Tensor, "source d_model"]
    gram: Float64[Tensor, "source source"]

    def scale_of(self, matrix: Float64[Tensor, "view source"]) -> float:
        """The scalar that makes the mean of ||x_v||^2 over tokens and rows of the view equal to d_model.

        With the covariance C_st = gram_st - <mean_s, mean_t> of the sources, summed over dimensions, the view's variance
        is the trace of matrix C matrix^T, so scale^2 = d_model * n_view / trace.
        """
        covariance = self.gram - self.mean @ self.mean.T
        variance = float(torch.trace(matrix @ covariance @ matrix.T)) / len(matrix)
        # The rounding error left in the difference of two equal sources is not variation.
        if not variance > 1e-12 * float(torch.trace(matrix.abs() @ self.gram.abs() @ matrix.abs().T)):
            if self.sources_equal and len(self.gram) > 1:
                raise UserError(
                    "the two models have the same activations on every token, so there is no difference to train on"
                )
            raise UserError("the activations do not vary over the training tokens; is this the right layer?")
        return float((self.mean.shape[1] / variance) ** 0.5)

    @property
    def sources_equal(self) -> bool:
        """Whether all sources have the same activations: sums of equal numbers in one order are equal to the last bit."""
        return bool((self.mean == self.mean[0]).all() and (self.gram == self.gram[0, 0]).all())

    @property
    def scale(self) -> float:
        """The scale of all sources side by side."""
        return self.scale_of(torch.eye(len(self.gram), dtype=torch.float64))


@dataclass
class Moments:
    """Sums over training tokens: `total` of h_s, `products` of <h_s, h_t>, and the number of tokens.

    The first two are on the device of the streams, so that adding a batch does not wait for an accelerator.
    """

    total: Float64[Tensor, "source d_model"]
    products: Float64[Tensor, "source source"]
    n_tokens: Int64[Tensor, ""]

    @classmethod
    def zero(cls, n_sources: int, d_model: int, device: torch.device | None = None) -> Moments:
        total = torch.zeros(n_sources, d_model, dtype=torch.float64, device=device)
        return cls(total, torch.zeros(n_sources, n_sources, dtype=torch.float64, device=device), torch.tensor(0))

    def cpu(self) -> Moments:
        return Moments(self.total.cpu(), self.products.cpu(), self.n_tokens)

    def add(self, streams: list[Float[Tensor, "token d_model"]]) -> None:
        """Add the tokens of a batch, one tensor per source.

        The product of a single token and the sum over one batch are taken in the streams' float32 (torch sums pairwise),
        with a relative error of 1e-7; all other sums are float64.
        """
        self.n_tokens += len(streams[0])
        for s, stream in enumerate(streams):
            self.total[s] += stream.sum(0).double()
            for t in range(s + 1):
                product = (stream * streams[t]).sum(1).double().sum()
                self.products[s, t] += product
                if t < s:
                    self.products[t, s] += product

    def __iadd__(self, other: Moments) -> Moments:
        self.total += other.total
        self.products += other.products
        self.n_tokens += other.n_tokens
        return self

    def finish(self) -> Normalisation:
        """Return the means."""
        if not self.n_tokens:
            raise UserError("no training tokens: every document is held out or too short; lower heldout_share or add text")
        return Normalisation(self.total / self.n_tokens, self.products / self.n_tokens)
