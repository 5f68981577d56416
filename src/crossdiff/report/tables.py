"""Tables that other stages write, and their cells as numbers: what all readers of a run share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.integrity import intact, read_parquet
from crossdiff.look.reading import OVERLAP_COLUMNS
from crossdiff.report.records import BehaviourResult, Overlap, PoolScore
from crossdiff.statistics import Estimate

_SCORES = ("behaviour", "question", "pool", "pool_size", "auroc", "auroc_low", "auroc_high", "n_positive", "n_negative")


def read_table(path: Path, columns: Sequence[str], command: str) -> pl.DataFrame:
    """Read a Parquet table that `command` writes and check that it has some columns."""
    table = read_parquet(path, command)
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; run `{command}` again with this version")
    return table


def read_behaviours(folder: Path, unit: str = "latent") -> tuple[BehaviourResult, ...]:
    """The behaviours of a folder in the order of its table: one record per behaviour and question.

    Args:
        unit: column with the number of a pool's best: `latent` in a crosscoder's folder, `concept` in that of the concepts.
    """
    path = folder / "behaviours.parquet"
    if not path.is_file():
        return ()
    scores: dict[tuple[str, str], dict[str, PoolScore]] = {}
    command = "crossdiff analyze" if unit == "latent" else "crossdiff concepts"
    for row in read_table(path, (*_SCORES, unit), command).iter_rows(named=True):
        scores.setdefault((row["behaviour"], row["question"]), {})[row["pool"]] = PoolScore(
            row["pool"], row["pool_size"], row[unit], estimate(row, "auroc"), row["n_positive"] or 0, row["n_negative"] or 0
        )
    return tuple(BehaviourResult(*key, by_pool) for key, by_pool in scores.items())


def read_causal(path: Path) -> pl.DataFrame:
    """The results of a causal test: one row per intervention and span, each measure with the ends of its interval."""
    rows = []
    for result in read_json(intact(path))["results"]:
        row = {key: result[key] for key in ("intervention", "span", "n_latents", "n_conversations", "n_arms")}
        row["n_outside"] = result.get("n_outside")  # earlier versions left no latent out and had no other measures
        for key, found in {"kl": result["kl"], "closed": result["closed"], **result.get("measures", {})}.items():
            ends = ("value", ""), ("low", "_low"), ("high", "_high")
            row |= {f"{key}{suffix}": found[end] for end, suffix in ends}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def estimate(row: Mapping[str, Any], column: str) -> Estimate[float]:
    """A column of a table's row with its interval."""
    return Estimate(*(as_float(row[f"{column}{end}"]) for end in ("", "_low", "_high")))


def as_float(found: float | None) -> float:
    """A cell as a number; NaN for null."""
    return math.nan if found is None else float(found)


def overlap_of(row: Mapping[str, Any]) -> Overlap:
    """The overlap in a row of a table of latents or concepts."""
    cosine, cosine_direction, correlation, correlation_direction = (row[column] for column in OVERLAP_COLUMNS)
    return Overlap(as_float(cosine), cosine_direction, as_float(correlation), correlation_direction)
