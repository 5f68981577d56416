"""Terminal output of the interpretation."""

from __future__ import annotations

from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossdiff.interp.explanation_table import SCORES
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.language_model import Usage

EXAMPLES = 5


def _interval(entry: dict[str, Any], sign: str = "") -> str:
    value = entry.get("mean", entry.get("value"))
    ends = f" [{entry['low']:{sign}.2f}, {entry['high']:{sign}.2f}]" if "low" in entry else ""
    return f"{value:{sign}.2f}{ends}"


def print_summary(summary: dict[str, Any], name: str, console: Console) -> None:
    """Print the mean scores of each verdict, and the difference between chat-specific and shared latents."""
    judges = f", explained and judged by {', '.join(summary['models'])}" if summary["models"] else ""
    table = Table(
        title=f"{name}: interpretability of {summary['n_latents']} latents{judges}", title_justify="left",
        caption="mean over latents [95% bootstrap interval over latents], number of latents; 0.5 is chance, 1 is perfect",
    )  # fmt: skip
    verdicts = list(dict.fromkeys(entry["verdict"] for entry in summary["scores"]))
    found = {(entry["score"], entry["verdict"]): entry for entry in summary["scores"]}
    differences = {entry["score"]: entry for entry in summary["differences"]}
    table.add_column("score")
    for verdict in verdicts:
        table.add_column(verdict, justify="right")
    table.add_column("chat_specific - shared", justify="right")
    for score in SCORES:
        entries = [found.get((score, verdict)) for verdict in verdicts]
        if any(entries):
            cells = ("" if entry is None else f"{_interval(entry)}, {entry['n']}" for entry in entries)
            table.add_row(score, *cells, _interval(differences[score], "+") if score in differences else "")
    console.print(table)
    if summary["n_incomplete"]:
        incomplete = f"{summary['n_incomplete']} latents lack a score or an answer; see the column interpretation_reason"
        console.print(f"[yellow]{incomplete}[/yellow]")


def print_explanations(table: pl.DataFrame, name: str, console: Console) -> None:
    """Print the latents with the best explanations; `name` is that of their crosscoder, or `concepts`."""
    best = table.filter(pl.col("explanation").is_not_null()).sort("detection", descending=True, nulls_last=True).head(EXAMPLES)
    for row in best.iter_rows(named=True):
        console.print(Text(f"{name}: latent {row['latent']}, detection {row['detection']:.2f}: {row['explanation']}"))


def print_usage(usage: Usage, config: InterpretConfig, console: Console, planned: bool) -> None:
    """Print calls, tokens and cost, of the past or of a planned run."""
    calls = f"{usage.calls:,} calls"
    has_price = config.input_price or config.output_price
    cost = f", cost {usage.cost(config):.2f}" if has_price else ", cost unknown: pass --input_price and --output_price"
    tokens = f"{usage.prompt_tokens:,} prompt and {usage.answer_tokens:,} answer tokens"
    about = "to make, about " if planned else "made, "
    more = "" if planned else f"; {usage.failed_attempts:,} attempts failed"
    console.print(f"{calls} {about}{tokens}{cost}; {usage.cached:,} answers from the cache{more}", highlight=False)
