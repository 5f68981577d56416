"""Triton kernels for what torch lacks or does slowly on a GPU: selection, sums of rows, Adam.

Each has a torch counterpart in `kernels` or `adam`, which the CPU uses; the tests compare both with float64. All are
deterministic: a result depends on the inputs and never on the order in which programs run, so a resumed training is the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd import Function

from crossdiff.crosscoder.adam import BETA1, BETA2, EPSILON
from crossdiff.shapes import Float, Int64, Tensor

PART = 4096
"""Entries of a row that one program of the selection reads."""
COLUMNS, ROWS, WARPS = 512, 4, 1
"""Tile of one program that sums rows, and its warps: few, because most latents are active on few tokens of a batch."""
UPDATED = 2048
"""Parameters that one program of Adam updates."""


@triton.jit  # type: ignore[untyped-decorator]
def _count_kernel(raw, limit, counts, n_columns, n_parts, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    part = tl.program_id(0)
    row = (part // n_parts).to(tl.int64)
    column = (part % n_parts) * PART + tl.arange(0, PART)
    inside = column < n_columns
    value = tl.load(raw + row * n_columns + column, mask=inside, other=0.0).to(tl.float32)
    above = inside & (value > tl.load(limit + column, mask=inside, other=0.0))
    tl.store(counts + part, tl.sum(above.to(tl.int32), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _position_kernel(raw, limit, ends, positions, n_columns, n_parts, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    part = tl.program_id(0)
    row = (part // n_parts).to(tl.int64)
    column = (part % n_parts) * PART + tl.arange(0, PART)
    inside = column < n_columns
    value = tl.load(raw + row * n_columns + column, mask=inside, other=0.0).to(tl.float32)
    above = inside & (value > tl.load(limit + column, mask=inside, other=0.0))
    one = above.to(tl.int32)
    place = tl.load(ends + part) - tl.sum(one, 0) + tl.cumsum(one, 0) - 1
    tl.store(positions + place, row * n_columns + column, mask=above)


@triton.jit(do_not_specialize=["n_pairs"])  # type: ignore[untyped-decorator]
def _bag_kernel(  # type: ignore[no-untyped-def]
    table, rows, amounts, bounds, out, weights, dots, n_columns, n_pairs,
    SUM: tl.constexpr, DOT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n_columns
    first = tl.load(bounds + bag)
    last = tl.load(bounds + bag + 1)
    total = tl.zeros((ROWS, COLUMNS), dtype=out.dtype.element_ty)
    if DOT:
        weight = tl.load(weights + bag * n_columns + column, mask=inside, other=0.0).to(tl.float32)
    for start in range(first, last, ROWS):
        pair = start + tl.arange(0, ROWS)
        real = pair < last
        row = tl.load(rows + pair, mask=real, other=0).to(tl.int64)
        tile = tl.load(
            table + row[:, None] * n_columns + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
        ).to(out.dtype.element_ty)  # fmt: skip
        if SUM:
            total += tl.load(amounts + pair, mask=real, other=0.0).to(out.dtype.element_ty)[:, None] * tile
        if DOT:
            tl.store(dots + block.to(tl.int64) * n_pairs + pair, tl.sum(tile * weight[None, :], 1), mask=real)
    if SUM:
        tl.store(out + bag * n_columns + column, tl.sum(total, 0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _along_kernel(  # type: ignore[no-untyped-def]
    table, rows, amounts, bounds, directions, out, n_bags, n_columns, n_models, n_directions,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    model = tl.program_id(1) % n_models
    block = tl.program_id(1) // n_models
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n_columns
    first = tl.load(bounds + bag)
    last = tl.load(bounds + bag + 1)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, ROWS):
        pair = start + tl.arange(0, ROWS)
        real = pair < last
        row = tl.load(rows + pair, mask=real, other=0).to(tl.int64)
        place = (row[:, None] * n_models + model) * n_columns + column[None, :]
        tile = tl.load(table + place, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.load(amounts + pair, mask=real, other=0.0)[:, None] * tile
    vector = tl.sum(total, 0)
    for direction in range(n_directions):
        along = tl.load(directions + (bag * n_directions + direction) * n_columns + column, mask=inside, other=0.0)
        number = (block * n_directions + direction) * n_models + model
        tl.store(out + number.to(tl.int64) * n_bags + bag, tl.sum(vector * along, 0))


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def _adam_kernel(  # type: ignore[no-untyped-def]
    parameter, gradient, first, second, copy, scale, n, rate, correction1, correction2, seed,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPSILON: tl.constexpr,
    HAS_COPY: tl.constexpr, ROUNDS: tl.constexpr, UPDATED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * UPDATED + tl.arange(0, UPDATED)
    divisor = tl.load(scale)
    inside = index < tl.where(divisor < float("inf"), n, 0)  # nothing is updated for NaN either
    g = tl.load(gradient + index, mask=inside, other=0.0) / divisor
    m = tl.load(first + index, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + index, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(parameter + index, mask=inside, other=0.0)
    m = m + (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    if ROUNDS:  # to one of the two nearest numbers, with a chance that keeps the mean
        drawn = tl.randint(seed, index.to(tl.int32)).to(tl.uint32, bitcast=True)
        m = ((m.to(tl.uint32, bitcast=True) + (drawn >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        v = ((v.to(tl.uint32, bitcast=True) + (drawn & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    p = p - rate / correction1 * m / (tl.sqrt(v) / correction2 + EPSILON)
    tl.store(parameter + index, p, mask=inside)
    tl.store(first + index, m.to(first.dtype.element_ty), mask=inside)
    tl.store(second + index, v.to(second.dtype.element_ty), mask=inside)
    if HAS_COPY:
        tl.store(copy + index, p.to(copy.dtype.element_ty), mask=inside)


class Above:
    """The entries of a matrix that are above their column's limit; the matrix is read once to count and once to find them.

    Args:
        raw: `[row, column]`, contiguous, float32 or bfloat16; limit: `[column]`, float32.
    """

    def __init__(self, raw: Float[Tensor, "row column"], limit: Float[Tensor, " column"]) -> None:
        assert raw.is_contiguous() and limit.is_contiguous()
        self._raw, self._limit = raw, limit
        self._n_parts = triton.cdiv(raw.shape[1], PART)
        counts = torch.empty(len(raw) * self._n_parts, dtype=torch.int32, device=raw.device)
        if len(counts):
            _count_kernel[(len(counts),)](raw, limit, counts, raw.shape[1], self._n_parts, PART=PART, num_warps=8)
        self._ends = counts.cumsum(0)
        self.number = int(self._ends[-1]) if len(counts) else 0

    def mask(self) -> Tensor:
        """Which entries they are, `[row, column]`."""
        return self._raw > self._limit

    def positions(self) -> Int64[Tensor, " pair"]:
        """Their ascending flat positions."""
        found = torch.empty(self.number, dtype=torch.int64, device=self._raw.device)
        if self.number:
            _position_kernel[(len(self._ends),)](
                self._raw, self._limit, self._ends, found, self._raw.shape[1], self._n_parts, PART=PART, num_warps=8
            )
        return found


def sums_and_dots(
    table: Float[Tensor, "row column"],
    rows: Int64[Tensor, " pair"],
    bounds: Int64[Tensor, " bag_and_end"],
    amounts: Float[Tensor, " pair"] | None = None,
    weights: Float[Tensor, "bag column"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums and products of bags of neighbouring pairs, `rows[bounds[b] : bounds[b + 1]]`, from one read of the table's rows.

    Returns:
        With `amounts`, the sum of amount * row for each bag, `[bag, column]`, in the amounts' dtype. With `weights`, the
        product of each pair's row with its bag's weights, `[pair]`. What was not asked for has no meaning.
    """
    table, rows = table.contiguous(), rows.contiguous()
    n_bags, n_blocks = len(bounds) - 1, triton.cdiv(table.shape[1], COLUMNS)
    partial = torch.empty(0 if weights is None else n_blocks, len(rows), dtype=torch.float32, device=table.device)
    sums = partial if amounts is None else amounts.new_empty(n_bags, table.shape[1])
    if n_bags:
        _bag_kernel[(n_bags, n_blocks)](
            table, rows, table if amounts is None else amounts.contiguous(), bounds, sums,
            table if weights is None else weights.contiguous(), partial, table.shape[1], len(rows),
            SUM=amounts is not None, DOT=weights is not None, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return sums, partial.sum(0)


def sum_of_rows_along(
    table: Float[Tensor, "row model_column"],
    rows: Int64[Tensor, " pair"],
    bounds: Int64[Tensor, " bag_and_end"],
    amounts: Float[Tensor, " pair"],
    directions: Float[Tensor, "bag direction column"],
) -> Float[Tensor, "direction model bag"]:
    """The products of each bag's sum of rows, model by model, with the bag's directions; the sums themselves are not kept."""
    n_bags, n_directions, n_columns = directions.shape
    n_models, n_blocks = table.shape[1] // n_columns, triton.cdiv(n_columns, COLUMNS)
    partial = torch.empty(n_blocks, n_directions, n_models, n_bags, dtype=torch.float32, device=table.device)
    if n_bags:
        _along_kernel[(n_bags, n_blocks * n_models)](
            table.contiguous(), rows.contiguous(), amounts.contiguous(), bounds, directions.contiguous(), partial,
            n_bags, n_columns, n_models, n_directions, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return partial.sum(0)


class _SumTokens(Function):
    """The sum of the values of each latent's pairs; differentiable."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, latent: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
        ctx.save_for_backward(latent)
        ones = values.new_ones(1, 1)
        return sums_and_dots(ones, torch.zeros_like(order), bounds, values[order])[0].squeeze(1)

    @staticmethod
    def backward(ctx: Any, on_sum: Tensor) -> tuple[Tensor | None, ...]:
        (latent,) = ctx.saved_tensors
        return on_sum[latent], None, None, None


def sum_tokens(
    values: Float[Tensor, " pair"],
    latent: Int64[Tensor, " pair"],
    order: Int64[Tensor, " pair"],
    bounds: Int64[Tensor, " latent_and_end"],
) -> Float[Tensor, " latent"]:
    """The sum of the values of each latent's pairs, which `order` sorts by latent; differentiable."""
    found: Tensor = _SumTokens.apply(values, latent, order, bounds)  # type: ignore[no-untyped-call]
    return found


def adam(
    parameter: Float[Tensor, "..."],
    gradient: Float[Tensor, "..."],
    first: Float[Tensor, "..."],
    second: Float[Tensor, "..."],
    copy: Float[Tensor, "..."] | None,
    scale: Float[Tensor, ""],
    rate: float,
    step: int,
    seed: int,
) -> None:
    """One update by Adam in place; see `Adam.update`.

    Args:
        first, second: the moments; those in bfloat16 are rounded up or down at random, with a chance that keeps their mean.
        copy: of the parameter in another dtype, written too.
        scale: what the gradient is divided by; nothing is updated if it is not finite.
        step: number of this update, from 1; seed: of the rounding.
    """
    n = parameter.numel()
    _adam_kernel[(triton.cdiv(n, UPDATED),)](
        parameter, gradient, first, second, parameter if copy is None else copy, scale, n, rate,
        1 - BETA1**step, (1 - BETA2**step) ** 0.5, seed, BETA1=BETA1, BETA2=BETA2, EPSILON=EPSILON,
        HAS_COPY=copy is not None, ROUNDS=first.dtype == torch.bfloat16, UPDATED=UPDATED, num_warps=8,
    )  # fmt: skip
