"""Read the folder `concepts` of a run into the records of `concept_records`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import polars as pl

from crossdiff.errors import UserError
from crossdiff.interp.explanation_table import read_interpretation
from crossdiff.latents.ranking import RECONSTRUCTIONS
from crossdiff.look.reading import OVERLAP_FILE, with_overlap
from crossdiff.report.concept_records import (
    CHANGED,
    Concept,
    ConceptsCausal,
    ConceptsSummary,
    NullShare,
    Patched,
    Prediction,
    RunConcepts,
)
from crossdiff.report.examples import Example, read_examples
from crossdiff.report.records import TOKEN_GROUPS, BehaviourResult, Health, NullDiff
from crossdiff.report.tables import as_float, estimate, overlap_of, read_behaviours, read_table

FOLDER = "concepts"
COMMAND = "crossdiff concepts"
SHOWN_SPECIFIC, SHOWN_OTHERS = 40, 20
"""Concepts that the page shows with the verdict chat_specific, and with another one."""
_NUS = ("nu_error", *RECONSTRUCTIONS)
_COLUMNS = (
    "concept", "n_trainings", "replicated", "n_members", "energy", "frequency", "n_active", "max_activation", "delta_norm",
    "decoder_cosine", *(f"{nu}{end}" for nu in _NUS for end in ("", "_low", "_high")), "rank_sum_paper", "verdict",
    "verdict_reason", *(f"share_{group}" for group in TOKEN_GROUPS), "tokens", "words",
)  # fmt: skip


def read_concepts(directory: Path, with_examples: bool = True) -> RunConcepts | None:
    """The concepts of a run directory; None if it has none.

    Args:
        with_examples: read those that the page shows with their examples; otherwise `shown` is empty.

    Raises:
        UserError: a file is missing, damaged or of another version.
    """
    folder = directory / FOLDER
    if not (folder / "concepts.json").is_file():
        return None
    summary = ConceptsSummary.read(folder / "concepts.json", COMMAND)
    causal = folder / "causal.json"
    found = RunConcepts(
        folder=folder,
        summary=summary,
        table=with_overlap(
            _with_explanations(read_table(folder / "concepts.parquet", _COLUMNS, COMMAND), folder),
            folder / OVERLAP_FILE,
            "concept",
        ),
        members=read_table(folder / "members.parquet", ("concept", "training", "latent", "verdict", "correlation"), COMMAND),
        behaviours=read_behaviours(folder, "concept"),
        patched=_read_patched(folder / "causal.parquet"),
        together=ConceptsCausal.read(causal, "crossdiff causal") if causal.is_file() else None,
        null=_read_null(directory),
        shown=(),
    )
    if not with_examples:
        return found
    numbers = _shown(found)
    examples = read_examples(folder / "examples.sqlite", numbers, COMMAND)
    return replace(found, shown=tuple(concept_of(found, number, examples[number]) for number in numbers))


def check_concept(concepts: RunConcepts, number: object) -> None:
    """Raise `UserError` if there is no such concept."""
    n = concepts.table.height
    if isinstance(number, bool) or not isinstance(number, SupportsIndex):
        raise UserError(f"{number!r} is not the number of a concept; expected a whole number, such as 0")
    if not 0 <= index(number) < n:
        there_are = f"there are {n}, from 0 to {n - 1}" if n else "the run has none"
        raise UserError(f"there is no concept {number}: {there_are}")


def concept_of(concepts: RunConcepts, number: int, examples: tuple[Example, ...]) -> Concept:
    """The record of one row of the concept table."""
    row: Mapping[str, Any] = concepts.table.row(by_predicate=pl.col("concept") == number, named=True)
    return Concept(
        number=number,
        verdict=row["verdict"],
        verdict_reason=row["verdict_reason"],
        replicated=None if concepts.summary.needed is None else row["replicated"],
        n_trainings=row["n_trainings"],
        n_members=row["n_members"],
        energy=as_float(row["energy"]),
        nu_error=estimate(row, "nu_error"),
        nu_reconstruction=estimate(row, "nu_reconstruction"),
        nu_reconstruction_nobias=estimate(row, "nu_reconstruction_nobias"),
        delta_norm=as_float(row["delta_norm"]),
        decoder_cosine=as_float(row["decoder_cosine"]),
        frequency=as_float(row["frequency"]),
        n_active=row["n_active"],
        max_activation=as_float(row["max_activation"]),
        shares={group: as_float(row[f"share_{group}"]) for group in TOKEN_GROUPS},
        tokens=tuple(row["tokens"]),
        words=tuple(row["words"]),
        explanation=row["explanation"],
        predictions=_predictions(concepts.behaviours, number),
        patched=concepts.patched.get(number, ()),
        examples=examples,
        overlap=overlap_of(row),
    )


def ranked(concepts: RunConcepts) -> pl.DataFrame:
    """The concept table, those first that replicate and that only the chat model has, then in order of their energy."""
    order = ["chat_specific", "rotated", "base_specific"]
    place = pl.col("verdict").replace_strict(order, range(len(order)), default=len(order), return_dtype=pl.Int64)
    return concepts.table.sort(~pl.col("replicated"), place, -pl.col("energy"), "concept")


def _shown(concepts: RunConcepts) -> list[int]:
    """The concepts of the page: those that replicate, or all with one training, and those that predict a behaviour best."""
    rows = ranked(concepts)
    if concepts.summary.needed is not None:
        rows = rows.filter("replicated")
    best = [number for result in concepts.behaviours if (number := _best(result)) is not None]
    specific = pl.col("verdict") == "chat_specific"
    limited = pl.concat([rows.filter(specific).head(SHOWN_SPECIFIC), rows.filter(~specific).head(SHOWN_OTHERS)])
    kept = {*limited["concept"].to_list(), *best}
    return [number for number in rows["concept"].to_list() if number in kept]


def _best(result: BehaviourResult) -> int | None:
    score = result.scores.get("concepts")
    return None if score is None else score.latent


def _predictions(behaviours: Sequence[BehaviourResult], number: int) -> tuple[Prediction, ...]:
    return tuple(
        Prediction(result.behaviour, result.question, result.scores["concepts"].auroc)
        for result in behaviours
        if _best(result) == number
    )


def _with_explanations(table: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """The table with the column `explanation`, null where nobody has explained the concept."""
    found = read_interpretation(folder).select(pl.col("latent").cast(table.schema["concept"]).alias("concept"), "explanation")
    return table.join(found, on="concept", how="left", maintain_order="left")


def _read_null(directory: Path) -> dict[str, tuple[NullShare, ...]] | None:
    """How often the null diff gives each verdict that says that the models differ; None without a null diff."""
    rates, _ = NullDiff.of_run(directory).split(directory)
    if not rates:
        return None
    found: dict[str, tuple[NullShare, ...]] = {}
    for name, null in rates.items():
        if not (directory / name / "health.json").is_file():
            continue
        health = Health.read(directory / name / "health.json", "crossdiff analyze")
        live = max(1, health.n_latents - health.counts["dead"])
        for verdict in CHANGED:
            if verdict in null.rates:
                share = NullShare(health.counts[verdict] / live, null.rates[verdict])
                found[verdict] = (*found.get(verdict, ()), share)
    return found


def _read_patched(path: Path) -> dict[int, tuple[Patched, ...]]:
    """What each concept closes alone, by concept; empty if the causal test was not run."""
    if not path.is_file():
        return {}
    columns = ("concept", "training", "kl_reduction", "kl_reduction_low", "kl_reduction_high", "closed")
    found: dict[int, tuple[Patched, ...]] = {}
    for row in read_table(path, columns, "crossdiff causal").iter_rows(named=True):
        one = Patched(row["training"], estimate(row, "kl_reduction"), as_float(row["closed"]))
        found[row["concept"]] = (*found.get(row["concept"], ()), one)
    return found
