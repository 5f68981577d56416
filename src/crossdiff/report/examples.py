"""Examples from a crosscoder's SQLite database, and the part of each that a page shows."""

from __future__ import annotations

import sqlite3
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from crossdiff.errors import UserError, check_latents
from crossdiff.files import open_sqlite
from crossdiff.integrity import intact
from crossdiff.latents.example_schema import FORMAT
from crossdiff.text.chat import Flag

TOP_EXAMPLES = 5
PER_BAND = 20
"""Imported examples shown of each band of a latent's range; published databases hold as many."""
TOKENS_BEFORE = 26
TOKENS_AFTER = 14

_SELECT = """
    SELECT kind, quantile, dataset, label, document, position, activation, token_ids, flags, positions, activations, sequence
    FROM examples JOIN sequences USING (sequence) WHERE latent = ?
"""


class Token(NamedTuple):
    """One token: its text, its flags and the latent's activation v on it. A page has thousands, hence a tuple."""

    text: str
    flags: int
    activation: float


class Tokens(Sequence[Token]):
    """The tokens of a sequence. Most pages show only those around the maximum, so each is decoded when it is read.

    Attributes:
        ids: `[token]`.
        flags: `[token]`, bits of `Flag`.
        activations: `[token]`, the latent's v.
    """

    def __init__(
        self,
        ids: npt.NDArray[np.int32],
        flags: npt.NDArray[np.uint8],
        activations: npt.NDArray[np.float32],
        vocabulary: Mapping[int, str],
    ) -> None:
        assert len(ids) == len(flags) == len(activations)
        self.ids = ids
        self.flags = flags
        self.activations = activations
        self._vocabulary = vocabulary

    def with_activations(self, activations: npt.NDArray[np.float32]) -> Tokens:
        """The same tokens with other activations."""
        return Tokens(self.ids, self.flags, activations, self._vocabulary)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, at: int) -> Token: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Token, ...]: ...
    def __getitem__(self, at: int | slice) -> Token | tuple[Token, ...]:
        if isinstance(at, slice):
            texts = [self._vocabulary.get(token_id, f"[token {token_id}]") for token_id in self.ids[at].tolist()]
            return tuple(map(Token, texts, self.flags[at].tolist(), self.activations[at].tolist()))
        at = range(len(self))[at]
        return self[at : at + 1][0]

    def __iter__(self) -> Iterator[Token]:
        return iter(self[:])

    def __repr__(self) -> str:
        return f"<{len(self)} tokens>"


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence on which a latent is active, chosen for its maximum: `activation` at the token `position`.

    `kind` is "top", "quantile", or "band" for imported examples; `quantile` is None for "top". Imported examples have
    neither a dataset nor a document.
    """

    kind: str
    quantile: float | None
    dataset: str | None
    label: str | None
    document: int | None
    position: int
    activation: float
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Context:
    """The tokens around an example's maximum, which is `tokens[peak]`, and whether text was cut off on either side."""

    tokens: tuple[Token, ...]
    peak: int
    cut_before: bool
    cut_after: bool


class ExampleDatabase:
    """A crosscoder's examples, open for reading. Threads may share it: each has a connection of its own."""

    def __init__(self, path: Path, command: str = "crossdiff analyze") -> None:
        if not path.is_file():
            raise UserError(f"{path} is missing; run `{command}` to write it")
        self.path = path
        self.command = command
        self._own = threading.local()
        with self._reading() as database:
            metadata = dict(database.execute("SELECT key, value FROM metadata"))
            if metadata.get("format") != FORMAT:
                found = metadata.get("format")
                raise UserError(f"{path} has format {found!r}, this version reads {FORMAT!r}; run `{command}` again")
            self.n_latents = int(metadata["n_latents"])
            self.vocabulary: dict[int, str] = dict(database.execute("SELECT token_id, text FROM vocabulary"))

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection; an error of SQLite becomes one that says what to do."""
        try:
            if not hasattr(self._own, "database"):
                # When a thread ends, another one may close its connection.
                self._own.database = open_sqlite(intact(self.path), any_thread=True)
            yield self._own.database
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path} cannot be read ({error}); run `{self.command}` again") from error

    def close(self) -> None:
        """Close this thread's connection."""
        if hasattr(self._own, "database"):
            self._own.database.close()
            del self._own.database

    def examples(
        self, latent: int, top: int = TOP_EXAMPLES, per_quantile: int = 1, per_band: int = PER_BAND
    ) -> tuple[Example, ...]:
        """The top examples of a latent, then `per_quantile` of each quantile from high to low, without repeating a sequence
        that is among the top ones; of imported examples, `per_band` of each band from high to low."""
        check_latents([latent], self.n_latents, f"the crosscoder of {self.path}")
        with self._reading() as database:
            strongest = database.execute(f"{_SELECT} AND kind = 'top' ORDER BY rank LIMIT ?", (latent, top))
            shown = {row[-1]: row for row in strongest}
            lower = database.execute(f"{_SELECT} AND kind <> 'top' ORDER BY quantile DESC, rank", (latent,))
            groups: dict[tuple[str, float], list[tuple[Any, ...]]] = {}
            for row in lower:
                if row[-1] not in shown:
                    groups.setdefault(row[:2], []).append(row)
        most = {"quantile": per_quantile, "band": per_band}
        rows = [*shown.values(), *(row for group, rows in groups.items() for row in rows[: most[group[0]]])]
        return tuple(_example(self, row) for row in rows)

    def strongest(self, latents: Sequence[int], n: int) -> dict[int, tuple[Example, ...]]:
        """The `n` strongest examples of each of several latents that has any, from one query."""
        check_latents(latents, self.n_latents, f"the crosscoder of {self.path}")
        marks = ", ".join("?" * len(latents))
        query = _SELECT.replace("SELECT", "SELECT latent,").replace("latent = ?", f"latent IN ({marks})")
        found: dict[int, list[Example]] = {}
        with self._reading() as database:
            strongest = "kind <> 'quantile' AND rank < ? ORDER BY latent, quantile DESC, rank"
            for latent, *row in database.execute(f"{query} AND {strongest}", (*latents, n)):
                own = found.setdefault(latent, [])
                if len(own) < n:
                    own.append(_example(self, tuple(row)))
        return {latent: tuple(examples) for latent, examples in found.items()}


def read_examples(
    path: Path, latents: Sequence[int], command: str = "crossdiff analyze", per_band: int = PER_BAND
) -> dict[int, tuple[Example, ...]]:
    """The top examples of each latent or concept, then one per quantile or `per_band` per band.

    `command` writes the database.
    """
    with closing(ExampleDatabase(path, command)) as database:
        return {latent: database.examples(latent, per_band=per_band) for latent in latents}


def _example(database: ExampleDatabase, row: tuple[Any, ...]) -> Example:
    path, again = database.path, f"run `{database.command}` again"
    kind, quantile, dataset, label, document, position, activation, *blobs, sequence = row
    try:
        ids, flags, positions, active = map(np.frombuffer, blobs, ("<i4", "u1", "<i4", "<f4"))
    except (TypeError, ValueError) as error:  # not bytes, or not a whole number of values
        raise UserError(f"{path}: sequence {sequence} is damaged ({error}); {again}") from error
    inside = bool(((positions >= 0) & (positions < len(ids))).all())
    if len(flags) != len(ids) or len(positions) != len(active) or not inside or not 0 <= position < len(ids):
        raise UserError(
            f"{path}: sequence {sequence} has {len(ids)} tokens, {len(flags)} flags, {len(positions)} positions, "
            f"{len(active)} activations and its maximum at {position}; expected one flag per token, one activation per "
            f"position, and every position inside the sequence; {again}"
        )
    activations = np.zeros(len(ids), dtype=np.float32)
    activations[positions] = active
    tokens = Tokens(ids, flags, activations, database.vocabulary)
    return Example(kind, quantile, dataset, label, document, position, activation, tokens)


def context_of(example: Example, before: int = TOKENS_BEFORE, after: int = TOKENS_AFTER) -> Context:
    """Trim an example to `before` tokens, the maximum and `after` tokens; a side that is too short leaves its room to the
    other."""
    length = before + after + 1
    start = max(0, min(example.position - before, len(example.tokens) - length))
    end = min(len(example.tokens), start + length)
    return Context(example.tokens[start:end], example.position - start, start > 0, end < len(example.tokens))


def _role(flags: int) -> str:
    for role in (Flag.BOS, Flag.TEMPLATE, Flag.USER, Flag.ASSISTANT):
        if flags & role:
            return str(role.name).lower()
    return "plain"


_ROLES = tuple(_role(flags) for flags in range(16))
"""The role of every combination of flags: a page has thousands of tokens, and enumerations are slow."""


def role_of(token: Token) -> str:
    """The role that a token is shown with: bos, template, user, assistant or plain. Of several flags the first counts."""
    return _ROLES[token.flags & 15]


def visible(text: str) -> str:
    """A token's text with a sign for each invisible character: line breaks, tabs, lone spaces, control and direction
    characters. A line break becomes a return sign alone; callers that want the break itself add it."""
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
    # Joiners are part of emoji and scripts; other format characters could reverse the direction of the page's own text.
    shown = unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or character in "\u200c\u200d"
    return character if shown else f"[U+{ord(character):04X}]"
