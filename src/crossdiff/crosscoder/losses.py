"""One training step's loss and its gradients, written out by hand; the tests hold them against dense autograd in float64.

Every term is a function that returns a loss and adds its gradients, so that what is logged is what is back-propagated.

Where ranks share the step, each has some tokens of the batch and some latents. A mean over tokens is the mean of the ranks'
means, as they have equally many; a sum over latents is the sum of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.mesh import Mesh
from crossdiff.crosscoder.sparsity import Backward
from crossdiff.crosscoder.structure import Constraint
from crossdiff.shapes import Float, Float64, Int64, Tensor


@dataclass(frozen=True)
class TokensSinceFired:
    """For how many tokens each latent has been silent; dead after so many."""

    tokens: Int64[Tensor, " latent"]
    dead_after: int

    def after(self, counts: Int64[Tensor, " latent"], n_tokens: int) -> TokensSinceFired:
        """With one more batch counted."""
        return TokensSinceFired(torch.where(counts > 0, 0, self.tokens + n_tokens), self.dead_after)

    def dead(self) -> Int64[Tensor, " dead"]:
        return (self.tokens >= self.dead_after).nonzero().squeeze(1)


@dataclass
class StepResult:
    """What one batch gives: gradients, the parts of the loss, and what the log wants to know.

    Attributes:
        gradients: one tensor per parameter, by name, projected onto the constraint; of this rank's latents.
        loss: reconstruction + sparsity + aux, exactly what the gradients belong to; of the whole batch, as what follows.
        squared_error, squared_input: `[source]`, summed over the batch, in float64.
        token_error: squared error of each of this rank's tokens, summed over the sources.
        smallest_kept: smallest v that a selection over the batch kept; None without one.
        since_fired: counters with this batch in them.
    """

    gradients: dict[str, Tensor]
    loss: float
    reconstruction: float
    sparsity: float
    aux: float
    l0: float
    squared_error: Float64[Tensor, " source"]
    squared_input: Float64[Tensor, " source"]
    token_error: Float[Tensor, " batch"]
    smallest_kept: float | None
    since_fired: TokensSinceFired


def reconstruction_loss(
    error: Float[Tensor, "batch source d_model"], squares: Float[Tensor, "batch source"], kind: Literal["squared", "norm"]
) -> tuple[float, Float[Tensor, "batch source d_model"]]:
    """`squared`: mean_i sum_s ||e_is||^2; `norm`: mean over i and s of ||e_is||. Returns loss and gradient on the error.

    squares: ||e_is||^2.
    """
    n_tokens, n_sources, _ = error.shape
    if kind == "squared":
        return float(squares.sum()) / n_tokens, error * (2.0 / n_tokens)
    norm = squares.sqrt()
    gradient = error / norm.clamp(min=1e-12).unsqueeze(2) / (n_tokens * n_sources)
    return float(norm.sum()) / (n_tokens * n_sources), gradient


def step_gradients(
    crosscoder: Crosscoder,
    x: Float[Tensor, "batch source d_model"],
    reconstruction: Literal["squared", "norm"],
    constraint: Constraint,
    since_fired: TokensSinceFired,
    weight: float = 0.0,
    guess: float = 0.0,
    out: Float[Tensor, "batch latent"] | None = None,
    mesh: Mesh = Mesh(),  # noqa: B008 - frozen
) -> StepResult:
    """Loss and gradients of one batch.

    Args:
        x: normalised inputs.
        weight: weight of the sparsity penalty at this step.
        guess: where the selection starts to look, see `Encoded.largest`.
        out: memory for the encoder's product, so that it need not be asked of the system at each step.
        mesh: the ranks that have the batch's other tokens and the crosscoder's other latents.
    """
    rule, n_tokens, flat = crosscoder.rule, len(x), x.flatten(1)
    source_norms = crosscoder.norms()
    encoded = crosscoder.encode(x, source_norms.sum(1), guess, out)
    code, smallest = rule.select(encoded, mesh)
    counts = mesh.data.sum(code.counts())
    since_fired = since_fired.after(counts, n_tokens * mesh.data.size)
    error = (mesh.latent.sum(code.decode(crosscoder.decoder)) + crosscoder.decoder_bias).view_as(x) - x
    squares = error.square().sum(2)
    loss, on_error = reconstruction_loss(error, squares, reconstruction)
    on_output = on_error.flatten(1)
    step = Backward(
        encoded=encoded,
        code=code,
        x=flat,
        error=error.flatten(1),
        decoder=crosscoder.decoder,
        source_norms=source_norms,
        on_values=code.dot(on_output, crosscoder.decoder),
        gradients={"decoder": code.accumulate(code.values, on_output), "decoder_bias": on_output.sum(0)},
        weight=weight,
        shares=constraint.shares.to(x),
        dead=since_fired.dead(),
        mesh=mesh,
    )
    penalty = rule.penalty(step)
    on_pre = step.on_values * (code.values > 0)
    step.gradients["encoder"] = code.accumulate(on_pre, flat)
    step.gradients["encoder_bias"] = code.sum_tokens(on_pre)
    more_penalty, aux = rule.finish(step)
    for gradient in step.gradients.values():
        mesh.data.mean(gradient)
    mesh.latent.mean(step.gradients["decoder_bias"])  # the same on each, and kept so to the last bit
    constraint.project(step.gradients)
    sparsity, l0 = mesh.latent.sum(_float64(penalty + more_penalty, float(counts.sum()) / (n_tokens * mesh.data.size)))
    loss, sparsity, aux = mesh.data.mean(_float64(loss, float(sparsity), aux)).tolist()
    return StepResult(
        gradients=step.gradients,
        loss=loss + sparsity + aux,
        reconstruction=loss,
        sparsity=sparsity,
        aux=aux,
        l0=float(l0),
        squared_error=mesh.data.sum(squares.sum(0).double()),
        squared_input=mesh.data.sum(x.square().sum((0, 2)).double()),
        token_error=squares.sum(1),
        smallest_kept=smallest,
        since_fired=since_fired,
    )


def _float64(*numbers: float) -> Float64[Tensor, " number"]:
    return torch.tensor(numbers, dtype=torch.float64)
