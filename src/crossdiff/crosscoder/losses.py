"""The training loss of a crosscoder and its gradients on one batch.

Where ranks share the step, each has some tokens of the batch and some latents. A mean over tokens is the mean of the ranks'
means, since all have equally many; a sum over latents is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import matmul
from crossdiff.crosscoder.mesh import Mesh
from crossdiff.crosscoder.sparse_autograd import Activations, Decode, SumOverRanks, apply
from crossdiff.crosscoder.sparsity import TrainingBatch
from crossdiff.crosscoder.structure import Constraint
from crossdiff.shapes import Float, Float64, Int64, Tensor


@dataclass(frozen=True)
class TokensSinceFired:
    """Number of tokens since each latent was last active. A latent is dead after `dead_after` of them."""

    tokens: Int64[Tensor, " latent"]
    dead_after: int

    def after(self, counts: Int64[Tensor, " latent"], n_tokens: int) -> TokensSinceFired:
        """The numbers after another batch of `n_tokens`, on `counts` of which each latent was active."""
        return TokensSinceFired(torch.where(counts > 0, 0, self.tokens + n_tokens), self.dead_after)

    def dead(self) -> Int64[Tensor, " dead"]:
        """Indices of the dead latents."""
        return (self.tokens >= self.dead_after).nonzero().squeeze(1)


@dataclass
class StepResult:
    """Gradients of one batch, the parts of its loss, and what the log records.

    Attributes:
        gradients: one tensor per parameter, by name, projected onto the constraint; of this rank's latents.
        loss: reconstruction + sparsity + aux, exactly what the gradients belong to; of the whole batch, like what follows. The
            numbers are float64 tensors on the crosscoder's device, so that nobody has to wait for it before they are needed.
        squared_error, squared_input: `[source]`, summed over the batch, in float64.
        token_error: squared error of each of this rank's tokens, summed over the sources.
        smallest_kept: smallest v that a selection over the batch kept; None without one.
        since_fired: the counters, this batch included.
    """

    gradients: dict[str, Tensor]
    loss: Float64[Tensor, ""]
    reconstruction: Float64[Tensor, ""]
    sparsity: Float64[Tensor, ""]
    aux: Float64[Tensor, ""]
    l0: Float64[Tensor, ""]
    squared_error: Float64[Tensor, " source"]
    squared_input: Float64[Tensor, " source"]
    token_error: Float[Tensor, " batch"]
    smallest_kept: float | None
    since_fired: TokensSinceFired


def reconstruction_loss(
    error: Float[Tensor, "batch source d_model"], squares: Float[Tensor, "batch source"], kind: Literal["squared", "norm"]
) -> Tensor:
    """`squared`: mean_i sum_s ||e_is||^2; `norm`: mean over i and s of ||e_is||. `squares` are the ||e_is||^2."""
    if kind == "squared":
        return squares.sum() / len(error)
    norms: Tensor = torch.linalg.vector_norm(error, dim=2).mean()  # unlike the root of `squares`, differentiable at 0
    return norms


def difference_loss(
    error: Float[Tensor, "batch source d_model"], x: Float[Tensor, "batch source d_model"], mesh: Mesh
) -> Tensor:
    """Error in the difference between each source and the one before it, on the scale of one source's activations.

    sum_i ||e_i2 - e_i1||^2 / sum_i ||x_i2 - x_i1||^2 times the mean over i and s of ||x_is||^2, added up over the steps of a
    chain; 0 for a step that changes nothing. A narrow fine-tune moves the activations so little that the reconstruction loss
    alone hardly sees it (Kassem et al. 2026, arXiv 2603.04426).
    """
    steps = list(pairwise(range(x.shape[1])))
    sizes = [(x[:, after] - x[:, before]).square().sum() for before, after in steps]
    *sizes, scale = mesh.data.mean(torch.stack([*sizes, x.square().sum() / (len(x) * x.shape[1])]))
    total = error.new_zeros(())
    for (before, after), size in zip(steps, sizes, strict=True):
        total = total + (error[:, after] - error[:, before]).square().sum() * torch.where(size > 0, scale / size, 0.0)
    return total


@dataclass(frozen=True)
class Loss:
    """The training loss of a crosscoder: reconstruction + sparsity penalty + auxiliary loss.

    Attributes:
        crosscoder: the crosscoder, or this rank's latents of it.
        mesh: the ranks that have the batch's other tokens and the crosscoder's other latents.
        difference_weight: weight of `difference_loss`, which is part of the reconstruction.
    """

    crosscoder: Crosscoder
    reconstruction: Literal["squared", "norm"]
    constraint: Constraint
    mesh: Mesh = Mesh()  # noqa: RUF009 - frozen
    difference_weight: float = 0.0

    def gradients(
        self,
        x: Float[Tensor, "batch source d_model"],
        since_fired: TokensSinceFired,
        weight: float = 0.0,
        guess: float = 0.0,
        out: Float[Tensor, "batch latent"] | None = None,
        copies: Mapping[str, Tensor] | None = None,
    ) -> StepResult:
        """Loss and gradients of one batch.

        Args:
            x: normalised inputs.
            weight: weight of the sparsity penalty at this step.
            guess: where the selection starts to look, see `Encoded.largest`.
            out: memory for the encoder's product, so that it need not be requested from the system at each step.
            copies: encoder and decoder in the dtype of the products; by default the parameters themselves.
        """
        crosscoder, mesh = self.crosscoder, self.mesh
        copies = copies or crosscoder.parameters()
        columns = x.flatten(1)
        read = columns.to(copies["encoder"].dtype)
        rule = crosscoder.rule
        source_norms = crosscoder.norms()
        raw = matmul(read, copies["encoder"].T, out)
        encoded = crosscoder.encoded(raw, source_norms.sum(1), guess)
        code, smallest_kept = rule.select(encoded, mesh)
        counts = mesh.data.sum(code.counts())
        n_tokens = len(x) * mesh.data.size
        since_fired = since_fired.after(counts, n_tokens)
        dead = since_fired.dead() if rule.revives_dead else counts[:0]

        weights = {name: tensor.detach().requires_grad_() for name, tensor in crosscoder.parameters().items()}
        with torch.enable_grad():
            f, pre_dead = apply(Activations, weights["encoder"], weights["encoder_bias"], read, encoded.raw, code, dead)
            f = rule.with_threshold(f, code, encoded, weights)
            xhat, norms, decoder_dead = apply(Decode, f, weights["decoder"], copies["decoder"], source_norms, code, dead)
            error = (apply(SumOverRanks, xhat, mesh.latent) + weights["decoder_bias"]).view_as(x) - x
            squares = error.square().sum(2)
            batch = TrainingBatch(
                d_model=x.shape[2], x=read, encoded=encoded, code=code, f=f, norms=norms.sum(1),
                error=error.detach().flatten(1), pre_dead=pre_dead, decoder_dead=decoder_dead, norms_dead=encoded.norms[dead],
                weights=weights, weight=weight, shares=self.constraint.shares.to(x), mesh=mesh,
            )  # fmt: skip
            reconstruction = reconstruction_loss(error, squares, self.reconstruction)
            if self.difference_weight:
                reconstruction = reconstruction + self.difference_weight * difference_loss(error, x, mesh)
            sparsity = rule.penalty(batch)
            in_products = torch.autocast(x.device.type, read.dtype) if read.dtype == torch.bfloat16 else nullcontext()
            with in_products:
                aux = rule.auxiliary_loss(batch)
            found = torch.autograd.grad(reconstruction + sparsity + aux, list(weights.values()))

        l0 = counts.sum().double() / n_tokens
        sparsity, l0 = mesh.latent.sum(_float64(sparsity, l0))
        reconstruction, sparsity, aux = mesh.data.mean(_float64(reconstruction, sparsity, aux))
        squares = squares.detach()
        return StepResult(
            gradients=self._over_ranks(dict(zip(weights, found, strict=True))),
            loss=reconstruction + sparsity + aux,
            reconstruction=reconstruction,
            sparsity=sparsity,
            aux=aux,
            l0=l0,
            squared_error=mesh.data.sum(squares.sum(0).double()),
            squared_input=mesh.data.sum(x.square().sum((0, 2)).double()),
            token_error=squares.sum(1),
            smallest_kept=smallest_kept,
            since_fired=since_fired,
        )

    def _over_ranks(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means of the ranks' gradients, projected onto the constraint, in place."""
        for gradient in gradients.values():
            self.mesh.data.mean(gradient)
        self.mesh.latent.mean(gradients["decoder_bias"])  # equal on every rank, and kept equal to the last bit
        self.constraint.project(gradients)
        return gradients


def _float64(*numbers: Tensor) -> Float64[Tensor, " number"]:
    return torch.stack([number.detach().double() for number in numbers])
