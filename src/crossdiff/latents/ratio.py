"""The ratio of two estimates that vary together, with Fieller's interval.

A ratio's error is not symmetric, and a standard error of the ratio is too small on the side where its denominator may shrink.
Fieller (1954) asks instead which ratios r the data allow: those for which a - r b is within its error of 0,

    |a - r b| <= t * se(a - r b),      se(a - r b)^2 = var(a) - 2 r cov(a, b) + r^2 var(b)

a quadratic in r, with variances from the jackknife. The set is an interval exactly when the one of b leaves out 0; otherwise
the ratio is undefined.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import t as student

from crossdiff.shapes import Float64, Tensor

CONFIDENCE = 0.95


def critical(n_blocks: int) -> float:
    """Student's t for a two-sided interval from so many blocks."""
    return float(student.ppf(0.5 + CONFIDENCE / 2, n_blocks - 1))


@dataclass(frozen=True)
class Ratio:
    """A ratio per latent with the ends of its 95% interval; all NaN where the denominator may be 0."""

    value: Float64[Tensor, " latent"]
    low: Float64[Tensor, " latent"]
    high: Float64[Tensor, " latent"]


def ratio(
    a: Float64[Tensor, " latent"],
    b: Float64[Tensor, " latent"],
    a_left_out: Float64[Tensor, "block latent"],
    b_left_out: Float64[Tensor, "block latent"],
) -> Ratio:
    """a / b from the estimates on all blocks and on all but one (jackknife, Efron & Stein 1981)."""
    n_blocks = len(a_left_out)
    from_a, from_b = a_left_out - a_left_out.mean(0), b_left_out - b_left_out.mean(0)
    var_a, var_b, cov = ((n_blocks - 1) * product.mean(0) for product in (from_a**2, from_b**2, from_a * from_b))
    t2 = critical(n_blocks) ** 2
    square, middle, constant = b**2 - t2 * var_b, a * b - t2 * cov, a**2 - t2 * var_a
    root = (middle**2 - square * constant).clamp(min=0).sqrt()
    defined = square > 0
    value, low, high = (torch.where(defined, x, torch.nan) for x in (a / b, (middle - root) / square, (middle + root) / square))
    return Ratio(value, low, high)
