"""Codes of a batch, dense and sparse, with the products that a training step and the analysis need.

A code holds the latent activations f `[batch, latent]`. Both kinds offer the same products, and each product equals what plain
dense autograd gives; the tests compare them with it in float64. Weights are latent-major: `[latent, column]`, where the columns
are source and d_model flattened, so that the weights of a latent are contiguous in memory.

The sparse products are embedding bags: their cost grows only with the number of (token, latent) pairs. It is bounded by reading
rows of a table in random order, so the table is the smaller one where there is a choice, in slices that stay in the cache. On a
GPU the same products are kernels of our own (`triton_kernels`), and weights and tables may be in bfloat16; sums are in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F

from crossdiff.crosscoder import gpu
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Bool, Float, Int64, Tensor

CACHED = 10_000_000
"""Bytes of a table whose rows can be read in random order from the CPU's cache (measured: below 5 MB, copying the slices costs
more than it saves; above 16 MB, they no longer fit the cache)."""
SAMPLED = 64
"""Number of tokens that suggest where the selection starts to look in the first step."""


def product_dtype(matmul: str, weights: Tensor) -> torch.dtype:
    """The dtype of the inputs of products with these weights, by the setting `matmul`; a CPU has none faster than its own."""
    return torch.bfloat16 if weights.is_cuda and matmul == "bfloat16" else weights.dtype


def matmul(a: Float[Tensor, "row inner"], b: Float[Tensor, "inner column"], out: Tensor | None = None) -> Tensor:
    """a @ b in the dtype of `b`, with sums and result in float32 if that is bfloat16."""
    if b.dtype != torch.bfloat16:
        return torch.mm(a, b, out=out)
    if b.is_cuda:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return torch.mm(a.to(b.dtype).float(), b.float())  # the CPU has no such product


@dataclass(frozen=True)
class DenseCode:
    """A code as a full matrix, which is cheaper when more than a few percent of it is active.

    Attributes:
        mask: the pairs of the code; f is 0 elsewhere.
    """

    f: Float[Tensor, "batch latent"]
    mask: Bool[Tensor, "batch latent"]

    @property
    def values(self) -> Tensor:
        return self.f

    @property
    def n_tokens(self) -> int:
        return len(self.f)

    @property
    def n_latents(self) -> int:
        return self.f.shape[1]

    def with_values(self, values: Tensor) -> DenseCode:
        """The same pairs with other activations."""
        return DenseCode(values, self.mask)

    def decode(self, weights: Float[Tensor, "latent column"]) -> Float[Tensor, "batch column"]:
        """sum_j f_ij W_j."""
        return matmul(self.f, weights)

    def dot(self, table: Float[Tensor, "batch column"], weights: Float[Tensor, "latent column"]) -> Tensor:
        """<table_i, W_j> of the code's pairs, 0 elsewhere; shaped as `values`."""
        return matmul(table, weights.T).mul_(self.mask)

    def dot_and_accumulate(
        self, table: Float[Tensor, "batch column"], weights: Float[Tensor, "latent column"]
    ) -> tuple[Tensor, Float[Tensor, "latent column"]]:
        """`dot`, and `accumulate` of the code's own values."""
        return self.dot(table, weights), self.accumulate(self.f, table)

    def of_latents(self, per_latent: Float[Tensor, " latent"]) -> Tensor:
        """A per-latent quantity at each pair, 0 elsewhere; shaped as `values`."""
        return per_latent * self.mask

    def of_raw(self, raw: Float[Tensor, "batch latent"]) -> Tensor:
        """The entries of a full matrix at the code's pairs; shaped as `values`."""
        return raw * self.mask

    def accumulate(self, values: Tensor, table: Float[Tensor, "batch column"]) -> Float[Tensor, "latent column"]:
        """sum_i values_ij table_i."""
        return matmul(values.T, table)

    def sum_tokens(self, values: Tensor) -> Float[Tensor, " latent"]:
        """sum_i values_ij."""
        return values.sum(0)

    def counts(self) -> Int64[Tensor, " latent"]:
        """Number of tokens on which each latent is active."""
        return (self.f > 0).sum(0)


@dataclass(frozen=True)
class SparseCode:
    """A code as (token, latent) pairs in the order of their tokens; f is 0 elsewhere."""

    token: Int64[Tensor, " pair"]
    latent: Int64[Tensor, " pair"]
    values: Float[Tensor, " pair"]
    n_tokens: int
    n_latents: int

    def with_values(self, values: Float[Tensor, " pair"]) -> SparseCode:
        """The same pairs with other activations."""
        return SparseCode(self.token, self.latent, values, self.n_tokens, self.n_latents)

    @cached_property
    def _token_bounds(self) -> Int64[Tensor, " token_and_end"]:
        """Where the pairs of each token start and end."""
        return _bounds(self.token, self.n_tokens)

    @cached_property
    def by_latent(self) -> tuple[Int64[Tensor, " pair"], Int64[Tensor, " latent_and_end"]]:
        """The order of the pairs sorted by latent, and where those of each latent start and end in it."""
        if self.latent.device.type == "cpu":
            small = self.n_latents <= np.iinfo(np.uint16).max
            key = self.latent.numpy().astype(np.uint16 if small else np.int64)  # radix sort below 2^16
            order = torch.from_numpy(np.argsort(key, kind="stable"))
            return order, _bounds(self.latent[order], self.n_latents)
        latent, order = torch.sort(self.latent.int(), stable=True)
        return order, _bounds(latent, self.n_latents)

    @cached_property
    def _tokens_by_latent(self) -> Tensor:
        return self.token[self.by_latent[0]]

    def decode(self, weights: Float[Tensor, "latent column"]) -> Float[Tensor, "batch column"]:
        """sum_j f_ij W_j."""
        return _sum_of_rows(weights, self.latent, self._token_bounds, self.values)

    def dot(self, table: Float[Tensor, "batch column"], weights: Float[Tensor, "latent column"]) -> Float[Tensor, " pair"]:
        """<table_i, W_j> of each pair, without gathering rows: the gradient on the sample weights of `accumulate`."""
        order, bounds = self.by_latent
        if gpu.has_kernels(table):
            _, by_latent = gpu.kernels().sums_and_dots(table, self._tokens_by_latent, bounds, weights=weights)
        else:
            by_latent = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                weights, table, self._tokens_by_latent, bounds[:-1], self.latent[order], 0, -1
            )
        return self._in_order(by_latent)

    def dot_and_accumulate(
        self, table: Float[Tensor, "batch column"], weights: Float[Tensor, "latent column"]
    ) -> tuple[Float[Tensor, " pair"], Float[Tensor, "latent column"]]:
        """`dot`, and `accumulate` of the code's own values; a GPU reads the table once for both."""
        if not gpu.has_kernels(table):
            return self.dot(table, weights), self.accumulate(self.values, table)
        order, bounds = self.by_latent
        total, dots = gpu.kernels().sums_and_dots(table, self._tokens_by_latent, bounds, self.values[order], weights)
        return self._in_order(dots), total

    def _in_order(self, by_latent: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """Numbers of the pairs sorted by latent, in the code's own order."""
        return torch.empty_like(by_latent).index_copy_(0, self.by_latent[0], by_latent)

    def of_latents(self, per_latent: Float[Tensor, " latent"]) -> Float[Tensor, " pair"]:
        """A per-latent quantity at each pair."""
        return per_latent[self.latent]

    def of_raw(self, raw: Float[Tensor, "batch latent"]) -> Float[Tensor, " pair"]:
        """The entries of a full matrix at the code's pairs."""
        return raw.view(-1)[self.token * self.n_latents + self.latent]

    def accumulate(
        self, values: Float[Tensor, " pair"], table: Float[Tensor, "batch column"]
    ) -> Float[Tensor, "latent column"]:
        """sum_i values_ij table_i, as one bag of tokens per latent, so that nothing is scattered."""
        order, bounds = self.by_latent
        return _sum_of_rows(table, self._tokens_by_latent, bounds, values[order])

    def accumulate_along(
        self, table: Float[Tensor, "batch model_column"], directions: Float[Tensor, "latent direction column"]
    ) -> Float[Tensor, "direction model latent"]:
        """<sum_i f_ij table_i^m, D_jt> for each model m and direction t; a GPU keeps no sum per latent and column."""
        order, bounds = self.by_latent
        if gpu.has_kernels(table):
            found: Tensor = gpu.kernels().sum_of_rows_along(
                table, self._tokens_by_latent, bounds, self.values[order], directions
            )
            return found
        vectors = self.accumulate(self.values, table).view(self.n_latents, -1, directions.shape[2])
        return torch.einsum("jtd,jsd->tsj", directions, vectors)

    def sum_tokens(self, values: Float[Tensor, " pair"]) -> Float[Tensor, " latent"]:
        """sum_i values_ij, in the dtype of `values`."""
        if gpu.has_kernels(values):  # torch adds in an order that changes from run to run
            return gpu.kernels().sum_tokens(values, self.latent, *self.by_latent)  # type: ignore[no-any-return]
        return torch.zeros(self.n_latents, dtype=values.dtype, device=values.device).index_add_(0, self.latent, values)

    def counts(self) -> Int64[Tensor, " latent"]:
        """Number of tokens on which each latent is active."""
        active = (self.values > 0).long()  # on a GPU, to count or to choose would wait for the device
        return torch.zeros(self.n_latents, dtype=torch.int64, device=active.device).index_add_(0, self.latent, active)


Code = DenseCode | SparseCode


def _bounds(ascending: Tensor, n: int) -> Int64[Tensor, " bag_and_end"]:
    """Where each of the numbers 0 to n - 1 starts among ascending ones, and where the last one ends."""
    return torch.searchsorted(ascending, torch.arange(n + 1, dtype=ascending.dtype, device=ascending.device))


def _sum_of_rows(
    table: Float[Tensor, "row column"],
    rows: Int64[Tensor, " pair"],
    bounds: Int64[Tensor, " bag_and_end"],
    amounts: Float[Tensor, " pair"],
) -> Float[Tensor, "bag column"]:
    """The sum of amount * row for each bag; on the CPU, one slice of columns at a time."""
    if gpu.has_kernels(table):
        return gpu.kernels().sums_and_dots(table, rows, bounds, amounts)[0]  # type: ignore[no-any-return]
    n_columns, offsets, amounts = table.shape[1], bounds[:-1], amounts.to(table.dtype)
    width = max(64, CACHED // max(1, len(table) * table.element_size())) if table.device.type == "cpu" else n_columns
    if width >= n_columns:
        return F.embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=amounts)
    out = table.new_empty(len(offsets), n_columns)
    for first in range(0, n_columns, width):
        part = slice(first, first + width)
        out[:, part] = F.embedding_bag(rows, table[:, part], offsets, mode="sum", per_sample_weights=amounts)
    return out


@dataclass(frozen=True)
class Encoded:
    """The encoder's output for a batch, before the activation function.

    Attributes:
        raw: sum_s <x_s, e_j^s>, without bias.
        norms: sum_s ||d_j^s||, so that v = f * norms.
        threshold: BatchTopK's threshold at inference; own: parameters of the kind of sparsity, such as JumpReLU's thresholds.
        guess: where `largest` starts to look.
    """

    raw: Float[Tensor, "batch latent"]
    bias: Float[Tensor, " latent"]
    norms: Float[Tensor, " latent"]
    threshold: float = 0.0
    own: dict[str, Tensor] = field(default_factory=dict)
    guess: float = 0.0

    @property
    def n_tokens(self) -> int:
        return len(self.raw)

    def pre(self) -> Float[Tensor, "batch latent"]:
        """All pre-activations."""
        return self.raw + self.bias

    def _pairs(self, flat: Int64[Tensor, " pair"]) -> tuple[Tensor, Tensor, Tensor]:
        """Token, latent and pre-activation of ascending positions in the flattened matrix."""
        token = torch.div(flat, self.raw.shape[1], rounding_mode="floor")
        latent = flat - token * self.raw.shape[1]
        return token, latent, self.raw.view(-1)[flat] + self.bias[latent]

    def at(self, flat: Int64[Tensor, " pair"]) -> SparseCode:
        """The code of the pairs at ascending positions in the flattened matrix; f is the pre-activation."""
        return SparseCode(*self._pairs(flat), *self.raw.shape)

    def above(self, limit: Float[Tensor, " latent"] | float, dense_above: float = 1.0) -> Code:
        """The pairs whose pre-activation is above the latent's limit (at least 0); dense if they are many."""
        found = above(self.raw, limit - self.bias)
        if dense_above < 1.0 and found.number > dense_above * self.raw.numel():
            mask = found.mask()
            return DenseCode((self.raw + self.bias).mul_(mask), mask)
        return self.at(found.positions())

    def largest(self, n_keep: int, ranks: Ranks = ALONE) -> tuple[SparseCode, float]:
        """BatchTopK: keep exactly the `n_keep` largest v_ij = ReLU(pre_ij) * norms_j of the whole batch.

        With several ranks, each of which has other tokens or latents, the largest are those among all ranks.

        The search starts at `guess`, ideally a little below the smallest kept v; without one, where a sample of the tokens
        suggests. The guess only affects the cost: with too few candidates it is lowered, down to 0, where every positive v is a
        candidate.

        Returns:
            The code (with fewer pairs when fewer are positive), and the smallest kept v (0 when there is none).
        """
        guess, safe = self.guess, self.norms.clamp(min=torch.finfo(self.norms.dtype).tiny)
        if guess == 0.0:
            guess = self._guess_from_a_sample(n_keep, ranks)
        while True:
            found = above(self.raw, guess / safe - self.bias)
            if guess == 0.0 or ranks.total(found.number) >= n_keep:
                break
            guess = guess * 0.7 if guess > 1e-6 else 0.0
        token, latent, f = self._pairs(found.positions())
        v = f * self.norms[latent]
        kept, smallest = largest_values(v, n_keep, ranks)
        if kept is not None:
            token, latent, f = token[kept], latent[kept], f[kept]
        return SparseCode(token, latent, f, *self.raw.shape), smallest

    def _guess_from_a_sample(self, n_keep: int, ranks: Ranks) -> float:
        """The v that about 1.5 times as many pairs exceed as are to be kept, judging from a few tokens; equal on all ranks."""
        sample = self.raw[:: max(1, len(self.raw) // SAMPLED)]
        v = (sample + self.bias).mul_(self.norms).flatten()
        n = min(len(v), math.ceil(1.5 * n_keep / ranks.size * len(sample) / max(1, len(self.raw))))
        smallest = v.topk(n, sorted=False).values.min() if n else v.new_zeros(())
        return max(0.0, float(-ranks.maximum(-smallest)))

    def largest_of_each_token(self, k: int, ranks: Ranks = ALONE) -> SparseCode:
        """TopK: keep the k largest positive v of each token, among all ranks, each of which has other latents."""
        v = self.pre().mul_(self.norms)
        return self.at(true_positions(largest_in_rows(v, k, ranks) & (v > 0)))


def largest_values(v: Float[Tensor, " pair"], n: int, ranks: Ranks = ALONE) -> tuple[Int64[Tensor, " kept"] | None, float]:
    """Ascending positions of this rank's values among the `n` largest of all ranks (None: all), and the smallest of those `n`.

    Ties are broken in the order of the ranks, then of the positions.
    """
    if ranks.size == 1:
        kept = torch.topk(v, n, sorted=False).indices.sort().values if len(v) > n else None
        chosen = v if kept is None else v[kept]
        return kept, float(chosen.min()) if len(chosen) else 0.0
    every = ranks.lists(v if len(v) <= n else torch.topk(v, n, sorted=False).values)  # no rank can keep more
    values = torch.cat(every)
    if len(values) <= n:
        return None, float(values.min()) if len(values) else 0.0
    smallest = torch.topk(values, n, sorted=False).values.min()
    room = n - int((values > smallest).sum()) - sum(int((part == smallest).sum()) for part in every[: ranks.rank])
    kept = true_positions(v > smallest)
    return torch.cat([kept, true_positions(v == smallest)[: max(0, room)]]).sort().values, float(smallest)


def largest_in_rows(v: Float[Tensor, "row column"], k: int, ranks: Ranks = ALONE) -> Bool[Tensor, "row column"]:
    """Which entries are among the `k` largest of their row; the ranks have other columns of the same rows.

    Ties are broken in the order of the ranks, then of the columns.
    """
    if ranks.size == 1:
        chosen = torch.zeros_like(v, dtype=torch.bool)
        return chosen.scatter_(1, v.topk(min(k, v.shape[1]), dim=1, sorted=False).indices, True)
    best = v.new_full((len(v), k), -torch.inf)
    n_own = min(k, v.shape[1])
    best[:, :n_own] = v.topk(n_own, dim=1).values
    every = ranks.stack(best)
    smallest = every.transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1:]
    above, equal = every > smallest, every == smallest
    room = k - above.sum((0, 2)) - equal[: ranks.rank].sum((0, 2))
    ties = v == smallest
    return (v > smallest) | (ties & (ties.cumsum(1) <= room.unsqueeze(1)))


@runtime_checkable
class Above(Protocol):
    """The entries of a matrix that are above their column's limit."""

    @property
    def number(self) -> int: ...

    def mask(self) -> Bool[Tensor, "row column"]: ...

    def positions(self) -> Int64[Tensor, " pair"]:
        """Their ascending flat positions."""


class _Above:
    """`Above` by torch and numpy."""

    def __init__(self, raw: Float[Tensor, "row column"], limit: Float[Tensor, " column"]) -> None:
        self._mask = raw > limit

    @cached_property
    def number(self) -> int:
        """How many there are; numpy counts several bytes at a time."""
        mask = self._mask
        return int(np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else torch.count_nonzero(mask))

    def mask(self) -> Bool[Tensor, "row column"]:
        return self._mask

    def positions(self) -> Int64[Tensor, " pair"]:
        """Their ascending flat positions."""
        return true_positions(self._mask)


def above(raw: Float[Tensor, "row column"], limit: Float[Tensor, " column"]) -> Above:
    """The entries of a matrix that are above their column's limit."""
    return gpu.kernels().Above(raw, limit) if gpu.has_kernels(raw) else _Above(raw, limit)


def true_positions(mask: Tensor) -> Int64[Tensor, " pair"]:
    """Ascending flat positions of True entries; numpy's search is twice as fast as torch's on the CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)
