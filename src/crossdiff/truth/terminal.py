"""The tables that `crossdiff truth` prints."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from crossdiff.latents.verdict import VERDICTS


def print_truth(crosscoders: dict[str, Any], console: Console) -> None:
    """Print the rankings and the verdicts of every crosscoder in a `truth.json`."""
    rankings = Table(title="Which latents and concepts stand for planted chat-only concepts?", title_justify="left")
    for name in ("crosscoder", "ranking"):
        rankings.add_column(name)
    for name in ("called", "precision", "recall", "AUROC", "matching no concept"):
        rankings.add_column(name, justify="right")
    rankings.add_column("concepts of the wrong ones", overflow="fold")
    for name, result in crosscoders.items():
        for ranking, score in result["scores"].items():
            numbers = (score["precision"], score["recall"], score["auroc"])
            wrong = ", ".join(f"{kind} {n}" for kind, n in score["wrong"].items())
            cells = (str(score["n_called"]), *map(_number, numbers), str(score["n_unmatched"]), wrong)
            rankings.add_row(name, ranking, *cells)
        if (found := result["concepts"]) is not None:
            wrong = ", ".join(f"{kind} {n}" for kind, n in found["wrong"].items())
            numbers = (_number(found["precision"]), _number(found["recall"]), "")
            row = (str(found["n_called"]), *numbers, str(found["n_unmatched"]), wrong)
            rankings.add_row(name, f"concepts of {found['trainings']} trainings", *row)
        rankings.add_section()
    console.print(rankings)
    for name, result in crosscoders.items():
        console.print(_verdicts(name, result))


def _verdicts(name: str, result: dict[str, Any]) -> Table:
    fve = ", ".join(f"{source} {value:.3f}" for source, value in result["fve"].items())
    mu = "" if result["mu"] is None else f", mu {result['mu']:.3g} after {result['trials']} trainings"
    apart = "" if result["l0_matched"] else " (not matched)"
    table = Table(title=f"{name}: L0 {result['l0']:.2f}{apart}{mu}; FVE {fve}; {result['n_dead']} dead", title_justify="left")
    table.add_column("concepts")
    table.add_column("found", justify="right")
    given = {verdict for row in result["verdicts"].values() for verdict in row}
    shown = [verdict for verdict in VERDICTS if verdict in given]
    for verdict in shown:
        table.add_column(verdict.replace("_", " "), justify="right")
    for kind, row in result["verdicts"].items():
        found = result["found"].get(kind)
        table.add_row(kind, "" if found is None else f"{found:.0%}", *(str(row.get(verdict, 0)) for verdict in shown))
    return table


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}"
