"""The table of interpretability scores, as the page shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from crossdiff.interp.explanation_table import SCORES
from crossdiff.report.records import Difference, Interpretation, ScoreSummary
from crossdiff.report.wording import latents, words


class ScoreRow(NamedTuple):
    """One score of one crosscoder. Each cell has a value and a note, both empty where there is no score."""

    score: str
    meaning: str
    crosscoder: str
    cells: tuple[tuple[str, str], ...]


class ScoreTable(NamedTuple):
    """Every score of several crosscoders. The columns are verdicts, then the difference of chat-specific and shared."""

    columns: tuple[str, ...]
    rows: tuple[ScoreRow, ...]
    notes: tuple[str, ...]


def score_table(found: Sequence[tuple[str, Interpretation]]) -> ScoreTable | None:
    """The table of several crosscoders, given with their titles; None without any."""
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
                rows.append(ScoreRow(words(score), meaning, title, tuple(cells)))
    notes = []
    for title, each in found:
        judge = f"explained and judged by {', '.join(each.models)}" if each.models else "scored without a language model"
        missing = f"; {each.n_incomplete} of them lack a score or an answer" if each.n_incomplete else ""
        notes.append(f"{title}: {latents(each.n_latents)}, {judge}{missing}.")
    columns = (*(words(verdict) for verdict in verdicts), "chat-specific minus shared")
    return ScoreTable(columns, tuple(rows), tuple(notes))


def _with_ends(value: float, entry: ScoreSummary | Difference, sign: str = "") -> str:
    if entry.low is None or entry.high is None:
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.2f} [{entry.low:{sign}.2f}, {entry.high:{sign}.2f}]"


def _cell(entry: ScoreSummary | None) -> tuple[str, str]:
    if entry is None:
        return "", ""
    lowest, quarter, _, three_quarters, highest = entry.quartiles
    spread = f", {lowest:.2f} to {highest:.2f}, half of them {quarter:.2f} to {three_quarters:.2f}" if entry.n > 1 else ""
    return _with_ends(entry.mean, entry), f"{latents(entry.n)}{spread}"
