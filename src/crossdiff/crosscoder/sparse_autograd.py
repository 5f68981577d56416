"""The encoder's and the decoder's products as differentiable functions that touch only the active pairs.

With these two, a training loss is plain torch on top of a sparse code. A weight matrix has a gradient as large as itself, so
autograd should not have to add up several of them: each function writes the gradient of its matrix once, and also returns what
other terms of a loss need from the same matrix.
"""

from __future__ import annotations

from typing import Any

from torch.autograd import Function

from crossdiff.crosscoder.kernels import Code, matmul
from crossdiff.ranks import Ranks
from crossdiff.shapes import Tensor

Gradients = tuple[Tensor | None, ...]


class Activations(Function):
    """f = ReLU(<x_i, e_j> + b_j) at the pairs of a code, and the pre-activations of `some` latents on every token.

    Args: encoder `[latent, column]`, bias `[latent]`, x `[batch, column]` in the dtype of the products, raw `[batch, latent]`
    (<x_i, e_j>, computed already for the selection), the code, and the indices `some`. Returns f, shaped as `code.values`, and
    `[batch, some]`.
    """

    @staticmethod
    def forward(ctx: Any, encoder: Tensor, bias: Tensor, x: Tensor, raw: Tensor, code: Code, some: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.x, ctx.code, ctx.some = x, code, some
        # A view: an output that the context itself holds would keep the whole batch alive until a garbage collection.
        return code.values.view_as(code.values), raw[:, some] + bias[some]

    @staticmethod
    def backward(ctx: Any, on_f: Tensor, on_some: Tensor | None) -> Gradients:
        code, x, some = ctx.code, ctx.x, ctx.some
        on_pre = on_f * (code.values > 0)
        on_encoder = code.accumulate(on_pre, x)
        on_bias = code.sum_tokens(on_pre)
        if on_some is not None:
            on_encoder.index_add_(0, some, matmul(on_some.T, x))
            on_bias.index_add_(0, some, on_some.sum(0))
        return on_encoder, on_bias, None, None, None, None


class Decode(Function):
    """sum_j f_ij d_j, the norms ||d_j^s||, and the decoder's rows of `some` latents.

    Args: f (the code's values, with their gradient), decoder `[latent, column]`, its copy in the dtype of the products,
    source_norms `[latent, source]` (||d_j^s||, computed already for the selection), the code, and the indices `some`. Returns
    `[batch, column]`, `[latent, source]` and `[some, column]`.
    """

    @staticmethod
    def forward(ctx: Any, f: Tensor, decoder: Tensor, copy: Tensor, source_norms: Tensor, code: Code, some: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(decoder, copy, source_norms)
        ctx.code, ctx.some = code, some
        return code.decode(copy), source_norms.clone(), decoder[some]

    @staticmethod
    def backward(ctx: Any, on_output: Tensor, on_norms: Tensor | None, on_some: Tensor | None) -> Gradients:
        code, (decoder, copy, source_norms) = ctx.code, ctx.saved_tensors
        on_f, on_decoder = code.dot_and_accumulate(on_output.to(copy.dtype), copy)
        if on_norms is not None:
            split = (*source_norms.shape, -1)
            weight = on_norms / source_norms.clamp(min=1e-12)  # the gradient of ||d|| is d / ||d||
            on_decoder.view(split).addcmul_(decoder.view(split), weight.unsqueeze(2))
        if on_some is not None:
            on_decoder.index_add_(0, ctx.some, on_some)
        return on_f, on_decoder, None, None, None, None


class StraightThroughThreshold(Function):
    """f unchanged, with d f / d theta = -(theta / bandwidth) at the pairs that are `near` the threshold."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, theta: Tensor, near: Tensor, code: Code, bandwidth: float) -> Tensor:
        ctx.save_for_backward(theta, near)
        ctx.code, ctx.bandwidth = code, bandwidth
        return f.view_as(f)

    @staticmethod
    def backward(ctx: Any, on_f: Tensor) -> Gradients:
        theta, near = ctx.saved_tensors
        return on_f, -theta / ctx.bandwidth * ctx.code.sum_tokens(on_f * near), None, None, None


class TotalShortfall(Function):
    """sum_i ReLU(theta_j - b_j - <x_i, e_j>) over all tokens, `[latent]`; `raw` is <x_i, e_j>."""

    @staticmethod
    def forward(ctx: Any, encoder: Tensor, bias: Tensor, theta: Tensor, x: Tensor, raw: Tensor) -> Tensor:
        gap = (theta - bias) - raw
        ctx.save_for_backward(x, (gap > 0).to(gap.dtype))
        return gap.clamp_(min=0).sum(0)

    @staticmethod
    def backward(ctx: Any, on_total: Tensor) -> Gradients:
        x, below = ctx.saved_tensors
        on_theta = on_total * below.sum(0)
        return on_total.neg().unsqueeze(1) * matmul(below.T, x), -on_theta, on_theta, None, None


class SumOverRanks(Function):
    """The sum of every rank's part. Every rank computes the same loss from it, so each part's gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return part if ranks.size == 1 else ranks.sum(part.clone())

    @staticmethod
    def backward(ctx: Any, on_sum: Tensor) -> Gradients:
        return on_sum, None


def apply(function: type[Function], *inputs: Any) -> Any:
    """Call one of the functions above."""
    return function.apply(*inputs)  # type: ignore[no-untyped-call]
