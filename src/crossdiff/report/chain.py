"""What each step of a chain of models adds, for the report and for the pages of latents and concepts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from crossdiff.latents.ranking import RANKED, title
from crossdiff.report import wording
from crossdiff.report.concept_records import RunConcepts
from crossdiff.report.tables import estimate, read_table

CHAIN_FILE = "chain.parquet"
SHADES = 8
"""Shades of a cell, from the smallest norm to the largest."""
OPEN_LINES = 12
"""Concepts of each step that the report shows."""
WORDS = {"steady": "as before", "dead": "never active"}
"""Changes that the pages call by another name."""
MEANINGS = (
    ("appears", "only the later of two models has it"),
    ("vanishes", "only the earlier one has it"),
    ("turns", "the later one has it in a direction that the earlier one lacks"),
    ("grows, shrinks", "both have it, one more strongly"),
    ("undecided", "it is active too rarely to say, or an interval reaches over its limit"),
)
"""What a change means, for the reader."""
_COLUMNS = (
    "before", "after", "norm_before", "norm_after", "delta_norm", "verdict", "change",
    *(f"{nu}{mirrored}{end}" for nu in RANKED for mirrored in ("", "_mirrored") for end in ("", "_low", "_high")),
)  # fmt: skip


class Cell(NamedTuple):
    """A model of the chain: the decoder norm there as a share of the largest, its shade (0 to `SHADES`), and the change."""

    share: str
    shade: int
    change: str


class Line(NamedTuple):
    """A concept along the chain."""

    number: int
    label: str
    cells: tuple[Cell, ...]


class Emerging(NamedTuple):
    """The concepts that first appear in one model; `n_more` of them are not shown."""

    model: str
    n: int
    lines: tuple[Line, ...]
    n_more: int


class ChainSection(NamedTuple):
    """The replicated concepts of a chain by the model where they first appear; `n_before` are in the first model already."""

    models: tuple[str, ...]
    groups: tuple[Emerging, ...]
    n_before: int
    n_open: int
    meanings: tuple[tuple[str, str], ...] = MEANINGS


class StepLine(NamedTuple):
    """What one step does to a latent or a concept, in words and numbers."""

    step: str
    norms: str
    ratios: tuple[str, ...]
    change: str


def read_chain(folder: Path, unit: str, command: str) -> pl.DataFrame | None:
    """The table `chain.parquet` of a crosscoder (unit `latent`) or of the concepts (unit `concept`); None with two models."""
    path = folder / CHAIN_FILE
    return read_table(path, (unit, *_COLUMNS), command) if path.is_file() else None


def _word(change: str) -> str:
    return WORDS.get(change, change)


def _norms(rows: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> list[float]:
    """The decoder norms in the models of a chain, from the rows of one latent or concept."""
    of = {row["before"]: row["norm_before"] for row in rows} | {row["after"]: row["norm_after"] for row in rows}
    return [of[source] for source in sources]


def _cells(rows: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> tuple[Cell, ...]:
    norms = _norms(rows, sources)
    largest = max(norms)
    changes = {(row["before"], row["after"]): row["change"] for row in rows}
    words = ["", *(_word(changes[step]) for step in pairwise(sources))]
    shares = [norm / largest if largest > 0 else math.nan for norm in norms]
    return tuple(
        Cell(wording.number(share), 0 if math.isnan(share) else round(SHADES * share), word)
        for share, word in zip(shares, words, strict=True)
    )


def chain_section(concepts: RunConcepts, titles: Mapping[str, str]) -> ChainSection | None:
    """The replicated concepts by the model where they first appear; None for a run with two models."""
    chain = read_chain(concepts.folder, "concept", "crossdiff concepts")
    if chain is None:
        return None
    sources = list(titles)
    table = concepts.table.filter("replicated").sort("energy", descending=True)
    rows_of = chain.partition_by("concept", as_dict=True)
    groups = []
    for source in sources[1:]:
        own = table.filter(emerges_at=source)
        lines = [
            Line(row["concept"], row["explanation"] or row["label"] or "", _cells(rows_of[row["concept"],].to_dicts(), sources))
            for row in own.head(OPEN_LINES).iter_rows(named=True)
        ]
        groups.append(Emerging(titles[source], own.height, tuple(lines), own.height - len(lines)))
    n_before, n_open = table.filter(emerges_at=sources[0]).height, table["emerges_at"].null_count()
    return ChainSection(tuple(titles.values()), tuple(groups), n_before, n_open)


def step_lines(chain: pl.DataFrame, unit: str, number: int, titles: Mapping[str, str]) -> tuple[StepLine, ...]:
    """What each step does to one latent or concept, and the whole chain at the end.

    The ratios are those that give the verdict: along the direction of the later model, or of the earlier one where the latent
    leans to that.
    """
    lines = []
    for row in chain.filter(pl.col(unit) == number).iter_rows(named=True):
        side = "_mirrored" if row["verdict"] == "base_specific" else ""
        ratios = tuple(wording.interval(estimate(row, f"{nu}{side}")) for nu in RANKED)
        norms = f"{wording.number(row['norm_before'])} → {wording.number(row['norm_after'])}"
        step = f"{titles[row['before']]} → {titles[row['after']]}"
        lines.append(StepLine(step, norms, ratios, _word(row["change"])))
    return tuple(lines)


RATIOS = tuple(title(nu) for nu in RANKED)
"""What the ratios of a `StepLine` are called."""
