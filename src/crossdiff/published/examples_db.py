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
import numpy.typing as npt

from crossdiff.errors import UserError
from crossdiff.files import open_sqlite
from crossdiff.latents.example_database import write_database
from crossdiff.latents.example_schema import FORMAT
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


def import_examples(source: Path, target: Path, tokenizer: Any) -> int:
    """Write the published examples of `source` as our database `target`; returns their number.

    Each becomes an example of kind 'band'. Documents and datasets stay NULL and flags 0, except for the BOS token. The number
    of latents is set to the largest latent's number plus one.
    """
    _check_paths(source, target)
    try:
        with closing(open_sqlite(source)) as published:
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
        raise UserError(f"{source} does not have the published layout: {error}; expected an examples.db") from error
    if not rows:
        raise UserError(f"{source} has no examples: its table quantile_examples is empty; download it again")
    largest_id = max((int(ids.max()) for ids in sequences.values() if len(ids)), default=-1)
    if largest_id >= len(tokenizer):
        raise UserError(
            f"{source} has the token id {largest_id}, but the tokenizer has only {len(tokenizer)} tokens; "
            "name the tokenizer of the published models"
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
    """Rows of our table of examples from the joined rows, which are sorted by latent, then from the strongest down."""
    previous, rank = None, 0
    for latent, band, activation, sequence, *blobs in rows:
        what = f"latent {latent} on sequence {sequence}"
        rank = rank + 1 if latent == previous else 0
        previous = latent
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
                "the same number of both, at least one, and positions within the tokens"
            )
        peak = int(positions[values.argmax()])
        yield latent, "band", BANDS[min(band, len(BANDS) - 1)], rank, sequence, peak, activation, blobs[0], blobs[1]


def _array(source: Path, what: str, blob: object, dtype: str) -> npt.NDArray[Any]:
    if not isinstance(blob, bytes) or len(blob) % 4:
        found = f"{len(blob)} bytes" if isinstance(blob, bytes) else type(blob).__name__
        raise UserError(f"{source}: {what} are {found}; expected an array of 4-byte numbers")
    return np.frombuffer(blob, dtype=dtype)


def _check_paths(source: Path, target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} already exists; name another file, or delete it")
    if not source.is_file():
        raise UserError(f"{source} is missing; expected an SQLite database of examples")
