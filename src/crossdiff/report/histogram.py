"""A histogram of activations as a small drawing that needs no script, and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from crossdiff.report import wording
from crossdiff.report.examples import Histogram

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 480, 170, 52, 22, 8
"""Size of the drawing in its own units, and the room for the labels."""
FLOOR = 0.25
"""Height of a single token, in powers of ten, so that it can be seen on the logarithmic axis."""


class Bar(NamedTuple):
    """A bin: its place in the drawing, and its range of v and number of tokens as text."""

    x: float
    y: float
    width: float
    height: float
    span: str
    tokens: str


class Tick(NamedTuple):
    """A label of an axis and its place along it."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class HistogramView:
    """The bars with the ticks of both axes; `summary` says in words what they show."""

    bars: tuple[Bar, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    summary: str


def histogram_view(found: Histogram, frequency: float) -> HistogramView:
    """The drawing of a histogram.

    Args:
        frequency: share of the analysed tokens on which the latent is active.
    """
    n, highest = len(found.counts), max(found.counts)
    step, tall = (WIDTH - LEFT) / n, math.log10(highest) + FLOOR
    room = HEIGHT - TOP - BOTTOM

    def height(count: int) -> float:
        return room * (math.log10(count) + FLOOR) / tall

    bars = tuple(
        Bar(
            round(LEFT + index * step, 2), round(HEIGHT - BOTTOM - height(count), 2), round(max(step - 0.8, 0.6), 2),
            round(height(count), 2), f"{wording.number(index * found.width)} to {wording.number((index + 1) * found.width)}",
            f"{count:,}",
        )
        for index, count in enumerate(found.counts)
        if count
    )  # fmt: skip
    up = tuple(
        Tick(round(HEIGHT - BOTTOM - height(10**power), 2), _power_of_ten(power))
        for power in range(0, int(math.log10(highest)) + 1, 1 if highest < 10_000 else 2)
    )
    across = tuple(Tick(LEFT + share * (WIDTH - LEFT), wording.number(share * n * found.width)) for share in (0, 0.5, 1))
    total = sum(found.counts)
    summary = (
        f"{total:,} tokens with v above 0, which are {wording.share(frequency)} of the analysed ones; the tokens with v of 0 "
        "are not drawn"
    )
    return HistogramView(bars, across, up, summary)


def _power_of_ten(power: int) -> str:
    """1, 10, 100, 1,000, 10k, 100k, 1M: short enough for the axis."""
    if power < 4:
        return f"{10**power:,}"
    return f"{10 ** (power % 3)}{'k' if power < 6 else 'M' if power < 9 else 'G'}"
