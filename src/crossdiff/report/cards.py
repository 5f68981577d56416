"""The card of one latent: its measures, and its examples as highlighted tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from crossdiff.latents.ranking import RANKED, title
from crossdiff.report import wording
from crossdiff.report.examples import Context, Example, Token, context_of, joined, role_of, visible
from crossdiff.report.histogram import HistogramView, histogram_view
from crossdiff.report.marks import Sign, sign_of, verdict_mark
from crossdiff.report.overlap import overlap_words
from crossdiff.report.records import TOKEN_GROUPS, Latent
from crossdiff.text.chat import Flag

LEVELS = 8
"""Steps of the tint that shows an activation."""

NUS = {
    "nu_error": "share in what the crosscoder misses of the base model",
    "nu_reconstruction_nobias": "share in the base model's reconstruction, without its bias and the model's mean",
    "nu_reconstruction": "the same with both, as in the published tables; most of its negative values come from them",
    "nu_activation": "share in the base model's activation",
}
"""The nus of a card and what each measures."""
_CHIPS = ("bos", "template")
_DOT = " \N{MIDDLE DOT} "
_TEMPLATE, _ASSISTANT = int(Flag.TEMPLATE), int(Flag.ASSISTANT)


class Piece(NamedTuple):
    """What the page shows of one token, or of several that make one character together: `n` tokens from the `first` on.
    The one with the maximum `is_peak`.

    `speaker` is the label before the first token of a turn's content. `title` says what is known of each token.
    """

    text: str
    classes: str
    title: str
    begins_line: bool
    speaker: str | None
    ends_line: bool
    first: int
    n: int = 1
    is_peak: bool = False


class ExampleView(NamedTuple):
    """One highlighted context, and a line about where it is from."""

    origin: str
    pieces: tuple[Piece, ...]
    cut_before: bool = False
    cut_after: bool = False


class Display(NamedTuple):
    """How a page shows its examples: `whole` or around the maximum, with `raw` white space or symbols, and with a tint relative
    to the largest activation of `each` example or of all."""

    whole: bool = False
    raw: bool = False
    each: bool = False

    @classmethod
    def of(cls, context: str, whitespace: str, tint: str) -> Display:
        """What the fields of a page's address ask for."""
        return cls(context == "whole", whitespace == "raw", tint == "each")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The fields of the address of a page that shows its examples like this, without the defaults."""
        fields = ((self.whole, "context", "whole"), (self.raw, "whitespace", "raw"), (self.each, "tint", "each"))
        return [(name, value) for wanted, name, value in fields if wanted]

    @property
    def choices(self) -> list[tuple[dict[str, bool], str]]:
        """What can be changed, each with the words of its link."""
        return [
            ({"whole": not self.whole}, "Only around the maximum" if self.whole else "Whole sequences"),
            ({"raw": not self.raw}, "White space as symbols" if self.raw else "Raw white space"),
            ({"each": not self.each}, "Tint over all examples" if self.each else "Tint per example"),
        ]


class Measure(NamedTuple):
    """A number of a card, with its meaning as hover text."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Card:
    """One latent with its measures, the behaviours that it predicts best, and what the first look says of it."""

    anchor: str
    latent: int
    sign: Sign
    reason: str
    predicts: tuple[str, ...]
    measures: tuple[Measure, ...]
    fires_on: str
    explanation: str | None
    look: str
    histogram: HistogramView | None
    examples: tuple[ExampleView, ...]


def anchor_of(crosscoder: str, latent: int) -> str:
    """The id of a latent's card on the page."""
    return f"{crosscoder}-{latent}"


def card_of(crosscoder: str, latent: Latent, predicts: tuple[str, ...]) -> Card:
    """The card of one latent; `predicts` names the behaviours that it predicts best."""
    return Card(
        anchor=anchor_of(crosscoder, latent.latent),
        latent=latent.latent,
        sign=sign_of(wording.words(latent.verdict), verdict_mark(latent.verdict)),
        reason=wording.reason(latent.verdict_reason),
        predicts=predicts,
        measures=_measures(latent),
        fires_on=fires_on(latent.shares),
        explanation=latent.explanation,
        look=overlap_words(latent.overlap, "latent"),
        histogram=None if latent.histogram is None else histogram_view(latent.histogram, latent.frequency),
        examples=tuple(example_view(example, latent.max_activation) for example in latent.examples),
    )


def _measures(latent: Latent) -> tuple[Measure, ...]:
    interval, fixed, number = wording.interval, wording.fixed, wording.number
    scale = (
        "0: nothing of the latent's chat direction, 1: as much as in the chat model, negative: it is there with the opposite "
        "sign; 95% interval"
    )
    rank_sum = wording.whole(None if math.isnan(latent.rank_sum) else round(latent.rank_sum))
    found = (
        *(Measure(title(nu), interval(getattr(latent, nu)), f"{meaning}. {scale}") for nu, meaning in NUS.items()),
        Measure(
            "delta_norm",
            fixed(latent.delta_norm),
            "relative length of the two directions: 0 base-only, 0.5 shared, 1 chat-only",
        ),
        Measure("decoder cosine", fixed(latent.decoder_cosine), "cosine of the base and the chat direction"),
        Measure("active on", f"{wording.share(latent.frequency)} of tokens", f"{latent.n_active:,} of the analysed tokens"),
        Measure("largest activation", number(latent.max_activation), "v, the activation times the sum of the decoder norms"),
        Measure(
            "rank sum", rank_sum, f"rank by {' plus rank by '.join(map(title, RANKED))}; the lowest is the most chat-specific"
        ),
    )
    if math.isnan(latent.delta_norm) and math.isnan(latent.nu_error.value):
        found = tuple(measure for measure in found if measure.value != wording.UNDEFINED)  # one decoder, or both vanish
    if math.isnan(latent.alone.value):
        return found
    meaning = "nats by which it reduces the KL to the chat model when patched alone into the base model; 95% interval"
    return (*found, Measure("KL closed alone", interval(latent.alone), meaning))


def fires_on(shares: Mapping[str, float]) -> str:
    """The groups of tokens with their shares of the active tokens, the largest first."""
    found = [(shares[group], group) for group in TOKEN_GROUPS if shares[group] > 0]
    return ", ".join(f"{group} {wording.share(part)}" for part, group in sorted(found, reverse=True))


def example_view(example: Example, highest: float, whole: bool = False, raw: bool = False) -> ExampleView:
    """An example around its maximum, or `whole`; `highest` is the activation of the strongest tint (0 for the example's own
    maximum), and `raw` leaves white space as it is."""
    context = Context(example.tokens[:], example.position, False, False) if whole else context_of(example)
    kind = "top" if example.quantile is None else f"{example.kind} {wording.number(example.quantile)}"
    parts = [kind, f"maximum {wording.number(example.activation)}"]
    if example.dataset:
        parts.append(example.dataset)
    if example.label:
        parts.append(f"labelled {wording.words(example.label)}")
    parts.append(f"position {example.position}")
    strongest = highest if highest > 0 else example.activation
    return ExampleView(_DOT.join(parts), pieces(context, strongest, raw), context.cut_before, context.cut_after)


def example_views(examples: Sequence[Example], highest: float, display: Display) -> list[ExampleView]:
    """The examples of a page; `highest` is the activation of the strongest tint over all."""
    strongest = 0.0 if display.each else highest
    return [example_view(example, strongest, display.whole, display.raw) for example in examples]


def prompt_view(origin: str, tokens: tuple[Token, ...], highest: float) -> ExampleView:
    """A whole text with one latent's activations; `highest` is the activation of the strongest tint."""
    peak = max(range(len(tokens)), key=lambda index: tokens[index].activation)
    marked = peak if tokens[peak].activation > 0 else -1
    return ExampleView(origin, pieces(Context(tokens, marked, False, False), highest))


def _value(activation: float) -> str:
    return f"value {wording.number(activation)}" if activation else "not active"


def pieces(context: Context, highest: float, raw: bool = False, told: Callable[[float], str] = _value) -> tuple[Piece, ...]:
    """The tokens of a context. Each turn's template begins a new line, and its content begins with the speaker.

    Tokens that make one character together are one piece, with the activation of the strongest of them. `told` says what an
    activation is.
    """
    found: list[Piece] = []
    tokens, roles = context.tokens, [role_of(token) for token in context.tokens]
    for at, own in joined(tokens):
        parts, index = tokens[at], at.start
        token, role = parts[0], roles[index]
        text = own if raw else visible(own)
        value = max((part.activation for part in parts), key=abs)
        classes = ["t"]
        if role in _CHIPS:
            classes.append(role)
        if value:
            classes.append(f"{'a' if value > 0 else 'n'}{_level(abs(value), highest)}")
        is_peak = at.start <= context.peak < at.stop
        if is_peak:
            classes.append("peak")
        starts = index > 0 and _begins_turn(token, tokens[index - 1], roles[index - 1])
        titles = (_token_title(part, context.start + index + place, told) for place, part in enumerate(parts))
        found.append(
            Piece(
                text=text,
                classes=" ".join(classes),
                title="\n".join([*([f"{text} is {len(parts)} tokens"] if len(parts) > 1 else []), *titles]),
                begins_line=starts and not found[-1].ends_line,
                speaker=role if role in ("user", "assistant") and (index == 0 or role != roles[index - 1]) else None,
                ends_line="\n" in own and role not in _CHIPS and not raw,
                first=index,
                n=len(parts),
                is_peak=is_peak,
            )
        )
    return tuple(found)


def _token_title(token: Token, position: int, told: Callable[[float], str]) -> str:
    """What is known of a token: its text or bytes, then its value, its id and its position."""
    facts = [told(token.activation)]
    if token.id is not None:
        facts.append(f"token id {token.id}")
    return f"{visible(token.text)}\n{_DOT.join([*facts, f'position {position}'])}"


def _begins_turn(token: Token, previous: Token, previous_role: str) -> bool:
    """Whether a token is the first template token after a turn. The token that closes an answer is part of the answer."""
    opens = bool(token.flags & _TEMPLATE) and not token.flags & _ASSISTANT
    return opens and (previous_role not in _CHIPS or bool(previous.flags & _ASSISTANT))


def _level(activation: float, highest: float) -> int:
    """Step of the tint for the size of an activation, from 1 to `LEVELS` for `highest`."""
    return min(LEVELS, max(1, math.ceil(LEVELS * activation / highest)))
