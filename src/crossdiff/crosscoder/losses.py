"""The losses and their gradients, written out by hand; the tests hold them against dense autograd in float64.

Every function returns a loss and what it adds to the gradients, so that what is logged is what is back-propagated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from crossdiff.config import BatchTopKConfig, L1Config
from crossdiff.crosscoder.kernels import Code, DenseCode, largest_code, positive_code
from crossdiff.crosscoder.model import DENSE_ABOVE, Crosscoder
from crossdiff.shapes import Bool, Float, Int64, Tensor


@dataclass
class Gradients:
    """One tensor per parameter, shaped like it."""

    encoder: Float[Tensor, "latent column"]
    encoder_bias: Float[Tensor, " latent"]
    decoder: Float[Tensor, "latent column"]
    decoder_bias: Float[Tensor, " column"]


@dataclass
class StepResult:
    """What one batch gives: gradients, the parts of the loss, and what the log wants to know.

    Attributes:
        loss: reconstruction + sparsity + aux, exactly what the gradients belong to.
        squared_error, squared_input: `[source]`, summed over the batch.
        smallest_kept: smallest v that BatchTopK kept; None for L1.
    """

    gradients: Gradients
    loss: float
    reconstruction: float
    sparsity: float
    aux: float
    l0: float
    counts: Int64[Tensor, " latent"]
    squared_error: Float[Tensor, " source"]
    squared_input: Float[Tensor, " source"]
    smallest_kept: float | None


def reconstruction_loss(
    error: Float[Tensor, "batch source d_model"], kind: Literal["squared", "norm"]
) -> tuple[float, Float[Tensor, "batch source d_model"]]:
    """`squared`: mean_i sum_s ||e_is||^2; `norm`: mean over i and s of ||e_is||. Returns loss and gradient on the error."""
    n_tokens, n_sources, _ = error.shape
    if kind == "squared":
        return float(error.square().sum()) / n_tokens, error * (2.0 / n_tokens)
    norm = error.norm(dim=2, keepdim=True)
    gradient = error / norm.clamp(min=1e-12) / (n_tokens * n_sources)
    return float(norm.sum()) / (n_tokens * n_sources), gradient


def norm_penalty(crosscoder: Crosscoder, code: Code, mu: float) -> tuple[float, Tensor, Float[Tensor, "latent column"]]:
    """mu * mean_i sum_j f_ij sum_s ||d_j^s||. Returns loss, gradient on f (shaped as the code's values) and on the decoder."""
    n_tokens = len(code.f) if isinstance(code, DenseCode) else code.n_tokens
    norms = crosscoder.norms()
    total = code.sum_tokens(code.values)
    loss = mu * float((total * norms.sum(1)).sum()) / n_tokens
    on_values = code.of_latents(norms.sum(1)) * (mu / n_tokens)
    weight = (mu / n_tokens) * total.unsqueeze(1) / norms.clamp(min=1e-12)
    directions = crosscoder.decoder.view(crosscoder.n_latents, crosscoder.n_sources, crosscoder.d_model)
    return loss, on_values, (directions * weight.unsqueeze(2)).flatten(1)


def aux_loss(
    crosscoder: Crosscoder,
    x: Float[Tensor, "batch column"],
    pre: Float[Tensor, "batch latent"],
    residual: Float[Tensor, "batch column"],
    dead: Int64[Tensor, " dead"],
    aux_k: int,
    weight: float,
    gradients: Gradients,
) -> float:
    """AuxK (METHOD: crosscoder; Gao et al. 2024): the dead latents reconstruct what the others left over.

    weight * mean_i ||r_i - sum_(j in the aux_k largest v of the dead) f_ij d_j||^2 / mean_i ||r_i - mean r||^2, with the
    residual r = x - xhat detached and no bias. Adds to `gradients` in place.
    """
    decoder, n_tokens = crosscoder.decoder[dead], len(x)
    f = pre[:, dead].clamp(min=0)
    if aux_k < len(dead):
        v = f * crosscoder.norms()[dead].sum(1)
        f = torch.zeros_like(f).scatter_(1, v.topk(aux_k, dim=1).indices, 1.0) * f
    error = f @ decoder - residual
    variance = float((residual - residual.mean(0)).square().sum()) / n_tokens
    if variance == 0.0:
        return 0.0
    on_error = error * (2.0 * weight / (n_tokens * variance))
    on_pre = (on_error @ decoder.T) * (f > 0)
    gradients.decoder.index_add_(0, dead, f.T @ on_error)
    gradients.encoder.index_add_(0, dead, on_pre.T @ x)
    gradients.encoder_bias.index_add_(0, dead, on_pre.sum(0))
    return weight * float(error.square().sum()) / n_tokens / variance


def step_gradients(
    crosscoder: Crosscoder,
    x: Float[Tensor, "batch source d_model"],
    reconstruction: Literal["squared", "norm"],
    mu: float = 0.0,
    dead: Bool[Tensor, " latent"] | None = None,
    guess: float = 0.0,
) -> StepResult:
    """Loss and gradients of one batch.

    Args:
        x: normalised inputs.
        mu: weight of the L1 penalty at this step.
        dead: latents that the auxiliary loss revives (BatchTopK); None leaves it out.
        guess: where the selection starts to look, see `largest_code`.
    """
    config, n_tokens, flat = crosscoder.sparsity, len(x), x.flatten(1)
    pre = crosscoder.pre_activations(x)
    smallest: float | None = None
    code: Code
    if isinstance(config, BatchTopKConfig):
        code, smallest = largest_code(pre, crosscoder.norms().sum(1), config.k * n_tokens, guess)
    else:
        code = positive_code(pre, DENSE_ABOVE)
    error = crosscoder.decode(code) - x
    loss, on_error = reconstruction_loss(error, reconstruction)
    on_output = on_error.flatten(1)
    on_values = code.dot(on_output, crosscoder.decoder)
    on_decoder = code.accumulate(code.values, on_output)
    penalty = 0.0
    if isinstance(config, L1Config):
        penalty, more_on_values, more_on_decoder = norm_penalty(crosscoder, code, mu)
        on_values += more_on_values
        on_decoder += more_on_decoder
    gradients = Gradients(code.accumulate(on_values, flat), code.sum_tokens(on_values), on_decoder, on_output.sum(0))
    aux = 0.0
    if isinstance(config, BatchTopKConfig) and dead is not None and bool(dead.any()):
        aux_k = config.aux_k if config.aux_k is not None else max(1, crosscoder.d_model // 2)
        which = dead.nonzero().squeeze(1)
        aux = aux_loss(crosscoder, flat, pre, -error.flatten(1), which, aux_k, config.aux_weight, gradients)
    counts = code.counts()
    return StepResult(
        gradients=gradients,
        loss=loss + penalty + aux,
        reconstruction=loss,
        sparsity=penalty,
        aux=aux,
        l0=float(counts.sum()) / n_tokens,
        counts=counts,
        squared_error=error.square().sum((0, 2)),
        squared_input=x.square().sum((0, 2)),
        smallest_kept=smallest,
    )
