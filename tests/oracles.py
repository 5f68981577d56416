"""Slow, plain, float64: what the fast paths are held against. Written from the formulas, sharing no code with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Terms:
    """What makes up a loss beside the reconstruction.

    mu: weight of the penalty, `shares` each latent's share of it. tanh_scale, pull, bandwidth: JumpReLU's. difference: weight
    of the error in the difference between two sources.
    """

    mu: float = 0.0
    shares: Tensor | None = None
    dead: list[int] = field(default_factory=list)
    aux_k: int = 1
    aux_weight: float = 0.0
    tanh_scale: float = 1.0
    pull: float = 0.0
    bandwidth: float = 1.0
    difference: float = 0.0


class _Jump(torch.autograd.Function):
    """pre where it is over theta, with the straight-through gradient -(theta / width) inside the window."""

    @staticmethod
    def forward(ctx, pre, theta, width):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        pre, theta = ctx.saved_tensors
        inside = ((pre - theta).abs() < ctx.width / 2).to(grad)
        return grad * (pre > theta), (-theta / ctx.width * inside * grad).sum(0), None


def loss(parameters: dict[str, Tensor], x: Tensor, mask: Tensor, kind: str, terms: Terms) -> dict[str, Tensor]:
    """Every part of the loss by dense autograd. x: [batch, source, d]; mask: which f are kept, [batch, latent]."""
    _, n_sources, d = x.shape
    encoder = parameters["encoder"].view(-1, n_sources, d)
    decoder = parameters["decoder"].view(-1, n_sources, d)
    pre = torch.einsum("bsd,fsd->bf", x, encoder) + parameters["encoder_bias"]
    norms = decoder.norm(dim=2).sum(1)  # the gradient at a zero direction is 0
    shares = torch.ones(len(norms)).to(x) if terms.shares is None else terms.shares.to(x)
    if "log_threshold" in parameters:
        theta = parameters["log_threshold"].exp()
        f = _Jump.apply(pre, theta, terms.bandwidth)
        tanh = (shares * torch.tanh(terms.tanh_scale * f * norms)).sum(1).mean()
        pull = (shares * torch.relu(theta - pre) * norms).sum(1).mean()
        sparsity = terms.mu * tanh + terms.pull * pull
    else:
        f = torch.relu(pre) * mask
        sparsity = terms.mu * (shares * f * norms).sum(1).mean()
    xhat = torch.einsum("bf,fsd->bsd", f, decoder) + parameters["decoder_bias"].view(n_sources, d)
    error = x - xhat
    squares = (error**2).sum(2)
    reconstruction = squares.sum(1).mean() if kind == "squared" else squares.sqrt().mean()
    if terms.difference:
        for a in range(x.shape[1] - 1):
            share = ((error[:, a + 1] - error[:, a]) ** 2).sum() / ((x[:, a + 1] - x[:, a]) ** 2).sum()
            reconstruction = reconstruction + terms.difference * share * (x**2).sum(2).mean()
    aux = _aux(parameters, pre, error, norms, terms) if terms.dead else torch.zeros((), dtype=x.dtype)
    return {"reconstruction": reconstruction, "sparsity": sparsity, "aux": aux, "loss": reconstruction + sparsity + aux}


def _aux(parameters: dict[str, Tensor], pre: Tensor, error: Tensor, norms: Tensor, terms: Terms) -> Tensor:
    dead, residual = terms.dead, error.detach().flatten(1)
    v = torch.relu(pre[:, dead]) * norms[dead].detach()
    keep = torch.zeros_like(v)
    for row in range(len(v)):
        for column in sorted(range(len(dead)), key=lambda j: -v[row, j].item())[: terms.aux_k]:
            keep[row, column] = 1
    guess = (torch.relu(pre[:, dead]) * keep) @ parameters["decoder"][dead]
    variance = ((residual - residual.mean(0)) ** 2).sum(1).mean()
    return terms.aux_weight * ((residual - guess) ** 2).sum(1).mean() / variance


def batch_topk(pre: Tensor, norms: Tensor, n_keep: int) -> Tensor:
    """Mask of the n_keep largest positive v = relu(pre) * norms of the whole batch, by sorting."""
    v = torch.relu(pre.double()) * norms.double()
    order = sorted(range(v.numel()), key=lambda i: -float(v.flatten()[i]))
    mask = torch.zeros(v.numel(), dtype=torch.bool)
    for index in order[:n_keep]:
        if float(v.flatten()[index]) > 0:
            mask[index] = True
    return mask.view_as(v)


def topk(pre: Tensor, norms: Tensor, k: int) -> Tensor:
    """Mask of the k largest positive v of each token, by sorting."""
    return torch.cat([batch_topk(row.unsqueeze(0), norms, k) for row in pre])


def beta(f: Tensor, y: Tensor, d: Tensor) -> float:
    """argmin_b sum_i ||y_i - b f_i d||^2 by least squares on the stacked system. f: [token], y: [token, d], d: [d]."""
    column = torch.outer(f, d).reshape(-1, 1)
    return float(torch.linalg.lstsq(column, y.reshape(-1, 1)).solution)
