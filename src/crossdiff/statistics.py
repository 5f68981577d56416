"""Values with 95% intervals: jackknife over blocks of documents, Fieller's interval of a ratio, bootstrap, Wilson's score.

Blocks and resamples are always the first axis. The jackknife functions take arrays of numpy and tensors of torch alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from crossdiff.shapes import Float64, Tensor

CONFIDENCE = 0.95
"""Coverage of every interval in the project."""

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate(Generic[T]):
    """A value with the ends of its 95% interval: numbers, or tensors with one entry per latent. NaN where undefined."""

    value: T
    low: T
    high: T


UNDEFINED = Estimate(float("nan"), float("nan"), float("nan"))


def student_t(n_blocks: int) -> float:
    """Student's t for a two-sided interval from this many blocks."""
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, n_blocks - 1))


def jackknife_se(left_out: Any) -> Any:
    """Standard error from the values that each leave out one block, `[block, ...]` (Efron & Stein 1981)."""
    n_blocks = len(left_out)
    return ((n_blocks - 1) * ((left_out - left_out.mean(0)) ** 2).mean(0)) ** 0.5


def jackknife(value: Any, left_out: Any) -> Estimate[Any]:
    """The value from all blocks with its symmetric interval.

    Args:
        left_out: `[block, ...]`, the values from all blocks but one; of at least two blocks.
    """
    half = jackknife_se(left_out) * student_t(len(left_out))
    return Estimate(value, value - half, value + half)


def ratio(
    a: Float64[Tensor, " latent"],
    b: Float64[Tensor, " latent"],
    a_left_out: Float64[Tensor, "block latent"],
    b_left_out: Float64[Tensor, "block latent"],
) -> Estimate[Tensor]:
    """a / b with Fieller's interval, from estimates that vary together; all NaN where b's own interval contains 0.

    The error of a ratio is not symmetric, and a standard error of the ratio is too small on the side on which its denominator
    may shrink. Fieller (1954) asks instead which ratios r the data allow: those for which a - r b is within its error of 0,

        |a - r b| <= t * se(a - r b),      se(a - r b)^2 = var(a) - 2 r cov(a, b) + r^2 var(b)

    a quadratic in r. Its solutions form an interval exactly when the interval of b excludes 0.

    Args:
        a, b: estimates from all blocks; a_left_out, b_left_out: from all blocks but one (jackknife, Efron & Stein 1981).
    """
    import torch

    n_blocks = len(a_left_out)
    from_a = a_left_out - a_left_out.mean(0)
    from_b = b_left_out - b_left_out.mean(0)
    var_a, var_b, cov = ((n_blocks - 1) * product.mean(0) for product in (from_a**2, from_b**2, from_a * from_b))
    t2 = student_t(n_blocks) ** 2
    square = b**2 - t2 * var_b
    middle = a * b - t2 * cov
    constant = a**2 - t2 * var_a
    root = (middle**2 - square * constant).clamp(min=0).sqrt()
    is_defined = square > 0
    found = (a / b, (middle - root) / square, (middle + root) / square)
    return Estimate(*(torch.where(is_defined, each, torch.nan) for each in found))


def bootstrap(value: float, resamples: npt.NDArray[np.float64]) -> Estimate[float]:
    """The value with the percentile interval of its resamples; resamples that are not finite do not count.

    Undefined if the value is not finite, or no resample is.
    """
    defined = resamples[np.isfinite(resamples)]
    if not np.isfinite(value) or not len(defined):
        return UNDEFINED
    low, high = np.quantile(defined, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Estimate(float(value), float(low), float(high))


def wilson(count: int, n: int) -> Estimate[float]:
    """The share `count` / `n` with Wilson's score interval."""
    if n == 0:
        raise ValueError("a share of no observations has no interval")
    from scipy.stats import binomtest

    ends = binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(count / n, float(ends.low), float(ends.high))
