"""Codes of a batch, dense and sparse, with the products that a training step and the analysis need.

A code holds the latent activations f `[batch, latent]`. Both kinds offer the same products, and each product equals what
plain dense autograd gives; the tests hold them against it in float64. Weights are latent-major: `[latent, column]`, where
the columns are source and d_model flattened, so that each latent's weights lie side by side in memory.

The sparse products are embedding bags: their cost grows with the number of active (token, latent) pairs only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from crossdiff.shapes import Float, Int64, Tensor


@dataclass(frozen=True)
class DenseCode:
    """A code as a full matrix; cheaper when more than a few percent of it is active."""

    f: Float[Tensor, "batch latent"]

    @property
    def values(self) -> Tensor:
        return self.f

    def decode(self, weights: Float[Tensor, "latent column"]) -> Float[Tensor, "batch column"]:
        """sum_j f_ij W_j."""
        return self.f @ weights

    def dot(self, table: Float[Tensor, "batch column"], weights: Float[Tensor, "latent column"]) -> Tensor:
        """<table_i, W_j> where f_ij is active, 0 elsewhere; shaped as `values`."""
        return (table @ weights.T) * (self.f > 0)

    def of_latents(self, per_latent: Float[Tensor, " latent"]) -> Tensor:
        """A per-latent quantity at each active pair; shaped as `values`."""
        return per_latent * (self.f > 0)

    def accumulate(self, values: Tensor, table: Float[Tensor, "batch column"]) -> Float[Tensor, "latent column"]:
        """sum_i values_ij table_i."""
        return values.T @ table

    def sum_tokens(self, values: Tensor) -> Float[Tensor, " latent"]:
        """sum_i values_ij."""
        return values.sum(0)

    def counts(self) -> Int64[Tensor, " latent"]:
        """Number of tokens on which each latent is active."""
        return (self.f > 0).sum(0)


@dataclass(frozen=True)
class SparseCode:
    """The active pairs of a code, in the order of their tokens."""

    token: Int64[Tensor, " pair"]
    latent: Int64[Tensor, " pair"]
    values: Float[Tensor, " pair"]
    n_tokens: int
    n_latents: int

    @classmethod
    def at(cls, flat: Int64[Tensor, " pair"], values: Float[Tensor, " pair"], n_tokens: int, n_latents: int) -> SparseCode:
        """From ascending positions in the flattened `[batch, latent]` matrix."""
        return cls(flat // n_latents, flat % n_latents, values, n_tokens, n_latents)

    @cached_property
    def _token_offsets(self) -> Tensor:
        counts = torch.bincount(self.token, minlength=self.n_tokens)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The pairs' order by latent, and where each latent starts in it."""
        if self.latent.device.type == "cpu":
            small = self.n_latents <= np.iinfo(np.uint16).max
            key = self.latent.numpy().astype(np.uint16 if small else np.int64)  # radix sort below 2^16
            order = torch.from_numpy(np.argsort(key, kind="stable"))
        else:
            order = torch.argsort(self.latent, stable=True)
        counts = self.counts()
        return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])

    def decode(self, weights: Float[Tensor, "latent column"]) -> Float[Tensor, "batch column"]:
        """sum_j f_ij W_j."""
        return F.embedding_bag(
            self.latent, weights, self._token_offsets, mode="sum", per_sample_weights=self.values.to(weights.dtype)
        )

    def dot(self, table: Float[Tensor, "batch column"], weights: Float[Tensor, "latent column"]) -> Float[Tensor, " pair"]:
        """<table_i, W_j> of each active pair, without gathering rows: the bag's gradient on its sample weights."""
        dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            table, weights, self.latent, self._token_offsets, self.token, 0, -1
        )
        return dots

    def of_latents(self, per_latent: Float[Tensor, " latent"]) -> Float[Tensor, " pair"]:
        """A per-latent quantity at each active pair."""
        return per_latent[self.latent]

    def accumulate(
        self, values: Float[Tensor, " pair"], table: Float[Tensor, "batch column"]
    ) -> Float[Tensor, "latent column"]:
        """sum_i values_ij table_i: a bag per latent over its tokens, so that nothing is scattered."""
        order, offsets = self.by_latent
        return F.embedding_bag(self.token[order], table, offsets, mode="sum", per_sample_weights=values[order])

    def sum_tokens(self, values: Float[Tensor, " pair"]) -> Float[Tensor, " latent"]:
        """sum_i values_ij, in the dtype of `values`."""
        return torch.zeros(self.n_latents, dtype=values.dtype, device=values.device).index_add_(0, self.latent, values)

    def counts(self) -> Int64[Tensor, " latent"]:
        """Number of tokens on which each latent is active."""
        return torch.bincount(self.latent, minlength=self.n_latents)


Code = DenseCode | SparseCode


def true_positions(mask: Tensor) -> Int64[Tensor, " pair"]:
    """Ascending flat positions of True; numpy's search is twice as fast as torch's on the CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def positive_code(pre: Float[Tensor, "batch latent"], dense_above: float) -> Code:
    """ReLU of the pre-activations; dense when more than the share `dense_above` of them is positive."""
    mask = pre > 0
    n_active = int(mask.sum())
    if n_active > dense_above * pre.numel():
        return DenseCode(pre.clamp(min=0))
    flat = true_positions(mask)
    return SparseCode.at(flat, pre.flatten()[flat], *pre.shape)


def largest_code(
    pre: Float[Tensor, "batch latent"], norms: Float[Tensor, " latent"], n_keep: int, guess: float
) -> tuple[SparseCode, float]:
    """BatchTopK: keep the `n_keep` largest v_ij = ReLU(pre_ij) * norms_j of the whole batch, exactly.

    Args:
        guess: where the search for candidates starts, best a little under the smallest kept v. It changes the cost only:
            with too few candidates it is lowered, down to 0, where every positive v is one.

    Returns:
        The code (fewer pairs when fewer are positive), and the smallest kept v (0 when none is).
    """
    safe = norms.clamp(min=torch.finfo(norms.dtype).tiny)
    while True:
        flat = true_positions(pre > guess / safe)
        if len(flat) >= n_keep or guess == 0.0:
            break
        guess = guess * 0.7 if guess > 1e-6 else 0.0
    f = pre.flatten()[flat]
    v = f * norms[flat % pre.shape[1]]
    if len(flat) > n_keep:
        kept = torch.topk(v, n_keep, sorted=False).indices.sort().values
        flat, f, v = flat[kept], f[kept], v[kept]
    smallest = float(v.min()) if len(v) else 0.0
    return SparseCode.at(flat, f, *pre.shape), smallest


def above_code(pre: Float[Tensor, "batch latent"], norms: Float[Tensor, " latent"], threshold: float) -> SparseCode:
    """Inference of BatchTopK: keep v_ij > threshold (and > 0)."""
    flat = true_positions((pre > 0) & (pre * norms > threshold))
    return SparseCode.at(flat, pre.flatten()[flat], *pre.shape)
