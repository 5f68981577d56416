"""The interpretation on the terminal."""

from __future__ import annotations

from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossdiff.interp.asker import Usage
from crossdiff.interp.explanation_table import SCORES
from crossdiff.interp.interpret_config import InterpretConfig

EXAMPLES = 5


def _interval(entry: dict[str, Any], sign: str = "") -> str:
    value = entry.get("mean", entry.get("value"))
    ends = f" [{entry['low']:{sign}.2f}, {entry['high']:{sign}.2f}]" if "low" in entry else ""
    return f"{value:{sign}.2f}{ends}"


def print_summary(summary: dict[str, Any], name: str, console: Console) -> None:
    """Means over the latents of each verdict, and the difference of chat-specific and shared ones."""
    judges = f", explained and judged by {', '.join(summary['models'])}" if summary["models"] else ""
    table = Table(
        title=f"{name}: how interpretable {summary['n_latents']} latents are{judges}", title_justify="left",
        caption="mean over latents [95% bootstrap interval over latents], number of latents; 0.5 is chance",
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
        console.print(
            f"[yellow]{summary['n_incomplete']} latents lack a score or an answer; interpretation_reason says why[/yellow]"
        )


def print_explanations(table: pl.DataFrame, console: Console) -> None:
    """The best explained latents."""
    best = table.filter(pl.col("explanation").is_not_null()).sort("detection", descending=True, nulls_last=True).head(EXAMPLES)
    for row in best.iter_rows(named=True):
        console.print(Text(f"latent {row['latent']}, detection {row['detection']:.2f}: {row['explanation']}"))


def print_usage(usage: Usage, config: InterpretConfig, console: Console, planned: bool) -> None:
    """Calls, tokens and cost, made or to be made."""
    calls, priced = f"{usage.calls:,} calls", config.input_price or config.output_price
    cost = f", cost {usage.cost(config):.2f}" if priced else ", cost unknown: give --input_price and --output_price"
    tokens = f"{usage.prompt_tokens:,} prompt and {usage.answer_tokens:,} answer tokens"
    about = "to make, about " if planned else "made, "
    more = "" if planned else f"; {usage.failed_attempts:,} attempts failed"
    console.print(f"{calls} {about}{tokens}{cost}; {usage.cached:,} answers from the cache{more}", highlight=False)
