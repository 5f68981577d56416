"""Export to and import from the `examples.db` layout that the paper's authors publish for their crosscoders.

    sequences           sequence_idx INTEGER PRIMARY KEY, token_ids BLOB (int32)
    quantile_examples   feature_idx, quantile_idx INTEGER, activation REAL, sequence_idx
    activation_details  feature_idx, sequence_idx INTEGER, positions BLOB (int32), activation_values BLOB (float32)

(feature_idx, sequence_idx) is the primary key of the last two.

A feature is a latent. Despite its name, `quantile_idx` is a band of the latent's range: band q holds sequences whose largest
activation lies above `BANDS[q - 1]` and up to `BANDS[q]` times the latent's largest one. A sixth band, above these, is read as
the fifth. Activations are v. The layout has no place for datasets, documents and flags, so an export loses them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from crossdiff.errors import UserError
from crossdiff.files import open_sqlite
from crossdiff.latents.example_database import write_database
from crossdiff.latents.example_schema import FORMAT
from crossdiff.published.example_layouts import Found, Row, array, read_layout
from crossdiff.text.chat import Flag

BANDS = (0.25, 0.5, 0.75, 0.95, 1.0)

SCHEMA = """
CREATE TABLE sequences (sequence_idx INTEGER PRIMARY KEY, token_ids BLOB);
CREATE TABLE quantile_examples (
    feature_idx INTEGER, quantile_idx INTEGER, activation REAL, sequence_idx INTEGER REFERENCES sequences(sequence_idx),
    PRIMARY KEY (feature_idx, sequence_idx)
);
CREATE TABLE activation_details (
    feature_idx INTEGER, sequence_idx INTEGER REFERENCES sequences(sequence_idx), positions BLOB, activation_values BLOB,
    PRIMARY KEY (feature_idx, sequence_idx)
);
"""


def band_of(activation: float, largest: float) -> int:
    """The band of a sequence with maximum `activation` for a latent whose largest activation is `largest`."""
    return min(int(np.searchsorted(BANDS, activation / largest)), len(BANDS) - 1)


def export_examples(source: Path, target: Path) -> int:
    """Write the examples of our database `source` in the published layout to `target`; returns their number.

    A latent and a sequence make one row there, however often the sequence is among the latent's examples here.
    """
    _check_paths(source, target)
    try:
        with closing(open_sqlite(source)) as ours:
            found = dict(ours.execute("SELECT key, value FROM metadata")).get("format")
            if found != FORMAT:
                raise UserError(f"{source} has format {found!r}, expected {FORMAT!r}; run `crossdiff analyze` again")
            sequences = ours.execute("SELECT sequence, token_ids FROM sequences").fetchall()
            examples = ours.execute(
                "SELECT latent, sequence, max(activation), max(CASE kind WHEN 'band' THEN quantile END), positions, "
                "activations, max(max(activation)) OVER (PARTITION BY latent) FROM examples GROUP BY latent, sequence"
            ).fetchall()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{source} is not an example database: {error}; expected an examples.sqlite") from error
    summaries, details = [], []
    for latent, sequence, activation, upper_end, positions, activations, largest in examples:
        band = band_of(activation, largest) if upper_end is None else BANDS.index(upper_end)
        summaries.append((latent, band, activation, sequence))
        details.append((latent, sequence, positions, activations))
    with closing(sqlite3.connect(target)) as published, published:
        published.executescript(SCHEMA)
        published.executemany("INSERT INTO sequences VALUES (?, ?)", sequences)
        published.executemany("INSERT INTO quantile_examples VALUES (?, ?, ?, ?)", summaries)
        published.executemany("INSERT INTO activation_details VALUES (?, ?, ?, ?)", details)
    return len(examples)


def import_examples(source: Path, target: Path, tokenizer: Any, layout: str = "examples.db") -> int:
    """Write published examples as our database `target`; returns their number. `example_layouts` lists the layouts.

    Each becomes an example of kind 'band'; a layout without bands has them by the largest activation of a latent in the file.
    Documents stay NULL, data sets too unless the layout names them, and flags 0, except for the BOS token. The number of
    latents is set to the largest latent's number plus one.
    """
    _check_paths(source, target)
    found = read_layout(source, layout, tokenizer)
    if not found.rows:
        raise UserError(f"{source} has no examples; download it again")
    largest_id = max((int(ids.max()) for ids in found.sequences.values() if len(ids)), default=-1)
    if largest_id >= len(tokenizer):
        raise UserError(
            f"{source} has the token id {largest_id}, but the tokenizer has only {len(tokenizer)} tokens; "
            "name the tokenizer of the published models"
        )
    kept = [
        (
            number, None, found.datasets.get(number), None, ids.tobytes(),
            ((ids == tokenizer.bos_token_id) * Flag.BOS.value).astype(np.uint8).tobytes(),
        )
        for number, ids in found.sequences.items()
    ]  # fmt: skip
    rows = _banded(found.rows)
    write_database(target, kept, _imported_rows(source, rows, found), tokenizer, rows[-1].latent + 1)
    return len(rows)


def _banded(rows: list[Row]) -> list[Row]:
    """The rows with a band each, sorted by latent, then from the strongest band and example down."""
    largest: dict[int, float] = {}
    for row in rows:
        largest[row.latent] = max(row.activation, largest.get(row.latent, 0.0))
    banded = [
        row._replace(band=band_of(row.activation, largest[row.latent] or 1.0)) if row.band is None else row for row in rows
    ]
    return sorted(banded, key=lambda row: (row.latent, -(row.band or 0), -row.activation, row.sequence))


def _imported_rows(source: Path, rows: list[Row], found: Found) -> Iterator[tuple[Any, ...]]:
    """Rows of our table of examples."""
    previous, rank = None, 0
    for row in rows:
        what = f"latent {row.latent} on sequence {row.sequence}"
        rank = rank + 1 if row.latent == previous else 0
        previous = row.latent
        positions = array(source, f"the positions of {what}", row.positions, "<i4")
        values = array(source, f"the activations of {what}", row.values, "<f4")
        band = row.band if row.band is not None else -1
        if row.sequence not in found.sequences or not 0 <= band <= len(BANDS):
            raise UserError(
                f"{source}: {what} is in band {band}; expected a sequence of the table sequences and a band from 0 to "
                f"{len(BANDS)}"
            )
        n_tokens = len(found.sequences[row.sequence])
        if not len(positions) or len(positions) != len(values) or positions.min() < 0 or positions.max() >= n_tokens:
            raise UserError(
                f"{source}: {what} has {len(positions)} positions and {len(values)} activations in {n_tokens} tokens; expected "
                "the same number of both, at least one, and positions within the tokens"
            )
        peak = int(positions[values.argmax()])
        upper_end = BANDS[min(band, len(BANDS) - 1)]
        yield row.latent, "band", upper_end, rank, row.sequence, peak, row.activation, row.positions, row.values


def _check_paths(source: Path, target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} already exists; name another file, or delete it")
    if not source.is_file():
        raise UserError(f"{source} is missing; expected a file of examples")
