"""What the live page shows of a request: its texts as tinted tokens, and the latents of a token with their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from crossdiff.dashboard.briefs import Brief, briefs
from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.live_actions import Done, check_shown
from crossdiff.dashboard.pages import sign_of_verdict
from crossdiff.dashboard.readings import Part, Reading, strongest
from crossdiff.latents.ranking import plausible
from crossdiff.report.cards import ExampleView, Piece, pieces, prompt_view
from crossdiff.report.examples import Context, Token, visible
from crossdiff.report.marks import Sign
from crossdiff.report.reading import CANDIDATE_DELTA_NORM
from crossdiff.report.wording import number
from crossdiff.text.token_texts import TokenText, character_at

SHOWN = 6
"""Latents that are shown unless the reader chooses some."""
ENDINGS = {"length": "Cut off at the limit of tokens.", "stopped": "Stopped by you.", "finished": ""}


class Meaning(NamedTuple):
    """What a latent is about: its verdict, and the same in brief as in a list."""

    latent: int
    sign: Sign
    brief: Brief


class Active(NamedTuple):
    """A latent that is active on a token; `share` is v in relation to its largest activation."""

    meaning: Meaning
    v: float
    share: float | None


class TextView(NamedTuple):
    """One text: the tokens of its prompt and of its answer, each tinted by its number of active latents."""

    name: str
    ending: str
    prompt: tuple[Piece, ...]
    answer: tuple[Piece, ...] | None


class LatentViews(NamedTuple):
    """One latent on every text."""

    meaning: Meaning
    views: tuple[tuple[str, ExampleView], ...]


class Shown(NamedTuple):
    """Everything that the page shows of a request."""

    key: str
    texts: tuple[TextView, ...]
    latents: tuple[LatentViews, ...]
    can_continue: bool
    control: tuple[str, ...]


def show(coder: Coder, done: Done, key: str) -> Shown:
    """The views of a request, those of the latents that steered first."""
    steered = dict.fromkeys(latent for part in done.parts for latent, _ in part.strengths)
    latents = list(dict.fromkeys([*steered, *(check_shown(coder, done.form) or _chosen_for_reader(coder, done))]))
    return Shown(
        key,
        tuple(map(_text_view, done.parts)),
        tuple(
            LatentViews(meaning, tuple((part.name, view_of(coder, part.reading, meaning.latent)) for part in done.parts))
            for meaning in meanings(coder, latents)
        ),
        can_continue=done.form.kind == "chat" and len(done.parts) > 1,
        control=done.parts[0].reading.control,
    )


def _chosen_for_reader(coder: Coder, done: Done) -> list[int]:
    if done.form.order == "active" or not coder.compares:
        return strongest(done.parts, "active", {}, SHOWN)
    leaning = coder.table.filter(plausible() & (pl.col("delta_norm") >= CANDIDATE_DELTA_NORM))
    specific = coder.table.filter(verdict="chat_specific")
    ranks, maxima = (
        dict(rows.select("latent", column).iter_rows())
        for rows, column in ((leaning, "rank_sum"), (specific, "max_activation"))
    )
    return strongest(done.parts, "specific", ranks, SHOWN, maxima)


def _text_view(part: Part) -> TextView:
    reading = part.reading
    counts = reading.counts()
    context = Context(_tokens(reading, counts.astype(float).tolist()), -1, False, False)
    found = pieces(context, float(max(counts.max(initial=1), 1)), told=_count)
    prompt, answer = (tuple(each for each in found if (each.first < reading.answer_from) == asked) for asked in (True, False))
    return TextView(part.name, ENDINGS[part.ending], prompt, None if part.answer is None else answer)


def _count(n: float) -> str:
    return f"{n:,.0f} {'latent' if n == 1 else 'latents'} active"


def view_of(coder: Coder, reading: Reading, latent: int) -> ExampleView:
    """The text tinted by the activation of one latent. The tokens of the answer are marked."""
    row = coder.row(latent)
    assert row is not None
    values = reading.of(latent).tolist()
    highest = max(row["max_activation"], *values) or 1.0
    origin = f"maximum {number(max(values))} here, {number(row['max_activation'])} in the analysed text"
    view = prompt_view(origin, _tokens(reading, values), highest)
    return view._replace(pieces=tuple(
        piece._replace(classes=f"{piece.classes} written") if piece.first >= reading.answer_from else piece
        for piece in view.pieces
    ))  # fmt: skip


def _tokens(reading: Reading, values: Sequence[float]) -> tuple[Token, ...]:
    return tuple(map(Token, reading.texts, reading.flags, values, reading.ids, reading.data))


def meanings(coder: Coder, latents: Sequence[int]) -> list[Meaning]:
    """What each of several latents is about."""
    verdicts = coder.rows(np.array(latents, np.int64))["verdict"]
    found = briefs(coder, latents)
    return [Meaning(latent, sign_of_verdict(verdict), found[latent]) for latent, verdict in zip(latents, verdicts, strict=True)]


def active_on(coder: Coder, reading: Reading, position: int) -> list[Active]:
    """The latents of a token, the strongest first."""
    active = dict(reading.at(position))
    highest = coder.rows(np.array([*active], np.int64))["max_activation"]
    found = zip(meanings(coder, [*active]), active.values(), highest, strict=True)
    return [Active(meaning, v, v / most if most else None) for meaning, v, most in found]


class Shared(NamedTuple):
    """A character that several tokens make together, with the positions of the first and the last of them."""

    text: str
    first: int
    last: int


def shared_character(reading: Reading, position: int) -> Shared | None:
    """The character of which a token is a part; None if it is made of whole ones."""
    at, text = character_at(tuple(map(TokenText, reading.texts, reading.data)), position)
    return Shared(visible(text), at.start, at.stop - 1) if at.stop - at.start > 1 else None
