"""Terminal output of `crossdiff compare`, `crossdiff null` and `crossdiff seeds`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import polars as pl

    from crossdiff.compare.seeds import SeedReport

Row = dict[str, Any]


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """An empty table with columns aligned to the left, then to the right."""
    table = Table(*left, title=title, title_justify="left")
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def comparison_table(comparison: dict[str, Any]) -> Table:
    """The comparison of crosscoders, one column each, with intervals below their values."""
    rows: dict[str, Row] = comparison["crosscoders"]
    table = Table("", *rows, title="held-out tokens, 95% intervals", show_lines=True)

    def add(title: str, cell: Callable[[Row], str]) -> None:
        table.add_row(title, *(cell(row) for row in rows.values()))

    def add_estimates(title: str, measure: str) -> None:
        for source in comparison["models"]:
            add(f"{title},\n{source}", lambda row: _estimate(row[measure].get(source)))  # noqa: B023

    add("reads", lambda row: row["architecture"][0])
    add("latents tied", lambda row: row["architecture"][1])
    add("sparsity", lambda row: row["architecture"][2])
    add("latents", lambda row: f"{row['n_latents']:,}")
    add(
        "FVE",
        lambda row: "\n".join(f"{s} {_number(value, '.3f')}" for s, value in row["heldout"]["fve"].items() if s != "total"),
    )
    add("L0", lambda row: f"{row['heldout']['l0']:.1f}")
    add("dead", lambda row: f"{row['heldout']['dead_share']:.1%}")
    add_estimates("CE recovered", "recovered")
    add_estimates("answer KL", "answer_kl")
    return table


def _estimate(estimate: dict[str, float | None] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.3f}\n{estimate['low']:.3f} to {estimate['high']:.3f}"


def print_null(
    rates: pl.DataFrame,
    console: Console | None = None,
    concepts: dict[str, int] | None = None,
    null_concepts: dict[str, int] | None = None,
) -> None:
    """Print the rates of `compare.null.compare`, and the concepts of both runs if both have any table of them."""
    console = console or Console()
    for (name,), part in rates.group_by("crosscoder", maintain_order=True):
        sizes = part.row(0, named=True)
        title = f"{name}: shares of {sizes['n_real']:,} live latents, and of {sizes['n_null']:,} in the null diff"
        table = _table(title, ("",), ("this run", "null", "null / this run"))
        for row in part.iter_rows(named=True):
            ratio = f"{row['null'] / row['real']:.2f}" if row["real"] else ""
            table.add_row(_words(row["rate"]), f"{row['real']:.2%}", f"{row['null']:.2%}", ratio)
        console.print(table)
    if concepts is not None and null_concepts is not None:
        table = _table("Concepts that replicate over trainings", ("",), ("this run", "null"))
        for key, text in (("n_replicated", "all"), ("n_chat_specific", "specific to the second model")):
            table.add_row(text, str(concepts[key]), str(null_concepts[key]))
        console.print(table)


def print_seeds(report: SeedReport, console: Console | None = None) -> None:
    """Print each training's counts and their spread, the latents found again, and how well the best latents predict."""
    console = console or Console()
    first, *others = report.counts.columns
    table = _table("Latents by training", (first,), tuple(others))
    for name, *numbers, mean, sd in report.counts.iter_rows():
        table.add_row(_words(name), *(f"{n:,}" for n in numbers), f"{mean:.1f}", f"{sd:.1f}")
    console.print(table)
    right = ("latents", "as any live latent", "as a chat-specific latent", "median cosine", "median cosine of all live latents")
    table = _table("Chat-specific latents found again in another training", ("of", "in"), right)
    for match in report.matches.iter_rows(named=True):
        shares = (_number(match[key], ".0%") for key in ("matched", "matched_specific"))
        cosines = (_number(match[key], ".2f") for key in ("median_cosine", "median_cosine_live"))
        table.add_row(match["seed"], match["other"], f"{match['n_specific']:,}", *shares, *cosines)
    console.print(table)
    if report.behaviours.height:
        title = "Held-out AUROC before the answer, best latent of each pool"
        table = _table(title, ("behaviour", "pool"), tuple(report.behaviours.columns[2:]))
        for behaviour, pool, *scores in report.behaviours.iter_rows():
            table.add_row(_words(behaviour), _words(pool), *(f"{score:.2f}" for score in scores))
        console.print(table)
