"""A concept's label where nobody has explained it: its strongest tokens in their contexts, as they are in the examples."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import polars as pl

from crossdiff.activations.store import Store
from crossdiff.latents.example_collector import Candidates, ExamplePick
from crossdiff.text.token_texts import characters, token_text

TOKENS = 4
"""Strongest tokens named, each once."""
WORDS = 3
"""Typical words named."""
BEFORE, AFTER = 12, 6
"""Tokens of the strongest example that a snippet shows around its strongest token."""


class Label(NamedTuple):
    """What a concept is active on, from its strongest examples.

    Attributes:
        tokens: the tokens with the largest activations, each once, the one with the largest sum over examples first.
        words: words before these tokens that are typical of its examples and not of those of other concepts.
        before, token, after: the strongest example around its strongest token.
    """

    tokens: tuple[str, ...]
    words: tuple[str, ...]
    before: str
    token: str
    after: str

    @property
    def text(self) -> str:
        """The label in one line."""
        tokens = " · ".join(shown(token) for token in self.tokens)
        return f"{tokens} after {', '.join(self.words)}" if self.words else tokens


def shown(token: str) -> str:
    """A token without the spaces around it, or with its blanks made visible if it has nothing else."""
    return token.strip() or token.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥") or "(empty token)"


class _Strongest(NamedTuple):
    """The strongest token of an example in its context; `text` is what is before it, without special tokens."""

    concept: int
    rank: int
    value: float
    before: str
    token: str
    after: str
    text: str


def _strongest(candidates: Candidates, picks: Sequence[ExamplePick], store: Store, tokenizer: Any) -> Iterator[_Strongest]:
    bounds, ids = store.sequences(), store.column("token_id")
    own_text = lru_cache(None)(lambda token_id: token_text(tokenizer, token_id))
    for pick in picks:
        if pick.kind == "top":
            sequence = int(candidates.sequence[pick.candidate])
            row = int(bounds[sequence]) + int(candidates.peak[pick.candidate])
            first, last = max(int(bounds[sequence]), row - BEFORE), min(int(bounds[sequence + 1]), row + 1 + AFTER)
            groups = list(characters([own_text(token_id) for token_id in ids[first:last].tolist()]))
            at = next(at for at, (tokens, _) in enumerate(groups) if row - first < tokens.stop)
            texts = [text for _, text in groups]
            before, after = "".join(texts[:at]), "".join(texts[at + 1 :])
            text = tokenizer.decode(ids[first:row].tolist(), skip_special_tokens=True)
            value = float(candidates.value[pick.candidate])
            yield _Strongest(pick.latent, pick.rank, value, before, texts[at], after, text)


def labels(candidates: Candidates, picks: Sequence[ExamplePick], store: Store, tokenizer: Any) -> dict[int, Label]:
    """The label of every concept with an example."""
    examples: dict[int, list[_Strongest]] = {}
    for example in _strongest(candidates, picks, store, tokenizer):
        examples.setdefault(example.concept, []).append(example)
    words = typical_words({concept: [example.text for example in own] for concept, own in examples.items()})
    found = {}
    for concept, own in examples.items():
        totals: dict[str, float] = {}
        for example in own:
            totals[example.token] = totals.get(example.token, 0.0) + example.value
        tokens = tuple(dict.fromkeys(shown(token) for token in sorted(totals, key=lambda key: -totals[key])))
        best = min(own, key=lambda example: example.rank)
        found[concept] = Label(tokens[:TOKENS], words[concept], best.before, best.token, best.after)
    return found


def typical_words(contexts: Mapping[int, Sequence[str]]) -> dict[int, tuple[str, ...]]:
    """For each concept, the words in at least half of its contexts that the fewest other concepts share, at most `WORDS`.

    A word counts as shared by a concept if it is in at least a quarter of its contexts. Words that more than a tenth of the
    concepts share are typical of none.
    """
    shares: dict[int, dict[str, float]] = {}
    for concept, texts in contexts.items():
        counts = Counter(word for text in texts for word in set(re.findall(r"[^\W\d_]{3,}", text.lower())))
        shares[concept] = {word: count / len(texts) for word, count in counts.items()}
    spread = Counter(word for own in shares.values() for word, share in own.items() if share >= 0.25)
    found = {}
    for concept, own in shares.items():
        typical = [word for word, share in own.items() if share >= 0.5 and spread[word] <= max(1, len(shares) / 10)]
        found[concept] = tuple(sorted(typical, key=lambda word: (-own[word] * math.log(len(shares) / spread[word] + 1), word)))[
            :WORDS
        ]
    return found


def label_columns(found: dict[int, Label], n_concepts: int) -> pl.DataFrame:
    """One row per concept: label, tokens, before, token, after; null for a concept that is never active."""
    rows = [found.get(concept) for concept in range(n_concepts)]
    schema: dict[str, Any] = {"tokens": pl.List(pl.String), "words": pl.List(pl.String)}
    columns = {
        "label": [None if row is None else row.text for row in rows],
        "tokens": [[] if row is None else list(row.tokens) for row in rows],
        "words": [[] if row is None else list(row.words) for row in rows],
        **{key: [None if row is None else getattr(row, key) for row in rows] for key in ("before", "token", "after")},
    }
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String) | schema)
