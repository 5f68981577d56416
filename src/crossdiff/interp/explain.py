"""What the explainer sees of a latent: its quantile examples, and what is known of it in both models."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from crossdiff.errors import UserError
from crossdiff.interp.prompts import Explanation, Renderer, Request, explain_request
from crossdiff.interp.windows import Texts, Window
from crossdiff.latents.example_schema import FORMAT
from crossdiff.latents.groups import GROUPS
from crossdiff.latents.verdict import VERDICTS


def shown_windows(path: Path, texts: Texts, latents: Sequence[int]) -> dict[int, list[Window]]:
    """The windows around each latent's quantile examples (its strongest ones, where there are none), the strongest first.

    Raises:
        UserError: the database is missing, damaged, of another version or of another store.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run `crossdiff analyze` to write it")
    query = "SELECT kind, sequence, position, positions, activations FROM examples WHERE latent = ? ORDER BY activation DESC"
    found = {}
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            version = dict(database.execute("SELECT key, value FROM metadata")).get("format")
            if version != FORMAT:
                raise UserError(f"{path} has format {version!r}, this version reads {FORMAT!r}: run `crossdiff analyze` again")
            for latent in latents:
                rows = database.execute(query, (latent,)).fetchall()
                kind = "quantile" if any(row[0] == "quantile" for row in rows) else "top"
                found[latent] = _windows(path, texts, [row[1:] for row in rows if row[0] == kind])
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} cannot be read ({error}): run `crossdiff analyze` again") from None
    return found


def _windows(path: Path, texts: Texts, rows: Sequence[tuple[int, int, bytes, bytes]]) -> list[Window]:
    """One a sequence."""
    windows: dict[int, Window] = {}
    for sequence, position, positions, activations in rows:
        if not 0 <= sequence < len(texts.document):
            raise UserError(
                f"{path} has an example in sequence {sequence}, which the store lacks: run `crossdiff analyze` again"
            )
        places, values = np.frombuffer(positions, "<i4"), np.frombuffer(activations, "<f4")
        windows.setdefault(sequence, texts.window(sequence, position, places, values))
    return list(windows.values())


def facts_of(row: Mapping[str, Any]) -> str:
    """What the analysis says of a latent in both models, in words; `row` is its row of the latent table."""
    lines = [
        f"Verdict of the comparison: {row['verdict'].replace('_', '-')} ({VERDICTS[row['verdict']]}).",
        f"Relative decoder norm {row['delta_norm']:.2f} (0: in the base model only, 1: in the chat model only); cosine of its "
        f"directions in the two models {row['decoder_cosine']:.2f}.",
    ]
    shares = sorted(((row[f"share_{group}"], group) for group in GROUPS if row[f"share_{group}"] > 0), reverse=True)
    places = ", ".join(f"{share:.0%} on {group} tokens" for share, group in shares)
    lines.append(f"Of its activations, {places or 'none are counted'}.")
    return "\n".join(lines)


def explanation_request(windows: Sequence[Window], row: Mapping[str, Any], renderer: Renderer) -> Request[Explanation]:
    """The question of what a latent responds to; `windows` are its examples, the strongest first."""
    largest = max(float(window.values.max()) for window in windows)
    excerpts = [(renderer.line(window, window.marked), renderer.listed(window, largest)) for window in windows]
    return explain_request(excerpts, facts_of(row))
