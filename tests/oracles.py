"""Slow, plain, float64: what the fast paths are held against. Written from the formulas, sharing no code with them."""

from __future__ import annotations

import torch
from torch import Tensor


def loss(
    parameters: dict[str, Tensor],
    x: Tensor,
    mask: Tensor,
    kind: str,
    mu: float,
    dead: list[int],
    aux_k: int,
    aux_weight: float,
) -> dict[str, Tensor]:
    """Every part of the loss by dense autograd. x: [batch, source, d]; mask: which f are kept, [batch, latent]."""
    n_tokens, n_sources, d = x.shape
    encoder = parameters["encoder"].view(-1, n_sources, d)
    decoder = parameters["decoder"].view(-1, n_sources, d)
    pre = torch.einsum("bsd,fsd->bf", x, encoder) + parameters["encoder_bias"]
    f = torch.relu(pre) * mask
    xhat = torch.einsum("bf,fsd->bsd", f, decoder) + parameters["decoder_bias"].view(n_sources, d)
    error = x - xhat
    squares = (error**2).sum(2)
    reconstruction = squares.sum(1).mean() if kind == "squared" else squares.sqrt().mean()
    norms = (decoder**2).sum(2).sqrt().sum(1)
    sparsity = mu * (f * norms).sum(1).mean()
    aux = torch.zeros((), dtype=x.dtype)
    if dead:
        residual = error.detach().flatten(1)
        v = torch.relu(pre[:, dead]) * norms[dead].detach()
        keep = torch.zeros_like(v)
        for row in range(n_tokens):
            for column in sorted(range(len(dead)), key=lambda j: -v[row, j].item())[:aux_k]:
                keep[row, column] = 1
        guess = (torch.relu(pre[:, dead]) * keep) @ parameters["decoder"][dead]
        variance = ((residual - residual.mean(0)) ** 2).sum(1).mean()
        aux = aux_weight * ((residual - guess) ** 2).sum(1).mean() / variance
    return {"reconstruction": reconstruction, "sparsity": sparsity, "aux": aux, "loss": reconstruction + sparsity + aux}


def batch_topk(pre: Tensor, norms: Tensor, n_keep: int) -> Tensor:
    """Mask of the n_keep largest positive v = relu(pre) * norms of the whole batch, by sorting."""
    v = torch.relu(pre.double()) * norms.double()
    order = sorted(range(v.numel()), key=lambda i: -float(v.flatten()[i]))
    mask = torch.zeros(v.numel(), dtype=torch.bool)
    for index in order[:n_keep]:
        if float(v.flatten()[index]) > 0:
            mask[index] = True
    return mask.view_as(v)


def beta(f: Tensor, y: Tensor, d: Tensor) -> float:
    """argmin_b sum_i ||y_i - b f_i d||^2 by least squares on the stacked system. f: [token], y: [token, d], d: [d]."""
    column = torch.outer(f, d).reshape(-1, 1)
    return float(torch.linalg.lstsq(column, y.reshape(-1, 1)).solution)
