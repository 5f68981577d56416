"""The explanations and scores that `crossdiff interpret` left, as the page shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdiff.interp.explanation_table import SCORES, SUMMARY_FILE, read_interpretation
from crossdiff.report.record import Record


class ScoreSummary(Record):
    """A score over the latents of a verdict; `low` and `high` are the ends of the mean's 95% interval."""

    score: str
    verdict: str
    n: int
    mean: float
    quartiles: tuple[float, float, float, float, float]
    low: float | None = None
    high: float | None = None


class Difference(Record):
    """Mean score of the chat-specific latents minus that of the shared ones."""

    score: str
    value: float
    low: float
    high: float


class Interpretation(Record):
    """What `interpretation.json` says of one crosscoder."""

    n_latents: int
    n_incomplete: int
    models: tuple[str, ...]
    scores: tuple[ScoreSummary, ...]
    differences: tuple[Difference, ...]


def read_summary(folder: Path) -> Interpretation | None:
    """The interpretation of the crosscoder that now stands in the folder; None without one.

    Raises:
        UserError: its files are damaged.
    """
    path = folder / SUMMARY_FILE
    if not path.is_file() or not read_interpretation(folder).height:
        return None
    return Interpretation.read(path, "crossdiff interpret")


def explained(row: Mapping[str, Any]) -> str | None:
    """What a row of the latent table says that the latent responds to, by whom, and how well that does."""
    if row["explanation"] is None:
        return None
    score = row["detection"]
    judged = "" if score is None or math.isnan(score) else f" (detection {score:.2f})"
    return f"{row['explainer']} says: {row['explanation']}{judged}"


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One score of one crosscoder: per verdict and for the difference a value and a note, empty where there is none."""

    score: str
    meaning: str
    crosscoder: str
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Every score by verdict and crosscoder."""

    verdicts: tuple[str, ...]
    rows: tuple[ScoreRow, ...]
    notes: tuple[str, ...]


def score_table(found: Sequence[tuple[str, Interpretation]]) -> ScoreTable | None:
    """The table of several crosscoders, by their titles; None without any."""
    if not found:
        return None
    present = {entry.verdict for _, each in found for entry in each.scores}
    verdicts = sorted(present, key=lambda verdict: (verdict not in ("chat_specific", "shared"), verdict))
    rows = []
    for score, meaning in SCORES.items():
        for title, each in found:
            entries = {entry.verdict: entry for entry in each.scores if entry.score == score}
            if entries:
                difference = next((entry for entry in each.differences if entry.score == score), None)
                cells = [_cell(entries.get(verdict)) for verdict in verdicts]
                cells.append(("", "") if difference is None else (_with_ends(difference.value, difference, "+"), ""))
                rows.append(ScoreRow(score.replace("_", " "), meaning, title, tuple(cells)))
    notes = []
    for title, each in found:
        judge = f"explained and judged by {', '.join(each.models)}" if each.models else "without a language model"
        missing = f"; {each.n_incomplete} of them lack a score or an answer" if each.n_incomplete else ""
        notes.append(f"{title}: {each.n_latents} latents, {judge}{missing}.")
    return ScoreTable(tuple(verdicts), tuple(rows), tuple(notes))


def _with_ends(value: float, entry: ScoreSummary | Difference, sign: str = "") -> str:
    if entry.low is None or entry.high is None:
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.2f} [{entry.low:{sign}.2f}, {entry.high:{sign}.2f}]"


def _cell(entry: ScoreSummary | None) -> tuple[str, str]:
    if entry is None:
        return "", ""
    lowest, quarter, _, three_quarters, highest = entry.quartiles
    spread = f"{lowest:.2f} to {highest:.2f}, half of them {quarter:.2f} to {three_quarters:.2f}" if entry.n > 1 else ""
    return _with_ends(entry.mean, entry), f"{entry.n} {'latents' if entry.n > 1 else 'latent'}{', ' if spread else ''}{spread}"
