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


def print_look(folder: Path, console: Console, in_full: bool) -> None:
    """Print the main sentences of a look, and with `in_full` its tables."""
    look = read_look(folder)
    assert look is not None  # the stage has just made it
    for sentence in look.sentences:
        console.print(sentence, soft_wrap=True, highlight=False)
    if look.summary.identical or not in_full:
        return
    console.print(_words(look.words))
    console.print(_phrases(look.phrases))
    console.print(_places(look.places))
    console.print(_depth(look.depth, look.summary.recommended_layer))
    console.print(_directions(look.directions))
    if look.steered.height:
        console.print(_steered(look.steered))
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


def _words(words: pl.DataFrame) -> Table:
    table = _table("tokens that the chat model expects more (+) or less (-) often, anywhere", "token")
    for heading in ("per 1,000 tokens", "documents affected"):
        table.add_column(heading, justify="right")
    for side in (1, -1):
        ups = words.filter(pl.col("rise") * side > 0).sort("rise", descending=side > 0).head(N_LISTED)
        for row in ups.iter_rows(named=True):
            table.add_row(_text(row["token"]), f"{row['per_thousand']:+.2f}", f"{row['n_documents']:,}")
        table.add_section()
    return table


def _phrases(phrases: pl.DataFrame) -> Table:
    table = _table("phrases of the texts that the chat model finds more (+) or less (-) probable", "phrase")
    for heading in ("nats in all", "nats each", "places", "documents"):
        table.add_column(heading, justify="right")
    for side in (1, -1):
        gains = phrases.filter(pl.col("gain") * side > 0).sort("gain", descending=side > 0).head(N_LISTED)
        for row in gains.iter_rows(named=True):
            numbers = f"{row['gain']:+,.0f}", f"{row['mean_gain']:+.2f}", f"{row['n_places']:,}", f"{row['n_documents']:,}"
            table.add_row(_text(row["phrase"]), *numbers)
        table.add_section()
    return table


def _places(places: pl.DataFrame) -> Table:
    table = _table("where they differ most", "text so far", "base says next", "chat says next", right=("KL",))
    for row in places.head(N_LISTED).iter_rows(named=True):
        table.add_row(
            _text(row["before"][-60:]), f"{_text(row['base_says'])} {row['p_base']:.0%}",
            f"{_text(row['chat_says'])} {row['p_chat']:.0%}", f"{row['kl']:.2f}",
        )  # fmt: skip
    return table


def _depth(depth: pl.DataFrame, recommended: int | None) -> Table:
    table = _table(
        "after each layer; * marks the earliest one worth trying",
        right=("layer", "KL present", "norm of the difference", "cosine", "effective rank"),
    )
    for row in depth.iter_rows(named=True):
        has_interval = not math.isnan(row["kl_low"])  # undefined for a single document
        kl = f"{row['kl']:.3f}" + (f" [{row['kl_low']:.3f}, {row['kl_high']:.3f}]" if has_interval else "")
        name = f"{row['layer']}{' *' if row['layer'] == recommended else ''}"
        table.add_row(
            name, kl, _number(row["relative_norm"], ".2f"), _number(row["centred_cosine"], ".3f"),
            _number(row["effective_rank"], ".1f"),
        )  # fmt: skip
    return table


def _directions(directions: pl.DataFrame) -> Table:
    title = "what the difference promotes in the chat model (logit lens); a random direction has the logit in brackets"
    table = _table(title, "direction", right=("tokens", "cosine of halves", "share of variance", "top logit"))
    table.add_column("promotes")
    for row in directions.iter_rows(named=True):
        promoted = " ".join(
            _text(token.strip()) for token in row["chat_up"] if token.strip().isprintable() and "\ufffd" not in token
        )
        table.add_row(
            row["direction"], f"{row['n_tokens']:,}", _number(row["halves_cosine"], ".2f"), _number(row["share"], ".0%"),
            f"{row['top_logit']:.1f} [{row['random_logit']:.1f}]", promoted,
        )  # fmt: skip
    return table


def _steered(steered: pl.DataFrame) -> Table:
    """What both models write after the first prompt."""
    prompt = steered["prompt"][0]
    table = _table(f"what they write after {_text(prompt)!r} when a mean difference is added", "added", "base", "chat")
    for row in steered.filter(prompt=prompt).pivot(on="model", index=("direction", "strength"), values="text").iter_rows():
        direction, strength, base, chat = row
        table.add_row("nothing" if direction is None else f"{strength:g} x {direction}", _text(base), _text(chat))
    return table


def _probes(probes: pl.DataFrame) -> Table:
    title = "held-out AUROC before the answer, from the difference of the activations; 0.5 is chance"
    table = _table(title, "behaviour", right=("words of the prompt", "DiffMean", "probe", "conversations"))
    for behaviour in probes["behaviour"].unique(maintain_order=True):
        part = probes.filter(behaviour=behaviour)
        found = {row["reading"]: row for row in part.iter_rows(named=True) if row["activations"] in (None, "difference")}
        cells = [
            f"{row['auroc']:.2f} [{row['auroc_low']:.2f}, {row['auroc_high']:.2f}]"
            for row in (found["bag_of_words"], found["diffmean"], found["probe"])
        ]
        table.add_row(behaviour.replace("_", " "), *cells, f"{part['n_positive'][0]:,} and {part['n_negative'][0]:,} others")
    return table
