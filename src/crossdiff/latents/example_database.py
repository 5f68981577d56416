"""The example database: SQLite, with activations at the active positions only."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossdiff.activations.store import Store
from crossdiff.latents.example_collector import Candidates, Example

FORMAT = "2"
SCHEMA = """
CREATE TABLE sequences (
    sequence INTEGER PRIMARY KEY,   -- index in the activation store
    document INTEGER,               -- NULL, like dataset and label, where it is not known
    dataset TEXT, label TEXT,
    token_ids BLOB,                 -- int32, little-endian: the whole sequence
    flags BLOB                      -- uint8: 1 bos, 2 template, 4 user, 8 assistant
);
CREATE TABLE vocabulary (
    token_id INTEGER PRIMARY KEY, text TEXT
);
CREATE TABLE examples (
    latent INTEGER,
    kind TEXT,                      -- 'top': the strongest, 'quantile': one from around a quantile,
                                    -- 'band' (imported): one from a band of the latent's range
    quantile REAL,                  -- of the latent's maxima in distinct contexts; NULL for 'top';
                                    -- for 'band' its upper end as a share of the latent's maximum
    rank INTEGER,                   -- 0 is the strongest of its kind
    sequence INTEGER REFERENCES sequences(sequence),
    position INTEGER,               -- of the maximum
    activation REAL,                -- v = f * sum of decoder norms, at the maximum
    positions BLOB,                 -- int32, little-endian: where in the sequence the latent is active
    activations BLOB                -- float32, little-endian: v there; it is 0 elsewhere
);
CREATE TABLE metadata (key TEXT PRIMARY KEY, value TEXT);
CREATE INDEX by_latent ON examples (latent, kind, rank);
"""
UNITS = "v = f * sum over sources of ||d^s||, in the normalised space"


def write_examples(
    path: Path, candidates: Candidates, examples: list[Example], store: Store, tokenizer: Any, n_latents: int
) -> None:
    """Write the examples picked from the candidates; `SCHEMA` documents the tables and units."""
    used = np.unique(candidates.sequence[[example.candidate for example in examples]])
    sequences = list(_sequence_rows(store, used))
    write_database(path, sequences, _example_rows(candidates, examples), tokenizer, n_latents)


def write_database(
    path: Path, sequences: list[tuple[Any, ...]], examples: Iterator[tuple[Any, ...]], tokenizer: Any, n_latents: int
) -> None:
    """Write a database whole or not at all, from rows in the order of `SCHEMA`; the vocabulary is that of the sequences."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    ids = np.unique(np.concatenate([np.empty(0, "<i4"), *(np.frombuffer(row[4], "<i4") for row in sequences)]))
    metadata = {"format": FORMAT, "n_latents": str(n_latents), "activation": UNITS}
    try:
        with closing(sqlite3.connect(partial)) as database, database:
            database.executescript(SCHEMA)
            database.executemany("INSERT INTO sequences VALUES (?, ?, ?, ?, ?, ?)", sequences)
            database.executemany("INSERT INTO vocabulary VALUES (?, ?)", ((i, tokenizer.decode([i])) for i in ids.tolist()))
            database.executemany("INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", examples)
            database.executemany("INSERT INTO metadata VALUES (?, ?)", metadata.items())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _example_rows(candidates: Candidates, examples: list[Example]) -> Iterator[tuple[Any, ...]]:
    for example in examples:
        c = example.candidate
        positions, activations = candidates[c]
        yield (
            example.latent, example.kind, example.quantile, example.rank, int(candidates.sequence[c]), int(candidates.peak[c]),
            float(candidates.value[c]), positions.astype("<i4").tobytes(), activations.astype("<f4").tobytes(),
        )  # fmt: skip


def _sequence_rows(store: Store, numbers: npt.NDArray[np.int64]) -> Iterator[tuple[Any, ...]]:
    bounds, ids, flags = store.sequences(), store.column("token_id"), store.column("flags")
    document = store.column("document")
    facts = {row["document"]: row for row in store.documents.select("document", "dataset", "label").iter_rows(named=True)}
    for number in numbers.tolist():
        rows = slice(bounds[number], bounds[number + 1])
        row = facts[int(document[bounds[number]])]
        yield number, row["document"], row["dataset"], row["label"], ids[rows].astype("<i4").tobytes(), flags[rows].tobytes()
