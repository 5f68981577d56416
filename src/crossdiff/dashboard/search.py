"""Search over explanations and example texts, in which a word on whose tokens a latent is active counts most.

The run itself is only read, so the index is in the user's cache, under a name that changes with the files it is built from. The
first start builds it in the background. For each word the index holds the latents that have it in their explanation or in the
contexts of their strongest examples, each with a weight. A full-text table has the same texts for phrases.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import threading
import unicodedata
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from crossdiff.dashboard.catalogue import Coder
from crossdiff.errors import UserError
from crossdiff.files import open_sqlite
from crossdiff.report.examples import TOKENS_AFTER, TOKENS_BEFORE, ExampleDatabase

FORMAT = 3
CONTEXTS = 5
"""Strongest examples of a latent whose text is indexed."""
TEXTS = 1 + CONTEXTS
"""Texts of a latent: its explanation and its contexts. A phrase is within one of them."""
BATCH = 2000
MAX_WORDS = 12
EXPLAINED, FULL = 255, 100
"""Weight of a word of the explanation, and of a word on which a latent is as active as anywhere. A word on which it is less
active has as many hundredths; one on which it is not active has 0."""
ADJACENT = 1 + EXPLAINED * MAX_WORDS
"""Added to the weight of a latent that has all words of a search side by side, which then comes before all others."""
_WORD = re.compile("(?:[^\\W_]|[\u0300-\u036f])+")


class Found(NamedTuple):
    """What a search has found.

    Attributes:
        latents: `[latent]`, those that have all the words.
        weights: `[latent]`, the sum of the words' weights.
        n_explained: number of latents with a word in their explanation.
        n_active: number of the others that are active on a word.
        n_adjacent: number of latents that have the words of a search without quotes side by side, 0 for a single word.
    """

    latents: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64]
    n_explained: int
    n_active: int
    n_adjacent: int = 0


def cache_folder() -> Path:
    """Folder of what can be made again: `crossdiff` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossdiff"


class Search:
    """The index of one crosscoder. `state` is "building", "ready" or the reason why it could not be built."""

    def __init__(self, coder: Coder, folder: Path) -> None:
        self.coder = coder
        self.state = "building"
        self.path = folder / f"{_fingerprint(coder)}.sqlite"
        self._own = threading.local()

    def start(self) -> None:
        """Build the index in the background unless it exists."""
        if self.path.is_file():
            self.state = "ready"
        else:
            threading.Thread(target=self.build, daemon=True, name=f"search {self.coder.name}").start()

    def build(self) -> None:
        """Write the index completely or not at all. Two dashboards may build it at once, hence the name of the partial file."""
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(partial)) as index, index:
                index.execute("CREATE TABLE words (word TEXT PRIMARY KEY, latents BLOB, weights BLOB) WITHOUT ROWID")
                index.execute(
                    "CREATE VIRTUAL TABLE texts USING fts5 (text, content='', tokenize='unicode61 remove_diacritics 0')"
                )
                index.executemany("INSERT INTO words VALUES (?, ?, ?)", self._words(index))
            partial.replace(self.path)
            self.state = "ready"
        except (OSError, sqlite3.Error, UserError) as error:
            self.state = f"search is unavailable: {error}"
        finally:
            partial.unlink(missing_ok=True)

    def _words(self, index: sqlite3.Connection) -> Iterator[tuple[str, bytes, bytes]]:
        """Every word with its latents and their weights, as bytes of int32 and uint8. The texts are written on the way."""
        found: dict[str, tuple[array[int], array[int]]] = defaultdict(lambda: (array("i"), array("B")))
        for latent, weights, texts in self._weights():
            rows = [(latent * TEXTS + at, " ".join(text)) for at, text in enumerate(texts)]
            index.executemany("INSERT INTO texts (rowid, text) VALUES (?, ?)", rows)
            for word, weight in weights.items():
                latents, own = found[word]
                latents.append(latent)
                own.append(weight)
        for word in sorted(found):
            latents, own = found[word]
            yield word, np.array(latents, "<i4").tobytes(), own.tobytes()

    def _weights(self) -> Iterator[tuple[int, dict[str, int], list[list[str]]]]:
        """Every latent with the weights of its words, and the words of its explanation and of each context in their order."""
        table, database = self.coder.table, self.coder.database
        explanations = table["explanation"].to_list() if self.coder.has_explanations else [None] * table.height
        said = dict(zip(table["latent"].to_list(), explanations, strict=True))
        query = (
            "SELECT latent, position, token_ids, positions, activations FROM examples JOIN sequences USING (sequence) "
            "WHERE latent >= ? AND latent < ? AND kind <> 'quantile' AND rank < ? ORDER BY latent, quantile DESC, rank"
        )
        for first in range(0, max(said, default=-1) + 1, BATCH):
            contexts: dict[int, list[tuple[int, bytes, bytes, bytes]]] = defaultdict(list)
            for latent, *example in database.rows(query, (first, first + BATCH, CONTEXTS)):
                if len(contexts[latent]) < CONTEXTS:
                    contexts[latent].append(tuple(example))
            for latent in range(first, first + BATCH):
                if latent in said:
                    explanation = words(said[latent] or "")
                    weights = dict.fromkeys(explanation, EXPLAINED)
                    yield latent, weights, [explanation, *_add_contexts(weights, contexts[latent], database)]

    def find(self, text: str) -> Found:
        """The latents that have all words and phrases in their explanation or contexts; see `phrases`."""
        if self.state != "ready":
            reason = "the search index is being built; try again in a moment" if self.state == "building" else self.state
            raise UserError(reason)
        asked = phrases(text)
        best = [self._best(*each) for phrase in asked for each in phrase.ranges]
        if not best:
            return Found(np.empty(0, np.int64), np.empty(0, np.int64), 0, 0)
        weights = np.stack(best)
        has_all: npt.NDArray[np.bool_] = np.all(weights >= 0, axis=0)
        for phrase in asked:
            if len(phrase.words) > 1:
                has_all &= self._with(phrase, weights.shape[1])
        latents = np.flatnonzero(has_all)
        found = weights[:, latents]
        explained = (found == EXPLAINED).any(0)
        active = ((found > 0) & (found <= FULL)).any(0) & ~explained
        adjacent = self._with(together(asked), weights.shape[1])[latents] if len(asked) > 1 else np.zeros(len(latents), bool)
        order = found.sum(0, dtype=np.int64) + ADJACENT * adjacent
        return Found(latents, order, int(explained.sum()), int(active.sum()), int(adjacent.sum()))

    def _best(self, first: str, end: str) -> npt.NDArray[np.int16]:
        """The largest weight `[latent]` of the words from `first` to before `end`; -1 for a latent that has none of them."""
        best = np.full(int(self.coder.table["latent"].max() or 0) + 1, -1, np.int16)  # type: ignore[arg-type]
        with self._reading() as index:
            for latents, weights in index.execute(
                "SELECT latents, weights FROM words WHERE word >= ? AND word < ?", (first, end)
            ):
                at = np.frombuffer(latents, "<i4")  # each latent once
                best[at] = np.maximum(best[at], np.frombuffer(weights, "u1"))
        return best

    def _with(self, phrase: Phrase, n: int) -> npt.NDArray[np.bool_]:
        """Which of the latents 0 to n - 1 have a phrase in one of their texts."""
        found = np.zeros(n, bool)
        with self._reading() as index:
            rows = [row for (row,) in index.execute("SELECT rowid FROM texts WHERE texts MATCH ?", (phrase.match,))]
            found[np.array(rows, np.int64) // TEXTS] = True
        return found

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The index, opened once per thread; an error says what to do."""
        try:
            if not hasattr(self._own, "database"):
                self._own.database = open_sqlite(self.path, any_thread=True)
            yield self._own.database
        except (sqlite3.Error, ValueError, IndexError) as error:
            raise UserError(
                f"the search index {self.path} cannot be read ({error}); delete it and restart the dashboard"
            ) from error


def words(text: str) -> list[str]:
    """The words of a text as the index has them: letters and digits, without case or accents."""
    return [plain_word(word) for word in _WORD.findall(text)]


@lru_cache(1 << 16)
def plain_word(word: str) -> str:
    """A word without case and accents."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", word.casefold()) if not unicodedata.combining(letter))


class Phrase(NamedTuple):
    """Words that stand side by side: those within quotes, or one word. `is_open`: the last may be the beginning of a word."""

    words: tuple[str, ...]
    is_open: bool

    @property
    def ranges(self) -> list[tuple[str, str]]:
        """What is looked up for each word: all words from the first to before the second."""
        ends = ["\0"] * (len(self.words) - 1) + ["\U0010ffff" if self.is_open else "\0"]
        return [(word, word + end) for word, end in zip(self.words, ends, strict=True)]

    @property
    def match(self) -> str:
        """The phrase as full-text search expects it; the words have no quotes."""
        return f'"{" ".join(self.words)}"{" *" if self.is_open else ""}'

    def places(self, text: Sequence[str]) -> set[int]:
        """Where a text, given as words, has the words of the phrase."""
        wanted = self.ranges
        starts = (
            at
            for at in range(len(text) - len(wanted) + 1)
            if all(low <= word < end for word, (low, end) in zip(text[at : at + len(wanted)], wanted, strict=True))
        )
        return {at + each for at in starts for each in range(len(wanted))}


def phrases(text: str) -> list[Phrase]:
    """The words of a search, of which those within double quotes stay together. The last word may be the beginning of one
    unless a quote closes it."""
    parts = text.split('"')  # every second one is within quotes
    found: list[Phrase] = []
    room = MAX_WORDS
    for at, part in enumerate(parts):
        own = words(part)[:room]
        room -= len(own)
        found += [Phrase(tuple(own), False)] if at % 2 and own else [Phrase((word,), False) for word in own]
    if found and words(parts[-1]):
        found[-1] = found[-1]._replace(is_open=True)
    return found


def together(asked: Sequence[Phrase]) -> Phrase:
    """All words of a search side by side."""
    return Phrase(tuple(word for phrase in asked for word in phrase.words), asked[-1].is_open)


def found_in(text: Sequence[str], asked: Sequence[Phrase]) -> set[int]:
    """Where a text, given as words, has one of the words or phrases; see `Phrase.places`."""
    return set().union(*(phrase.places(text) for phrase in asked))


class Spans(NamedTuple):
    """The words of a context, where each begins and ends in the joined text, and where each token begins."""

    words: list[str]
    begins: list[int]
    ends: list[int]
    tokens: list[int]

    def at(self, token: int, length: int) -> range:
        """The words that a token of `length` characters is part of."""
        begin = self.tokens[token]
        return range(bisect_right(self.ends, begin), bisect_right(self.begins, begin + length - 1))


def spans(texts: Sequence[str]) -> Spans:
    """Where the words of a sequence of tokens are."""
    found = list(_WORD.finditer("".join(texts)))
    begins = [0]
    for text in texts:
        begins.append(begins[-1] + len(text))
    return Spans([plain_word(each[0]) for each in found], [e.start() for e in found], [e.end() for e in found], begins)


def _add_contexts(
    weights: dict[str, int], contexts: list[tuple[int, bytes, bytes, bytes]], database: ExampleDatabase
) -> list[list[str]]:
    """Add the words of a latent's examples, each of them position, token ids, positions and activations; returns the words of
    each in their order."""
    highest, texts = 0.0, []
    for position, token_ids, positions, activations in contexts:
        first, end = max(0, position - TOKENS_BEFORE), position + TOKENS_AFTER + 1
        groups = list(database.characters(np.frombuffer(token_ids, "<i4")[first:end].tolist()))
        where = spans([text for _, text in groups])
        texts.append(where.words)
        for word in where.words:
            weights.setdefault(word, 0)
        values = dict(zip(np.frombuffer(positions, "<i4").tolist(), np.frombuffer(activations, "<f4").tolist(), strict=True))
        highest = max(highest, *values.values(), 1e-9)
        for at, (own, text) in enumerate(groups):
            if (value := max(values.get(first + each, 0.0) for each in range(own.start, own.stop))) > 0:
                for part_of in where.at(at, len(text)):
                    word, weight = where.words[part_of], max(1, round(FULL * value / highest))
                    weights[word] = max(weights[word], weight)
    return texts


def _fingerprint(coder: Coder) -> str:
    digest = hashlib.sha256(f"{FORMAT} {coder.folder.resolve()}".encode())
    for name, size, time in coder.indexed:
        digest.update(f" {name} {size} {time}".encode())
    return digest.hexdigest()[:24]
