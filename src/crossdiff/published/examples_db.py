"""The layout of the `examples.db` that the paper's authors publish for their crosscoders: written and read.

    sequences           sequence_idx INTEGER PRIMARY KEY, token_ids BLOB (int32)
    quantile_examples   feature_idx, quantile_idx INTEGER, activation REAL, sequence_idx
    activation_details  feature_idx, sequence_idx INTEGER, positions BLOB (int32), activation_values BLOB (float32)

(feature_idx, sequence_idx) is the primary key of the last two.

A feature is a latent. `quantile_idx` is no quantile of a distribution but a band of the latent's range: band q holds sequences
whose largest activation lies above `BANDS[q - 1]` and up to `BANDS[q]` times the latent's largest one (a sixth band, above it,
is read as the fifth). Activations are v.
Datasets, documents and flags have no place there and are lost on export.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crossdiff.errors import UserError
from crossdiff.latents.example_database import FORMAT, write_database
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


def _open(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise UserError(f"{path} is missing: expected an SQLite database of examples")
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)


def band_of(activation: float, largest: float) -> int:
    """The band of a sequence whose maximum is `activation` for a latent whose largest activation is `largest`."""
    return min(int(np.searchsorted(BANDS, activation / largest)), len(BANDS) - 1)


def export_examples(source: Path, target: Path) -> int:
    """Write the examples of our database `source` in the published layout to `target`; returns their number.

    A latent and a sequence make one row there, however often the sequence is among the latent's examples here.

    Raises:
        UserError: `source` is no example database of this version, or `target` exists.
    """
    _refuse_existing(target)
    try:
        with closing(_open(source)) as ours:
            metadata = dict(ours.execute("SELECT key, value FROM metadata"))
            if metadata.get("format") != FORMAT:
                raise UserError(f"{source} has format {metadata.get('format')!r}, expected {FORMAT!r}: analyse again")
            sequences = ours.execute("SELECT sequence, token_ids FROM sequences").fetchall()
            examples = ours.execute(
                "SELECT latent, sequence, max(activation), max(CASE kind WHEN 'band' THEN quantile END), positions, "
                "activations, max(max(activation)) OVER (PARTITION BY latent) FROM examples GROUP BY latent, sequence"
            ).fetchall()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{source} is no example database: {error}") from error
    bands = [BANDS.index(band) if band is not None else band_of(value, top) for _, _, value, band, _, _, top in examples]
    with closing(sqlite3.connect(target)) as published, published:
        published.executescript(SCHEMA)
        published.executemany("INSERT INTO sequences VALUES (?, ?)", sequences)
        published.executemany(
            "INSERT INTO quantile_examples VALUES (?, ?, ?, ?)",
            ((row[0], band, row[2], row[1]) for row, band in zip(examples, bands, strict=True)),
        )
        published.executemany(
            "INSERT INTO activation_details VALUES (?, ?, ?, ?)", ((row[0], row[1], row[4], row[5]) for row in examples)
        )
    return len(examples)


def import_examples(source: Path, target: Path, tokenizer: Any) -> int:
    """Write the published examples of `source` as our database `target`; returns their number.

    Each becomes an example of the kind 'band'. Documents and datasets stay NULL and flags 0, but for the BOS token; the
    number of latents is taken to be the largest latent's and one.

    Raises:
        UserError: `source` is not of the published layout or contradicts itself, the tokens are not the tokenizer's, or
            `target` exists.
    """
    _refuse_existing(target)
    try:
        with closing(_open(source)) as published:
            sequences = {
                number: _array(source, f"the tokens of sequence {number}", blob, "<i4")
                for number, blob in published.execute("SELECT sequence_idx, token_ids FROM sequences ORDER BY sequence_idx")
            }
            rows = published.execute(
                "SELECT feature_idx, quantile_idx, activation, sequence_idx, positions, activation_values "
                "FROM quantile_examples LEFT JOIN activation_details USING (feature_idx, sequence_idx) "
                "ORDER BY feature_idx, quantile_idx DESC, activation DESC, sequence_idx"
            ).fetchall()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{source} does not have the published layout: {error}") from error
    if not rows:
        raise UserError(f"{source} has no examples: its table quantile_examples is empty")
    largest_id = max((int(ids.max()) for ids in sequences.values() if len(ids)), default=-1)
    if largest_id >= len(tokenizer):
        raise UserError(
            f"{source} has the token id {largest_id}, the tokenizer only {len(tokenizer)} tokens; name the models' own one"
        )
    kept = [
        (number, None, None, None, ids.tobytes(), ((ids == tokenizer.bos_token_id) * Flag.BOS.value).astype(np.uint8).tobytes())
        for number, ids in sequences.items()
    ]
    write_database(target, kept, _imported_rows(source, rows, sequences), tokenizer, rows[-1][0] + 1)
    return len(rows)


def _imported_rows(
    source: Path, rows: list[tuple[Any, ...]], sequences: dict[int, npt.NDArray[np.int32]]
) -> Iterator[tuple[Any, ...]]:
    """Rows of our table of examples, from those of the join, which are sorted by latent and then from the strongest down."""
    previous, rank = None, 0
    for latent, band, activation, sequence, *blobs in rows:
        what = f"latent {latent} on sequence {sequence}"
        rank, previous = (rank + 1 if latent == previous else 0), latent
        positions = _array(source, f"the positions of {what}", blobs[0], "<i4")
        values = _array(source, f"the activations of {what}", blobs[1], "<f4")
        if sequence not in sequences or not 0 <= band <= len(BANDS):
            raise UserError(
                f"{source}: {what} is in band {band}; expected a sequence of the table sequences and a band from 0 to "
                f"{len(BANDS)}"
            )
        n_tokens = len(sequences[sequence])
        if not len(positions) or len(positions) != len(values) or positions.min() < 0 or positions.max() >= n_tokens:
            raise UserError(
                f"{source}: {what} has {len(positions)} positions and {len(values)} activations in {n_tokens} tokens; expected "
                "as many of both, at least one, and all positions inside"
            )
        peak = int(positions[values.argmax()])
        yield latent, "band", BANDS[min(band, len(BANDS) - 1)], rank, sequence, peak, activation, blobs[0], blobs[1]


def _array(source: Path, what: str, blob: object, dtype: str) -> npt.NDArray[Any]:
    if not isinstance(blob, bytes) or len(blob) % 4:
        found = f"{len(blob)} bytes" if isinstance(blob, bytes) else type(blob).__name__
        raise UserError(f"{source}: {what} are {found}; expected an array of 4-byte numbers")
    return np.frombuffer(blob, dtype=dtype)


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} exists already; name another file, or delete it")
