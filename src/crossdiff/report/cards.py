"""What the page shows of one latent: its measures, and its examples as highlighted tokens."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from crossdiff.report import wording
from crossdiff.report.examples import Context, Example, Token, context_of, role_of, visible
from crossdiff.report.figures import VERDICT_MARKS, Mark
from crossdiff.report.records import TOKEN_GROUPS, Latent
from crossdiff.text.chat import Flag

LEVELS = 8
"""Steps of the one hue that shows an activation."""

_CHIPS = ("bos", "template")
_TEMPLATE, _ASSISTANT = int(Flag.TEMPLATE), int(Flag.ASSISTANT)

GLYPHS = {
    "circle": "\N{BLACK CIRCLE}",
    "circle-open": "\N{WHITE CIRCLE}",
    "diamond": "\N{BLACK DIAMOND}",
    "square": "\N{BLACK SQUARE}",
    "star": "\N{BLACK STAR}",
    "triangle-up": "\N{BLACK UP-POINTING TRIANGLE}",
    "x": "\N{MULTIPLICATION X}",
}


class Piece(NamedTuple):
    """One token as the page shows it. `speaker` is the label of a turn's content that begins here."""

    text: str
    classes: str
    title: str
    begins_line: bool
    speaker: str | None
    ends_line: bool


@dataclass(frozen=True, slots=True)
class Sign:
    """The coloured sign of a verdict or pool."""

    name: str
    glyph: str
    colour: str


@dataclass(frozen=True, slots=True)
class ExampleView:
    """One highlighted context with its origin in words."""

    origin: str
    pieces: tuple[Piece, ...]
    cut_before: bool
    cut_after: bool


@dataclass(frozen=True, slots=True)
class Card:
    """One latent with its measures as (name, value, explanation), and what it predicts best."""

    anchor: str
    latent: int
    sign: Sign
    reason: str
    predicts: tuple[str, ...]
    measures: tuple[tuple[str, str, str], ...]
    fires_on: str
    explanation: str | None
    examples: tuple[ExampleView, ...]


def sign_of(name: str, mark: Mark) -> Sign:
    """The sign with the mark that the figures draw."""
    return Sign(name, GLYPHS[mark.symbol], mark.colour)


def anchor_of(crosscoder: str, latent: int) -> str:
    """The id of a latent's card on the page."""
    return f"{crosscoder}-{latent}"


def card_of(crosscoder: str, latent: Latent, predicts: tuple[str, ...]) -> Card:
    """The card of one latent; `predicts` names the behaviours that it predicts best."""
    mark = VERDICT_MARKS.get(latent.verdict, VERDICT_MARKS["undecided"])
    interval, fixed, number = wording.interval, wording.fixed, wording.number
    nus = (
        ("nu_error", latent.nu_error, "the chat direction in the base model's error, as a share of the chat model's"),
        ("nu_reconstruction", latent.nu_reconstruction, "the chat direction in the base reconstruction"),
        ("nu_activation", latent.nu_activation, "the chat direction in the base activation"),
    )
    others: tuple[tuple[str, str, str], ...] = (
        ("delta_norm", fixed(latent.delta_norm), "relative decoder norm: 0 base-only, 0.5 shared, 1 chat-only"),
        ("decoder cosine", fixed(latent.decoder_cosine), "cosine of the base and the chat decoder direction"),
        ("active on", f"{wording.share(latent.frequency)} of tokens", f"{latent.n_active:,} of the analysed tokens"),
        (
            "largest activation",
            number(latent.max_activation),
            "v: the latent's activation times the sum of its decoder norms",
        ),
        (
            "rank sum",
            wording.whole(None if math.isnan(latent.rank_sum) else round(latent.rank_sum)),
            "rank by nu_error plus rank by nu_reconstruction, lowest first",
        ),
    )
    if not math.isnan(latent.alone.value):
        meaning = "nats that it takes off the KL to the chat model, patched alone into the base model; 95% interval"
        others += (("KL closed alone", interval(latent.alone), meaning),)
    return Card(
        anchor=anchor_of(crosscoder, latent.latent),
        latent=latent.latent,
        sign=sign_of(wording.words(latent.verdict), mark),
        reason=latent.verdict_reason,
        predicts=predicts,
        measures=(*((name, interval(nu), f"{meaning}; 95% interval") for name, nu, meaning in nus), *others),
        fires_on=_fires_on(latent),
        explanation=latent.explanation,
        examples=tuple(example_view(example, latent) for example in latent.examples),
    )


def _fires_on(latent: Latent) -> str:
    """Where a latent's active tokens lie, the largest share first."""
    shares = [(latent.shares[group], group) for group in TOKEN_GROUPS if latent.shares[group] > 0]
    return ", ".join(f"{group} {wording.share(part)}" for part, group in sorted(shares, reverse=True))


def example_view(example: Example, latent: Latent, whole: bool = False, raw: bool = False) -> ExampleView:
    """An example around its maximum or whole, with its origin in words; `raw` leaves white space as it is."""
    context = Context(example.tokens[:], example.position, False, False) if whole else context_of(example)
    kind = "top" if example.quantile is None else f"{example.kind} {wording.number(example.quantile)}"
    parts = [kind, f"maximum {wording.number(example.activation)}"]
    if example.dataset:
        parts.append(example.dataset)
    if example.label:
        parts.append(f"labelled {wording.words(example.label)}")
    parts.append(f"position {example.position}")
    highest = latent.max_activation if latent.max_activation > 0 else example.activation
    return ExampleView(" \N{MIDDLE DOT} ".join(parts), pieces(context, highest, raw), context.cut_before, context.cut_after)


def prompt_view(origin: str, tokens: tuple[Token, ...], highest: float) -> ExampleView:
    """A whole text with one latent's activations; `highest` is the activation of the strongest tint."""
    peak = max(range(len(tokens)), key=lambda index: tokens[index].activation)
    marked = peak if tokens[peak].activation > 0 else -1
    return ExampleView(origin, pieces(Context(tokens, marked, False, False), highest), False, False)


def pieces(context: Context, highest: float, raw: bool = False) -> tuple[Piece, ...]:
    """Tokens as the page's spans: a new line before each new turn's template, a label where a turn's content begins."""
    found: list[Piece] = []
    tokens, roles = context.tokens, [role_of(token) for token in context.tokens]
    for index, (token, role) in enumerate(zip(tokens, roles, strict=True)):
        text, active = token.text if raw else visible(token.text), token.activation > 0
        classes = [
            "t",
            *([role] if role in _CHIPS else []),
            *([f"a{_level(token.activation, highest)}"] if active else []),
        ]
        starts = index > 0 and _begins_turn(token, tokens[index - 1], roles[index - 1])
        found.append(
            Piece(
                text=text,
                classes=" ".join([*classes, "peak"] if index == context.peak else classes),
                title=f"{text}  {wording.number(token.activation)}" if active else f"{text}  not active",
                begins_line=starts and not found[-1].ends_line,
                speaker=role if role in ("user", "assistant") and (index == 0 or role != roles[index - 1]) else None,
                ends_line="\n" in token.text and role not in _CHIPS and not raw,
            )
        )
    return tuple(found)


def _begins_turn(token: Token, previous: Token, previous_role: str) -> bool:
    """Whether a token is the first template token after a turn; the token that closes an answer is part of it."""
    opens = bool(token.flags & _TEMPLATE) and not token.flags & _ASSISTANT
    return opens and (previous_role not in _CHIPS or bool(previous.flags & _ASSISTANT))


def _level(activation: float, highest: float) -> int:
    """Step of the hue for an activation above 0: 1 to `LEVELS`, which is the latent's maximum."""
    return min(LEVELS, max(1, math.ceil(LEVELS * activation / highest)))
