"""Whether the first look said the same as a latent or a concept, in one sentence, and for how many concepts it did."""

from __future__ import annotations

from math import isnan

import polars as pl

from crossdiff.report.records import SAME, Overlap
from crossdiff.report.tables import overlap_of
from crossdiff.report.wording import fixed


def overlap_words(found: Overlap, what: str) -> str:
    """One sentence about a latent or concept, whichever `what` names; empty if nothing is known."""
    cosine, correlation = f"cosine {fixed(found.cosine)}", f"correlation {fixed(found.correlation)}"
    if isnan(found.cosine) and isnan(found.correlation):
        return ""
    if not (found.points or found.moves or isnan(found.cosine) or isnan(found.correlation)):
        closest = f"{_named(found.cosine_direction)}, {cosine}; {_named(found.correlation_direction)}, {correlation}"
        return f"The first look has no such direction (closest: {closest}; {SAME:g} would count)."
    if found.points:
        points = f"{_named(found.cosine_direction)} points {'the same' if found.cosine > 0 else 'the opposite'} way ({cosine})"
    elif isnan(found.cosine):
        points = f"the {what} has no direction in the chat model"
    else:
        points = f"no direction points the same way (largest {cosine})"
    if found.moves:
        so = f"rises and falls with the {what}" if found.correlation > 0 else f"falls where the {what} is active"
        same = found.points and found.cosine_direction == found.correlation_direction
        moves = f"the difference along {'it' if same else _named(found.correlation_direction)} {so} ({correlation})"
    elif isnan(found.correlation):
        moves = f"the {what} is not active in the sample of held-out tokens"
    else:
        moves = f"along no direction does the difference rise and fall with the {what} (largest {correlation})"
    return f"First look: {points}; {moves}."


def _named(direction: str | None) -> str:
    """A direction of the look within a sentence."""
    assert direction is not None  # its cosine or correlation is a number
    return direction.replace("mean over", "the mean difference over")


def shown_already(concepts: pl.DataFrame) -> str:
    """How many of a run's concepts its first look already showed; empty if nothing is known."""
    rows = concepts.filter("replicated", pl.col("verdict") == "chat_specific").iter_rows(named=True)
    found = [overlap for row in rows if not isnan((overlap := overlap_of(row)).cosine)]
    if not found:
        return ""
    either = sum(overlap.points or overlap.moves for overlap in found)
    return (
        f"Of the {len(found)} concepts that replicate and are chat-specific, {either} overlap with one of these directions: "
        f"{sum(overlap.points for overlap in found)} by where they point (a cosine of {SAME:g} or more in size), "
        f"{sum(overlap.moves for overlap in found)} by when they are active (such a correlation of their activation with the "
        f"difference between the models along it), {sum(overlap.points and overlap.moves for overlap in found)} by both."
    )
