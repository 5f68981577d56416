"""What the first look shows, in the terminal."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crossdiff.look.reading import read_look

N_LISTED = 8


def print_look(folder: Path, console: Console) -> None:
    """Print the tables of a look, the main sentences first."""
    look = read_look(folder)
    assert look is not None  # the stage has just made it
    for sentence in look.sentences:
        console.print(sentence, soft_wrap=True, highlight=False)
    if look.summary.identical:
        return
    console.print(_words(look.words, look.phrases))
    console.print(_places(look.places))
    console.print(_depth(look.depth, look.summary.recommended_layer))
    console.print(_directions(look.directions))
    if look.probes.height:
        console.print(_probes(look.probes))


def _table(title: str, *left: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(*left, title=title, title_justify="left")
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def _text(value: str) -> str:
    return escape(repr(value)[1:-1])


def _words(words: pl.DataFrame, phrases: pl.DataFrame) -> Table:
    table = _table(
        "what the chat model says more (+) and less (-)", "token", right=("per 1,000", "documents"),
    )  # fmt: skip
    table.add_column("phrase")
    for heading in ("nats each", "places", "documents"):
        table.add_column(heading, justify="right")
    for side in (1, -1):
        ups = words.filter(pl.col("rise") * side > 0).sort("rise", descending=side > 0).head(N_LISTED)
        gains = phrases.filter(pl.col("gain") * side > 0).sort("gain", descending=side > 0).head(N_LISTED)
        for index in range(max(ups.height, gains.height)):
            cells = [""] * 6
            if index < ups.height:
                row = ups.row(index, named=True)
                cells[:3] = [_text(row["token"]), f"{row['per_thousand']:+.2f}", f"{row['n_documents']:,}"]
            if index < gains.height:
                row = gains.row(index, named=True)
                cells[3:] = [_text(row["phrase"]), f"{row['mean_gain']:+.2f}", f"{row['n_places']:,}"]
            table.add_row(*cells, "" if index >= gains.height else f"{gains['n_documents'][index]:,}")
        table.add_section()
    return table


def _places(places: pl.DataFrame) -> Table:
    table = _table("where they differ most", "text", "base says", "chat says", right=("KL",))
    for row in places.head(N_LISTED).iter_rows(named=True):
        table.add_row(
            _text(row["before"][-60:]), f"{_text(row['base_says'])} {row['p_base']:.0%}",
            f"{_text(row['chat_says'])} {row['p_chat']:.0%}", f"{row['kl']:.2f}",
        )  # fmt: skip
    return table


def _depth(depth: pl.DataFrame, recommended: int | None) -> Table:
    table = _table(
        "after each layer", right=("layer", "KL already there", "norm of the difference", "cosine", "effective rank")
    )
    for row in depth.iter_rows(named=True):
        kl = f"{row['kl']:.3f} [{_number(row['kl_low'], '.3f')}, {_number(row['kl_high'], '.3f')}]"
        name = f"{row['layer']}{' *' if row['layer'] == recommended else ''}"
        table.add_row(
            name, kl, _number(row["relative_norm"], ".2f"), _number(row["centred_cosine"], ".3f"),
            _number(row["effective_rank"], ".1f"),
        )  # fmt: skip
    return table


def _directions(directions: pl.DataFrame) -> Table:
    table = _table("what the difference promotes in the chat model", "direction", right=("tokens", "halves agree", "share"))
    table.add_column("promotes")
    for row in directions.iter_rows(named=True):
        promoted = " ".join(_text(token.strip()) for token in row["chat_up"][:6])
        table.add_row(
            row["direction"],
            f"{row['n_tokens']:,}",
            _number(row["halves_cosine"], ".2f"),
            _number(row["share"], ".0%"),
            promoted,
        )
    return table


def _probes(probes: pl.DataFrame) -> Table:
    table = _table("held-out AUROC before the answer", "behaviour", right=("bag of words",))
    columns = [(reading, read) for reading in ("diffmean", "probe") for read in ("base", "chat", "difference")]
    for reading, read in columns:
        table.add_column(f"{reading}, {read}", justify="right")
    for behaviour in probes["behaviour"].unique(maintain_order=True):
        part = probes.filter(behaviour=behaviour)
        words = part.filter(reading="bag_of_words")["auroc"][0]
        cells = [part.filter(reading=reading, activations=read)["auroc"][0] for reading, read in columns]
        table.add_row(behaviour, f"{words:.2f}", *(f"{cell:.2f}" for cell in cells))
    return table
