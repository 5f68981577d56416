"""Colours and shapes of verdicts and pools, the same in every figure, table and card.

The palette is that of Okabe and Ito (2008), which colour-blind readers can tell apart; every group has its own shape as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c",
)  # fmt: skip
RULE = "#8a8a8a"
"""Axes and reference lines."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How a group is drawn: colour, marker shape as Plotly names it, opacity, and size in pixels."""

    colour: str
    symbol: str
    opacity: float = 0.9
    size: int = 8


VERDICT_MARKS = {
    "shared": Mark(BLUE, "circle", 0.45, 5),
    "undecided": Mark(GREY, "circle-open", 0.6, 6),
    "base_specific": Mark(GREEN, "square"),
    "rotated": Mark(PURPLE, "triangle-up"),
    "complete_shrinkage": Mark(ORANGE, "star"),
    "latent_decoupling": Mark(SKY, "x"),
    "chat_specific": Mark(VERMILLION, "diamond", 0.95, 9),
}
POOL_MARKS = {
    "chat_specific": Mark(VERMILLION, "diamond", 1.0, 10),
    "shared": Mark(BLUE, "circle", 1.0, 9),
    "base_sae": Mark(GREEN, "square", 1.0, 9),
    "bag_of_words": Mark(GREY, "x", 1.0, 8),
}
_OTHER_POOLS = (
    Mark(PURPLE, "triangle-up", 1.0, 9),
    Mark(ORANGE, "star", 1.0, 9),
)
GLYPHS = {
    "circle": "\N{BLACK CIRCLE}",
    "circle-open": "\N{WHITE CIRCLE}",
    "diamond": "\N{BLACK DIAMOND}",
    "square": "\N{BLACK SQUARE}",
    "star": "\N{BLACK STAR}",
    "triangle-up": "\N{BLACK UP-POINTING TRIANGLE}",
    "x": "\N{MULTIPLICATION X}",
}


class Sign(NamedTuple):
    """The name of a verdict or pool with its coloured glyph, for text."""

    name: str
    glyph: str
    colour: str


def sign_of(name: str, mark: Mark) -> Sign:
    """The sign that matches a mark of the figures."""
    return Sign(name, GLYPHS[mark.symbol], mark.colour)


def verdict_mark(verdict: str) -> Mark:
    """The mark of a verdict; `dead`, which no scatter shows, has that of `undecided`."""
    return VERDICT_MARKS.get(verdict, VERDICT_MARKS["undecided"])


def pool_mark(pool: str, pools: Sequence[str]) -> Mark:
    """The mark of a pool; pools without one of their own take the next free one."""
    if pool in POOL_MARKS:
        return POOL_MARKS[pool]
    others = [name for name in pools if name not in POOL_MARKS]
    return _OTHER_POOLS[others.index(pool) % len(_OTHER_POOLS)]
