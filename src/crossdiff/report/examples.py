"""Examples from a crosscoder's SQLite database, and the part of each that a page shows."""

from __future__ import annotations

import sqlite3
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from crossdiff.errors import UserError, check_latents
from crossdiff.files import open_sqlite
from crossdiff.integrity import intact
from crossdiff.latents.example_schema import FORMAT
from crossdiff.text.chat import Flag
from crossdiff.text.token_texts import MOST_BYTES, REPLACEMENT, TokenText, character_at, characters

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
    """One token: its text, its flags, the latent's activation v on it, and its id. A page has thousands, hence a tuple.

    `data` has the bytes of a token that is not made of whole characters (see `TokenText`).
    """

    text: str
    flags: int
    activation: float
    id: int | None = None
    data: bytes = b""


def joined(tokens: Sequence[Token]) -> Iterator[tuple[slice, str]]:
    """Tokens in groups that share a character, with the text of each group."""
    return characters([TokenText(token.text, token.data) for token in tokens])


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
        data: Mapping[int, bytes] = MappingProxyType({}),
    ) -> None:
        assert len(ids) == len(flags) == len(activations)
        self.ids = ids
        self.flags = flags
        self.activations = activations
        self._vocabulary = vocabulary
        self._data = data

    def with_activations(self, activations: npt.NDArray[np.float32]) -> Tokens:
        """The same tokens with other activations."""
        return Tokens(self.ids, self.flags, activations, self._vocabulary, self._data)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, at: int) -> Token: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Token, ...]: ...
    def __getitem__(self, at: int | slice) -> Token | tuple[Token, ...]:
        if isinstance(at, slice):
            ids = self.ids[at].tolist()
            texts = [self._vocabulary.get(token_id, unknown(token_id)) for token_id in ids]
            data = [self._data.get(token_id, b"") for token_id in ids]
            return tuple(map(Token, texts, self.flags[at].tolist(), self.activations[at].tolist(), ids, data))
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


def strongest_text(example: Example) -> str:
    """The token with an example's maximum as text, together with those that make one character with it."""
    first = max(0, example.position - MOST_BYTES + 1)
    tokens = example.tokens[first : example.position + MOST_BYTES]
    return character_at([TokenText(token.text, token.data) for token in tokens], example.position - first)[1]


@dataclass(frozen=True, slots=True)
class Context:
    """The tokens around an example's maximum, which is `tokens[peak]`, and whether text was cut off on either side.

    `start` is the position of the first one in its sequence.
    """

    tokens: tuple[Token, ...]
    peak: int
    cut_before: bool
    cut_after: bool
    start: int = 0


@dataclass(frozen=True, slots=True)
class Histogram:
    """Tokens by activation: `counts[k]` have k * width <= v < (k + 1) * width and v > 0."""

    width: float
    counts: tuple[int, ...]


class Correlated(NamedTuple):
    """Another latent, the correlation of its activations with the latent's, and the sampled tokens on which both are active."""

    other: int
    correlation: float
    n_both: int


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
            self.has_strengths = bool(database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'histograms'").fetchone())
            self.n_sampled = int(metadata.get("correlated_over", 0))
            self.vocabulary, self.data = _vocabulary(database)

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

    def characters(self, ids: Sequence[int]) -> Iterator[tuple[slice, str]]:
        """Several tokens in a row, in groups that share a character, with the text of each group."""
        return characters([TokenText(self.vocabulary.get(each, ""), self.data.get(each, b"")) for each in ids])

    def histogram(self, latent: int) -> Histogram | None:
        """The histogram of a latent; None if it is never active, or if the analysis has none (`has_strengths`)."""
        rows = self._of(latent, "SELECT width, counts FROM histograms WHERE latent = ?")
        try:
            return Histogram(rows[0][0], tuple(np.frombuffer(rows[0][1], "<i8").tolist())) if rows else None
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path}: histogram {latent} is damaged ({error}); run `{self.command}` again") from error

    def correlated(self, latent: int) -> list[Correlated]:
        """The latents whose activations correlate most with the latent's, over `n_sampled` tokens; the highest first."""
        query = "SELECT other, correlation, n_both FROM correlated WHERE latent = ? ORDER BY rank"
        return [Correlated(*row) for row in self._of(latent, query)]

    def _of(self, latent: int, query: str) -> list[tuple[Any, ...]]:
        """The rows about one latent in a table that older analyses lack."""
        check_latents([latent], self.n_latents, f"the crosscoder of {self.path}")
        if not self.has_strengths:
            return []
        with self._reading() as database:
            return database.execute(query, (latent,)).fetchall()


def _vocabulary(database: sqlite3.Connection) -> tuple[dict[int, str], dict[int, bytes]]:
    """The text of each token, and the bytes of those that are parts of a character, which older analyses do not have."""
    columns = {name for (name,) in database.execute("SELECT name FROM pragma_table_info('vocabulary')")}
    texts: dict[int, str] = dict(database.execute("SELECT token_id, text FROM vocabulary"))
    if "bytes" in columns:
        return texts, dict(database.execute("SELECT token_id, bytes FROM vocabulary WHERE bytes IS NOT NULL"))
    return {token_id: unknown(token_id) if REPLACEMENT in text else text for token_id, text in texts.items()}, {}


def unknown(token_id: int) -> str:
    """What stands for a token whose text is not known."""
    return f"[token {token_id}]"


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
    tokens = Tokens(ids, flags, activations, database.vocabulary, database.data)
    return Example(kind, quantile, dataset, label, document, position, activation, tokens)


def context_of(example: Example, before: int = TOKENS_BEFORE, after: int = TOKENS_AFTER) -> Context:
    """Trim an example to `before` tokens, the maximum and `after` tokens; a side that is too short leaves its room to the
    other."""
    length = before + after + 1
    start = max(0, min(example.position - before, len(example.tokens) - length))
    end = min(len(example.tokens), start + length)
    return Context(example.tokens[start:end], example.position - start, start > 0, end < len(example.tokens), start)


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
    if text.isprintable() and REPLACEMENT not in text:
        return text
    return "".join(_sign(character) for character in text.replace("\r\n", "\n"))


def _sign(character: str) -> str:
    if character == "\n":
        return "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
    if character == "\t":
        return "\N{RIGHTWARDS ARROW TO BAR}"
    # Joiners are part of emoji and scripts; other format characters could reverse the direction of the page's own text.
    shown = unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or character in "\u200c\u200d"
    return character if shown and character != REPLACEMENT else f"[U+{ord(character):04X}]"
