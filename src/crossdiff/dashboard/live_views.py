"""What the live page shows of a request: its texts as tinted tokens, and the latents of a token with their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.live_actions import Done, check_shown
from crossdiff.dashboard.pages import sign_of_verdict
from crossdiff.dashboard.readings import Part, Reading, strongest
from crossdiff.latents.ranking import plausible
from crossdiff.report.cards import ExampleView, Piece, pieces, prompt_view
from crossdiff.report.concept_cards import plain_title
from crossdiff.report.examples import Context, Token, visible
from crossdiff.report.marks import Sign
from crossdiff.report.reading import CANDIDATE_DELTA_NORM
from crossdiff.report.wording import number

SHOWN = 6
"""Latents that are shown unless the reader chooses some."""
WORDS_BEFORE, WORDS_AFTER = 8, 5
"""Tokens around the strongest one that stand for a latent without an explanation."""
ENDINGS = {"length": "Cut off at the limit of tokens.", "stopped": "Stopped by you.", "finished": ""}
Cell = tuple[int, Piece]
"""A token with its position."""


class Meaning(NamedTuple):
    """One latent in a line: its verdict, and its explanation, or else the words around its strongest token (`marked`)."""

    latent: int
    sign: Sign
    explanation: str
    before: str = ""
    marked: str = ""
    after: str = ""


class Active(NamedTuple):
    """A latent that is active on a token; `share` is v in relation to its largest activation."""

    meaning: Meaning
    v: float
    share: float | None


class TextView(NamedTuple):
    """One text: the tokens of its prompt and of its answer, each tinted by its number of active latents."""

    name: str
    ending: str
    prompt: tuple[Cell, ...]
    answer: tuple[Cell, ...] | None


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


def show(coder: Coder, done: Done, key: str) -> Shown:
    """The views of a request."""
    latents = check_shown(coder, done.form)
    if not latents:
        leaning = coder.table.filter(plausible() & (pl.col("delta_norm") >= CANDIDATE_DELTA_NORM))
        ranks = dict(leaning.select("latent", "rank_sum").iter_rows())
        latents = strongest(done.parts, "active" if done.form.order == "active" else "specific", ranks, SHOWN)
    return Shown(
        key,
        tuple(map(_text_view, done.parts)),
        tuple(
            LatentViews(
                meaning_of(coder, latent), tuple((part.name, view_of(coder, part.reading, latent)) for part in done.parts)
            )
            for latent in latents
        ),
        can_continue=done.form.kind == "chat" and len(done.parts) > 1,
    )


def _text_view(part: Part) -> TextView:
    reading = part.reading
    counts = reading.counts()
    context = Context(_tokens(reading, counts.astype(float).tolist()), -1, False, False)
    cells = tuple(enumerate(pieces(context, float(max(counts.max(initial=1), 1)))))
    answer = None if part.answer is None else cells[reading.answer_from :]
    return TextView(part.name, ENDINGS[part.ending], cells[: reading.answer_from], answer)


def view_of(coder: Coder, reading: Reading, latent: int) -> ExampleView:
    """The text tinted by the activation of one latent. The tokens of the answer are marked."""
    row = coder.row(latent)
    assert row is not None
    values = reading.of(latent).tolist()
    highest = max(row["max_activation"], *values) or 1.0
    origin = f"maximum {number(max(values))} here, {number(row['max_activation'])} in the analysed text"
    view = prompt_view(origin, _tokens(reading, values), highest)
    return view._replace(pieces=tuple(
        piece._replace(classes=f"{piece.classes} written") if at >= reading.answer_from else piece
        for at, piece in enumerate(view.pieces)
    ))  # fmt: skip


def _tokens(reading: Reading, values: Sequence[float]) -> tuple[Token, ...]:
    return tuple(map(Token, reading.texts, reading.flags, values))


def meaning_of(coder: Coder, latent: int) -> Meaning:
    """One latent in a line."""
    row = coder.row(latent)
    assert row is not None
    sign = sign_of_verdict(row["verdict"])
    if label := coder.label(latent):
        return Meaning(latent, sign, label)
    examples = coder.database.examples(latent, 1, 0)
    return Meaning(latent, sign, "", *(plain_title(examples[0], WORDS_BEFORE, WORDS_AFTER) if examples else ()))


def active_on(coder: Coder, reading: Reading, position: int) -> list[Active]:
    """The latents of a token, the strongest first."""
    found = []
    for latent, v in reading.at(position):
        row = coder.row(latent)
        assert row is not None
        found.append(Active(meaning_of(coder, latent), v, v / row["max_activation"] if row["max_activation"] else None))
    return found


def token_text(reading: Reading, position: int) -> str:
    """The text of a token with signs for white space."""
    return visible(reading.texts[position])
