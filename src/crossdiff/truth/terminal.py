"""`crossdiff truth`: run the benchmark in a run directory and print what came out."""

from __future__ import annotations

import math
import shutil
from typing import Any

from rich.console import Console
from rich.table import Table

from crossdiff.files import fingerprint, read_json
from crossdiff.latents.verdict import VERDICTS
from crossdiff.run import Run, Stage
from crossdiff.truth.benchmark import benchmark
from crossdiff.truth.truth_config import TruthConfig

CODE_FORMAT = 2
"""Raised when the results change although the settings do not."""


def run_truth(run: Run, config: TruthConfig, console: Console) -> None:
    """Run the benchmark unless it is done with these settings, and print its tables."""
    outputs = ("activations", *config.crosscoders, "truth.json")
    stage = Stage("truth", fingerprint({"code": CODE_FORMAT, "settings": config.model_dump(mode="json")}), outputs)
    if not run.is_done(stage):
        with run.working(stage) as folder:
            for left in folder.iterdir():  # of a run that was killed: nothing of it is gone on with
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            benchmark(folder, config, console.print)
    print_truth(read_json(run.path / "truth.json")["crosscoders"], console)


def print_truth(crosscoders: dict[str, Any], console: Console) -> None:
    """Print the rankings and the verdicts of every crosscoder in a `truth.json`."""
    rankings = Table(title="Which latents stand for chat-only concepts?", title_justify="left")
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
