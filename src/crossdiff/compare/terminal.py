"""What `crossdiff null` and `crossdiff seeds` print."""

from __future__ import annotations

import polars as pl
from rich.console import Console
from rich.table import Table

from crossdiff.compare.seeds import SeedReport


def print_null(rates: pl.DataFrame, console: Console | None = None) -> None:
    """Print the rates of `latents.null.compare`."""
    console = console or Console()
    for name, part in rates.group_by("crosscoder", maintain_order=True):
        sizes = part.row(0, named=True)
        title = f"{name[0]}: shares of {sizes['n_real']:,} live latents, and of {sizes['n_null']:,} in the null diff"
        table = Table("", title=title, title_justify="left")
        for heading in ("this run", "null", "null / this"):
            table.add_column(heading, justify="right")
        for row in part.iter_rows(named=True):
            ratio = f"{row['null'] / row['real']:.2f}" if row["real"] else ""
            table.add_row(row["rate"].replace("_", " "), f"{row['real']:.2%}", f"{row['null']:.2%}", ratio)
        console.print(table)


def print_seeds(report: SeedReport, console: Console | None = None) -> None:
    """Print the counts of each training with their spread, what is found again, and how well the best latents predict."""
    console = console or Console()
    table = Table(title="Latents by training", title_justify="left")
    for index, name in enumerate(report.counts.columns):
        table.add_column(name, justify="right" if index else "left")
    for name, *numbers, mean, sd in report.counts.iter_rows():
        table.add_row(name.replace("_", " "), *(f"{n:,}" for n in numbers), f"{mean:.1f}", f"{sd:.1f}")
    console.print(table)
    table = Table(title="Chat-specific latents found again", title_justify="left")
    for heading in ("of", "in", "latents", "as any latent", "as a chat-specific one", "median cosine", "of all live ones"):
        table.add_column(heading, justify="left" if heading in ("of", "in") else "right")
    for match in report.matches.iter_rows(named=True):
        shares = ("" if value != value else f"{value:.0%}" for value in (match["matched"], match["matched_specific"]))
        cosines = ("" if value != value else f"{value:.2f}" for value in (match["median_cosine"], match["median_cosine_live"]))
        table.add_row(match["seed"], match["other"], f"{match['n_specific']:,}", *shares, *cosines)
    console.print(table)
    if report.behaviours.height:
        table = Table(title="Held-out AUROC before the answer, best latent of each pool", title_justify="left")
        for name in report.behaviours.columns:
            table.add_column(name, justify="left" if name in ("behaviour", "pool") else "right")
        for behaviour, pool, *scores in report.behaviours.iter_rows():
            table.add_row(behaviour.replace("_", " "), pool.replace("_", " "), *(f"{score:.2f}" for score in scores))
        console.print(table)
