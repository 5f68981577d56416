"""Writing the example database (`example_schema.py`): SQLite, with activations at the active positions only."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from crossdiff.activations.store import Store
from crossdiff.files import replacing
from crossdiff.latents.example_collector import Candidates, ExamplePick
from crossdiff.latents.example_schema import FORMAT, SCHEMA, UNITS
from crossdiff.text.token_texts import token_text


class Strengths(NamedTuple):
    """How strongly latents or concepts are active: rows of the tables `histograms` and `correlated`.

    Attributes:
        n_sampled: tokens that the correlations are over; None if there are none.
    """

    histograms: Sequence[tuple[int, float, bytes]] = ()
    correlated: Sequence[tuple[int, int, int, float, int]] = ()
    n_sampled: int | None = None


NOT_MEASURED = Strengths()


def write_examples(
    path: Path,
    candidates: Candidates,
    picks: list[ExamplePick],
    store: Store,
    tokenizer: Any,
    n_latents: int,
    strengths: Strengths = NOT_MEASURED,
) -> None:
    """Write the examples picked from the candidates."""
    used = np.unique(candidates.sequence[[pick.candidate for pick in picks]])
    sequences = list(_sequence_rows(store, used))
    write_database(path, sequences, _example_rows(candidates, picks), tokenizer, n_latents, strengths)


def write_database(
    path: Path,
    sequences: list[tuple[Any, ...]],
    examples: Iterator[tuple[Any, ...]],
    tokenizer: Any,
    n_latents: int,
    strengths: Strengths = NOT_MEASURED,
) -> None:
    """Write a complete database or nothing, from rows in the order of `SCHEMA`; the vocabulary is that of the sequences."""
    ids = np.unique(np.concatenate([np.empty(0, "<i4"), *(np.frombuffer(row[4], "<i4") for row in sequences)]))
    metadata = {"format": FORMAT, "n_latents": str(n_latents), "activation": UNITS}
    if strengths.n_sampled is not None:
        metadata["correlated_over"] = str(strengths.n_sampled)
    words = ((token_id, *token_text(tokenizer, token_id)) for token_id in ids.tolist())
    with replacing(path) as partial, closing(sqlite3.connect(partial)) as database, database:
        database.executescript(SCHEMA)
        database.executemany("INSERT INTO sequences VALUES (?, ?, ?, ?, ?, ?)", sequences)
        database.executemany("INSERT INTO vocabulary VALUES (?, ?, NULLIF(?, x''))", words)
        database.executemany("INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", examples)
        database.executemany("INSERT INTO histograms VALUES (?, ?, ?)", strengths.histograms)
        database.executemany("INSERT INTO correlated VALUES (?, ?, ?, ?, ?)", strengths.correlated)
        database.executemany("INSERT INTO metadata VALUES (?, ?)", metadata.items())


def _example_rows(candidates: Candidates, picks: list[ExamplePick]) -> Iterator[tuple[Any, ...]]:
    for pick in picks:
        c = pick.candidate
        pairs = slice(candidates.bounds[c], candidates.bounds[c + 1])
        yield (
            pick.latent, pick.kind, pick.quantile, pick.rank, int(candidates.sequence[c]), int(candidates.peak[c]),
            float(candidates.value[c]), candidates.positions[pairs].astype("<i4").tobytes(),
            candidates.activations[pairs].astype("<f4").tobytes(),
        )  # fmt: skip


def _sequence_rows(store: Store, numbers: npt.NDArray[np.int64]) -> Iterator[tuple[Any, ...]]:
    bounds = store.sequences()
    ids = store.column("token_id")
    flags = store.column("flags")
    document = store.column("document")
    facts = {row["document"]: row for row in store.documents.select("document", "dataset", "label").iter_rows(named=True)}
    for number in numbers.tolist():
        rows = slice(bounds[number], bounds[number + 1])
        row = facts[int(document[bounds[number]])]
        yield number, row["document"], row["dataset"], row["label"], ids[rows].astype("<i4").tobytes(), flags[rows].tobytes()
