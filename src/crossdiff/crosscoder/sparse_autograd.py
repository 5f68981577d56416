"""The encoder's and the decoder's products as differentiable functions that touch only the active pairs.

With these two, a training loss is plain torch on top of a sparse code. A weight matrix has a gradient as large as itself,
and autograd would add up the gradients of separate functions in further passes over memory. So each function writes the
gradient of its matrix once, and also returns what other terms of a loss need from the same matrix.
"""

from __future__ import annotations

from typing import Any

import torch

from crossdiff.crosscoder.kernels import Code
from crossdiff.ranks import Ranks
from crossdiff.shapes import Float, Int64, Tensor


class _Activations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, encoder: Tensor, bias: Tensor, x: Tensor, raw: Tensor, code: Code, some: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.x, ctx.code, ctx.some = x, code, some
        # A view: an output that the context itself holds would keep the whole batch alive until a garbage collection.
        return code.values.view_as(code.values), raw[:, some] + bias[some]

    @staticmethod
    def backward(ctx: Any, on_f: Tensor, on_some: Tensor | None) -> tuple[Tensor | None, ...]:
        code, x, some = ctx.code, ctx.x, ctx.some
        on_pre = on_f * (code.values > 0)
        on_encoder = code.accumulate(on_pre, x)
        on_bias = code.sum_tokens(on_pre)
        if on_some is not None:
            on_encoder.index_add_(0, some, on_some.T @ x)
            on_bias.index_add_(0, some, on_some.sum(0))
        return on_encoder, on_bias, None, None, None, None


class _Decoded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f: Tensor, decoder: Tensor, source_norms: Tensor, code: Code, some: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(decoder, source_norms)
        ctx.code, ctx.some = code, some
        return code.decode(decoder), source_norms.clone(), decoder[some]

    @staticmethod
    def backward(ctx: Any, on_output: Tensor, on_norms: Tensor | None, on_some: Tensor | None) -> tuple[Tensor | None, ...]:
        code, (decoder, source_norms) = ctx.code, ctx.saved_tensors
        on_f = code.dot(on_output, decoder)
        on_decoder = code.accumulate(code.values, on_output)
        if on_norms is not None:
            split = (*source_norms.shape, -1)
            weight = on_norms / source_norms.clamp(min=1e-12)  # the gradient of ||d|| is d / ||d||
            on_decoder.view(split).addcmul_(decoder.view(split), weight.unsqueeze(2))
        if on_some is not None:
            on_decoder.index_add_(0, ctx.some, on_some)
        return on_f, on_decoder, None, None, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, theta: Tensor, near: Tensor, code: Code, bandwidth: float) -> Tensor:
        ctx.save_for_backward(theta, near)
        ctx.code, ctx.bandwidth = code, bandwidth
        return f.view_as(f)

    @staticmethod
    def backward(ctx: Any, on_f: Tensor) -> tuple[Tensor | None, ...]:
        theta, near = ctx.saved_tensors
        return on_f, -theta / ctx.bandwidth * ctx.code.sum_tokens(on_f * near), None, None, None


class _TotalShortfall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, encoder: Tensor, bias: Tensor, theta: Tensor, x: Tensor, raw: Tensor) -> Tensor:
        gap = (theta - bias) - raw
        ctx.save_for_backward(x, (gap > 0).to(gap.dtype))
        return gap.clamp_(min=0).sum(0)

    @staticmethod
    def backward(ctx: Any, on_total: Tensor) -> tuple[Tensor | None, ...]:
        x, below = ctx.saved_tensors
        on_theta = on_total * below.sum(0)
        return on_total.neg().unsqueeze(1) * (below.T @ x), -on_theta, on_theta, None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(part.clone())

    @staticmethod
    def backward(ctx: Any, on_sum: Tensor) -> tuple[Tensor, None]:
        return on_sum, None


def _apply(function: Any, *inputs: Any) -> Any:
    return function.apply(*inputs)


def activations(
    encoder: Float[Tensor, "latent column"],
    bias: Float[Tensor, " latent"],
    x: Float[Tensor, "batch column"],
    raw: Float[Tensor, "batch latent"],
    code: Code,
    some: Int64[Tensor, " some"],
) -> tuple[Tensor, Float[Tensor, "batch some"]]:
    """f = ReLU(<x_i, e_j> + b_j) at the pairs of a code, and the pre-activations of `some` latents on every token.

    Args:
        raw: <x_i, e_j>, which the selection of the code has computed already.

    Returns:
        f, shaped as `code.values`; pre-activations.
    """
    found: tuple[Tensor, Tensor] = _apply(_Activations, encoder, bias, x, raw, code, some)
    return found


def decoded(
    f: Tensor,
    decoder: Float[Tensor, "latent column"],
    source_norms: Float[Tensor, "latent source"],
    code: Code,
    some: Int64[Tensor, " some"],
) -> tuple[Float[Tensor, "batch column"], Float[Tensor, "latent source"], Float[Tensor, "some column"]]:
    """sum_j f_ij d_j, the norms ||d_j^s||, and the decoder's rows of `some` latents, differentiable in f and the decoder.

    Args:
        f: the code's values, with what autograd knows about them.
        source_norms: ||d_j^s||, which the selection of the code has needed already.
    """
    found: tuple[Tensor, Tensor, Tensor] = _apply(_Decoded, f, decoder, source_norms, code, some)
    return found


def with_straight_through_threshold(
    f: Tensor, theta: Float[Tensor, " latent"], near: Tensor, code: Code, bandwidth: float
) -> Tensor:
    """f as it is, with the straight-through gradient d f / d theta = -(theta / bandwidth) at the pairs `near` the threshold."""
    found: Tensor = _apply(_StraightThrough, f, theta, near, code, bandwidth)
    return found


def total_shortfall(
    encoder: Float[Tensor, "latent column"],
    bias: Float[Tensor, " latent"],
    theta: Float[Tensor, " latent"],
    x: Float[Tensor, "batch column"],
    raw: Float[Tensor, "batch latent"],
) -> Float[Tensor, " latent"]:
    """sum_i ReLU(theta_j - b_j - <x_i, e_j>) over all tokens, where `raw` is <x_i, e_j>."""
    found: Tensor = _apply(_TotalShortfall, encoder, bias, theta, x, raw)
    return found


def sum_over(ranks: Ranks, part: Tensor) -> Tensor:
    """The sum of every rank's part. Every rank computes the same loss from it, so each part's gradient is the sum's."""
    if ranks.size == 1:
        return part
    total: Tensor = _apply(_SumOverRanks, part, ranks)
    return total
