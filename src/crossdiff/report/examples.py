"""Examples from a crosscoder's SQLite database, and the piece of each that is worth showing."""

import json
import sqlite3
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crossdiff.config import UserError
from crossdiff.text.chat import Flag

TOP_EXAMPLES = 5
TOKENS_BEFORE = 26
TOKENS_AFTER = 14


_SELECT = """
    SELECT kind, quantile, dataset, label, document, position, activation, tokens, flags, activations, sequence
    FROM examples JOIN sequences USING (sequence) WHERE latent = ?
"""


@dataclass(frozen=True, slots=True)
class Token:
    """One token: its decoded text, its flags and the latent's activation v on it."""

    text: str
    flags: int
    activation: float


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence on which a latent is active. `position` and `activation` are those of the maximum it was picked for.

    `kind` is "top" or "quantile"; `quantile` is None for "top".
    """

    kind: str
    quantile: float | None
    dataset: str
    label: str | None
    document: int
    position: int
    activation: float
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Context:
    """The tokens around an example's maximum. `peak` indexes `tokens`; the flags say whether text was cut off."""

    tokens: tuple[Token, ...]
    peak: int
    cut_before: bool
    cut_after: bool


def read_examples(path: Path, latents: Sequence[int]) -> dict[int, tuple[Example, ...]]:
    """The top examples of each latent, then one per quantile from high to low, each sequence among the top ones once.

    Raises UserError when the database is missing, damaged, or a sequence's arrays differ in length.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run `crossdiff analyze` to write it")
    found: dict[int, tuple[Example, ...]] = {}
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            for latent in latents:
                top = database.execute(f"{_SELECT} AND kind = 'top' ORDER BY rank LIMIT ?", (latent, TOP_EXAMPLES))
                shown = {row[-1]: row for row in top}
                lower = database.execute(f"{_SELECT} AND kind = 'quantile' ORDER BY quantile DESC, rank", (latent,))
                per_quantile: dict[object, tuple[object, ...]] = {}
                for row in lower:
                    if row[-1] not in shown:
                        per_quantile.setdefault(row[1], row)
                found[latent] = tuple(_example(path, row) for row in (*shown.values(), *per_quantile.values()))
    except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): run `crossdiff analyze` again") from error
    return found


def _example(path: Path, row: tuple[object, ...]) -> Example:
    kind, quantile, dataset, label, document, position, activation, tokens, flags, activations, sequence = row
    if not (
        isinstance(document, int) and isinstance(position, int) and isinstance(activation, float)
        and isinstance(tokens, str) and isinstance(flags, bytes) and isinstance(activations, bytes)
    ):  # fmt: skip
        types = ", ".join(type(part).__name__ for part in (document, position, activation, tokens, flags, activations))
        raise UserError(
            f"{path}: an example in sequence {sequence} has document, position, activation, tokens, flags and "
            f"activations of types {types}; expected int, int, float, str, bytes, bytes; run `crossdiff analyze` again"
        )
    texts = json.loads(tokens)
    bits = np.frombuffer(flags, dtype=np.uint8).tolist()
    values = np.frombuffer(activations, dtype="<f4").tolist() if len(activations) % 4 == 0 else []
    lengths = (len(texts), len(bits), len(values))
    if len(set(lengths)) != 1 or not 0 <= position < len(texts):
        raise UserError(
            f"{path}: sequence {sequence} has {lengths[0]} tokens, {lengths[1]} flags, {lengths[2]} activations and "
            f"its maximum at {position}; expected equal lengths with the maximum inside; run `crossdiff analyze` again"
        )
    return Example(
        kind=str(kind),
        quantile=quantile if isinstance(quantile, float) else None,
        dataset=str(dataset),
        label=label if isinstance(label, str) else None,
        document=document,
        position=position,
        activation=activation,
        tokens=tuple(Token(*token) for token in zip(texts, bits, values, strict=True)),
    )


def context_of(example: Example, before: int = TOKENS_BEFORE, after: int = TOKENS_AFTER) -> Context:
    """Trim an example to `before` tokens, the maximum and `after` tokens; room unused on one side goes to the other."""
    length = before + after + 1
    start = max(0, min(example.position - before, len(example.tokens) - length))
    end = min(len(example.tokens), start + length)
    return Context(example.tokens[start:end], example.position - start, start > 0, end < len(example.tokens))


def role_of(token: Token) -> str:
    """What a token is shown as: bos, template, user, assistant or plain; a token with several flags by the first."""
    for role in (Flag.BOS, Flag.TEMPLATE, Flag.USER, Flag.ASSISTANT):
        if token.flags & role:
            return str(role.name).lower()
    return "plain"


def visible(text: str) -> str:
    """A token's text with invisible characters shown: line ends, tabs, lone spaces, control and direction characters.

    Line breaks become a return sign; a caller that wants the break itself adds it after the sign.
    """
    if not text:
        return "\N{EMPTY SET}"
    if not text.strip(" "):
        return "\N{OPEN BOX}" * len(text)
    if text.isprintable():
        return text
    return "".join(_sign(character) for character in text.replace("\r\n", "\n"))


def _sign(character: str) -> str:
    if character == "\n":
        return "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
    if character == "\t":
        return "\N{RIGHTWARDS ARROW TO BAR}"
    # Joiners belong to emoji and scripts; other format characters could turn the direction of the page's own text.
    shown = unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or character in "\u200c\u200d"
    return character if shown else f"[U+{ord(character):04X}]"
