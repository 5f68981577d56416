"""The contexts in which each latent fires: the strongest ones, and a sample over the quantiles of its activation."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store, consecutive
from crossdiff.config import AnalyzeConfig
from crossdiff.crosscoder.model import Crosscoder
from crossdiff.latents.stream import Chunk
from crossdiff.shapes import Float, Tensor

QUANTILES = (0.25, 0.5, 0.75, 0.95, 1.0)
SAMPLED_PER_EXAMPLE = 4
"""Candidates kept for each example wanted, so that enough remain when duplicates are dropped."""
CONTEXT = 8
"""Two examples of a latent are duplicates when the maximum and this many tokens before it are the same."""

SCHEMA = """
CREATE TABLE sequences (
    sequence INTEGER PRIMARY KEY,   -- index in the activation store
    document INTEGER, dataset TEXT, label TEXT,
    token_ids BLOB,                 -- int32, little-endian
    tokens TEXT,                    -- JSON array, each token as text
    flags BLOB                      -- uint8: 1 bos, 2 template, 4 user, 8 assistant
);
CREATE TABLE examples (
    latent INTEGER,
    kind TEXT,                      -- 'top': the strongest, 'quantile': one from around a quantile
    quantile REAL,                  -- of the latent's maxima per sequence; NULL for 'top'
    rank INTEGER,                   -- 0 is the strongest of its kind
    sequence INTEGER REFERENCES sequences(sequence),
    position INTEGER,               -- of the maximum
    activation REAL,                -- v = f * sum of decoder norms, at the maximum
    activations BLOB                -- float32, little-endian: v on every token of the sequence
);
CREATE TABLE metadata (key TEXT PRIMARY KEY, value TEXT);
"""


@dataclass
class _Best:
    """Per latent the sequences with the largest keys, `[latent, kept]`; -1 where there are fewer."""

    key: Tensor
    value: Tensor
    sequence: Tensor

    @classmethod
    def empty(cls, n_latents: int, kept: int) -> _Best:
        shape = (n_latents, kept)
        return cls(torch.zeros(shape), torch.zeros(shape), torch.full(shape, -1, dtype=torch.int64))

    def merge(self, key: Tensor, value: Tensor, numbers: Tensor) -> None:
        """Merge new candidates `[latent, candidate]`; a key of 0 means that the latent is silent there."""
        keys = torch.cat([self.key, key], dim=1)
        top = keys.topk(self.key.shape[1], dim=1).indices
        self.key = keys.gather(1, top)
        self.value = torch.cat([self.value, value], dim=1).gather(1, top)
        sequence = torch.cat([self.sequence, numbers.expand(len(key), -1)], dim=1).gather(1, top)
        self.sequence = torch.where(self.key > 0, sequence, -1)


class ExampleCollector:
    """Collects candidates in bounded memory: the strongest sequences, and a uniform sample of those where a latent fires."""

    def __init__(self, n_latents: int, config: AnalyzeConfig) -> None:
        self.n_latents, self.config = n_latents, config
        self.top = _Best.empty(n_latents, config.examples * SAMPLED_PER_EXAMPLE)
        self.sample = _Best.empty(n_latents, config.examples_per_quantile * len(QUANTILES) * SAMPLED_PER_EXAMPLE)
        self._generator = torch.Generator().manual_seed(config.seed)

    def add(self, chunk: Chunk, norms: Float[Tensor, " latent"]) -> None:
        """Add a chunk of whole sequences."""
        code, n_sequences = chunk.code, len(chunk.numbers)
        v = code.values * norms[code.latent]
        maxima = torch.zeros(self.n_latents * n_sequences)
        maxima.scatter_reduce_(0, code.latent * n_sequences + chunk.sequence[code.token], v, "amax")
        maxima = maxima.view(self.n_latents, n_sequences)
        numbers = torch.from_numpy(chunk.numbers)
        self.top.merge(maxima, maxima, numbers)
        if self.sample.key.shape[1]:
            random = torch.rand(maxima.shape, generator=self._generator).clamp(min=1e-9)
            self.sample.merge(random * (maxima > 0), maxima, numbers)


@dataclass(frozen=True)
class _Pick:
    latent: int
    kind: str
    quantile: float | None
    rank: int


def _quantile_picks(values: npt.NDArray[Any], per_quantile: int) -> list[tuple[float, int]]:
    """Indices of the values nearest to each quantile, each index used once: `(quantile, index)`."""
    order = np.argsort(values, kind="stable")
    free, picks = list(range(len(order))), []
    for quantile in reversed(QUANTILES):
        wanted = quantile * (len(order) - 1)
        for position in sorted(free, key=lambda place: (abs(place - wanted), place))[:per_quantile]:
            free.remove(position)
            picks.append((quantile, int(order[position])))
    return picks


class _Contexts:
    """Token contexts before the maximum, to recognise duplicates."""

    def __init__(self, store: Store) -> None:
        self.bounds, self.ids = store.sequences(), store.column("token_id")

    def key(self, sequence: int, position: int) -> bytes:
        start = self.bounds[sequence]
        context: bytes = self.ids[start + max(0, position - CONTEXT) : start + position + 1].tobytes()
        return context


def _wanted(collector: ExampleCollector) -> dict[int, dict[int, str]]:
    """sequence -> latent -> which candidate lists it is in ('t', 's' or 'ts')."""
    wanted: dict[int, dict[int, str]] = {}
    for mark, best in (("t", collector.top), ("s", collector.sample)):
        for latent, sequences in enumerate(best.sequence.tolist()):
            for sequence in sequences:
                if sequence >= 0:
                    entry = wanted.setdefault(sequence, {})
                    entry[latent] = entry.get(latent, "") + mark
    return wanted


def _activations(
    crosscoder: Crosscoder, store: Store, numbers: npt.NDArray[np.int64], batch_tokens: int
) -> Iterator[tuple[int, Float[Tensor, "position latent"]]]:
    """v on every token of the given sequences; 0 on the left-out positions."""
    index, norms = source_indices(store, crosscoder.sources), crosscoder.norms().sum(1)
    bounds, positions = store.sequences(), store.column("position")
    lengths = bounds[numbers + 1] - bounds[numbers]
    for first, last in consecutive(np.concatenate([[0], np.cumsum(lengths)]), batch_tokens):
        rows = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in numbers[first:last]])
        code = crosscoder.sparse_code(crosscoder.normalise(store.gather(rows)[:, index]))
        v = torch.zeros(len(rows), crosscoder.n_latents)
        v[code.token, code.latent] = code.values * norms[code.latent]
        v[torch.from_numpy(positions[rows] < store.leave_out)] = 0
        yield from zip(numbers[first:last].tolist(), torch.split(v, lengths[first:last].tolist()), strict=True)


def write_examples(
    path: Path,
    crosscoder: Crosscoder,
    store: Store,
    tokenizer: Any,
    collector: ExampleCollector,
    config: AnalyzeConfig,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> None:
    """Write the example database from the candidates; `SCHEMA` documents its tables and units."""
    wanted, contexts = _wanted(collector), _Contexts(store)
    candidates: dict[int, list[tuple[str, float, int, int, bytes]]] = {}
    for sequence, v in _activations(crosscoder, store, np.array(sorted(wanted), dtype=np.int64), config.batch_tokens):
        advance(len(v))
        latents = sorted(wanted[sequence])
        columns = v[:, latents].T.contiguous()
        for latent, column in zip(latents, columns, strict=True):
            position = int(column.argmax())
            entry = (wanted[sequence][latent], float(column[position]), sequence, position, column.numpy().tobytes())
            candidates.setdefault(latent, []).append(entry)
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as database:
        database.executescript(SCHEMA)
        used: set[int] = set()
        for latent in sorted(candidates):
            rows = list(_select(latent, candidates.pop(latent), contexts, config))
            used |= {row[4] for row in rows}
            database.executemany("INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        database.executemany(
            "INSERT INTO sequences VALUES (?, ?, ?, ?, ?, ?, ?)", _sequence_rows(store, tokenizer, sorted(used))
        )
        units = {"activation": "v = f * sum over sources of ||d^s||, in the normalised space", "format": "1"}
        database.executemany("INSERT INTO metadata VALUES (?, ?)", units.items())
        database.execute("CREATE INDEX by_latent ON examples (latent, kind, rank)")
    database.close()


def _select(
    latent: int, candidates: list[tuple[str, float, int, int, bytes]], contexts: _Contexts, config: AnalyzeConfig
) -> Iterator[tuple[Any, ...]]:
    """The rows of one latent, strongest first, without duplicate contexts."""
    candidates.sort(key=lambda entry: (-entry[1], entry[2]))
    seen: set[bytes] = set()
    distinct = []
    for entry in candidates:
        key = contexts.key(entry[2], entry[3])
        if key not in seen:
            seen.add(key)
            distinct.append(entry)
    top = [entry for entry in distinct if "t" in entry[0]][: config.examples]
    for rank, (_, value, sequence, position, activations) in enumerate(top):
        yield latent, "top", None, rank, sequence, position, value, activations
    sample = [entry for entry in distinct if "s" in entry[0]]
    picks = _quantile_picks(np.array([entry[1] for entry in sample]), config.examples_per_quantile)
    for rank, (quantile, index) in enumerate(picks):
        _, value, sequence, position, activations = sample[index]
        yield latent, "quantile", quantile, rank, sequence, position, value, activations


def _sequence_rows(store: Store, tokenizer: Any, numbers: list[int]) -> Iterator[tuple[Any, ...]]:
    bounds, ids, flags = store.sequences(), store.column("token_id"), store.column("flags")
    document = store.column("document")
    facts = {row["document"]: row for row in store.documents.select("document", "dataset", "label").iter_rows(named=True)}
    text: dict[int, str] = {}
    for number in numbers:
        rows = slice(bounds[number], bounds[number + 1])
        tokens = []
        for token_id in ids[rows].tolist():
            if token_id not in text:
                text[token_id] = tokenizer.decode([token_id])
            tokens.append(text[token_id])
        row = facts[int(document[bounds[number]])]
        token_ids = ids[rows].astype("<i4").tobytes()
        yield number, row["document"], row["dataset"], row["label"], token_ids, json.dumps(tokens), flags[rows].tobytes()
