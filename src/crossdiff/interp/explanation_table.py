"""`interpretation.parquet`, the side table of explanations and scores, and how the latent table carries it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from crossdiff.errors import UserError
from crossdiff.files import read_json

FILE = "interpretation.parquet"
CONTEXTS_FILE = "interpretation_contexts.parquet"
SUMMARY_FILE = "interpretation.json"
SCORES = {
    "detection": "balanced accuracy of the model that tells, by the explanation, active contexts from others",
    "fuzzing": "balanced accuracy of the model that tells, by the explanation, rightly from wrongly marked tokens",
    "embedding_explanation": "AUROC of the similarity of a context's embedding to the explanation's",
    "embedding_examples": "AUROC of the similarity of a context's embedding to the mean of those of the shown examples",
    "bag_of_words": "AUROC of a logistic regression on the words of a context, fitted on training contexts",
}
"""Every score is 0.5 by chance and 1 at best, and compares held-out contexts with an active latent with others."""
KINDS = ("random", "similar")
"""Contexts without activation: anywhere, or where one of the latent's nearest latents is active."""
COLUMNS = {
    "latent": "number of the latent",
    "explanation": "what the model says it responds to; null without a model, or where it did not answer",
    **SCORES,
    "<score>_low, <score>_high": "ends of its 95% interval",
    "<score>_random, <score>_similar": "the score against one kind of contexts without activation",
    "n_shown": "examples that the explanation was written from",
    "contexts_active, contexts_random, contexts_similar": "held-out contexts of each kind",
    "interpretation_reason": "why a score is NaN, or what the model left unanswered; null where nothing is missing",
    "explainer": "the model that explained and judged; null without one",
    "crosscoder": "the training that the latent is of: rows of an older one are not read",
}
SCHEMA: dict[str, Any] = {
    "latent": pl.Int64,
    "explanation": pl.String,
    **{f"{score}{end}": pl.Float64 for score in SCORES for end in ("", "_low", "_high", *(f"_{kind}" for kind in KINDS))},
    **dict.fromkeys(("n_shown", "contexts_active", "contexts_random", "contexts_similar"), pl.Int64),
    "interpretation_reason": pl.String,
    "explainer": pl.String,
    "crosscoder": pl.String,
}
CONTEXT_COLUMNS = {
    "latent": "number of the latent",
    "kind": "active, random or similar",
    "document, sequence, start, stop": "where it is in the activation store",
    "activation": "largest v of the latent in it; 0 where it is silent",
    "detection": "what the model answered: is the latent active in it",
    "fuzzing": "what it answered: are the right tokens marked",
    "embedding_explanation, embedding_examples": "similarity of its embedding",
    "bag_of_words": "log-odds by its words",
    "text": "its text",
}
CONTEXT_SCHEMA: dict[str, Any] = {
    "latent": pl.Int64, "kind": pl.String, "document": pl.Int64, "sequence": pl.Int64, "start": pl.Int64, "stop": pl.Int64,
    "activation": pl.Float64, "detection": pl.Boolean, "fuzzing": pl.Boolean, "embedding_explanation": pl.Float64,
    "embedding_examples": pl.Float64, "bag_of_words": pl.Float64, "text": pl.String,
}  # fmt: skip


def training_of(folder: Path) -> str | None:
    """What tells the crosscoder in a run's folder from one trained anew in its place."""
    manifest = folder.parent / "manifest.json"
    if not manifest.is_file():
        return None
    record = read_json(manifest).get("stages", {}).get(f"train/{folder.name}")
    return None if record is None else str(record["fingerprint"])


def read_interpretation(folder: Path) -> pl.DataFrame:
    """The explanations and scores of a crosscoder's folder, without a row where there are none of this training.

    Raises:
        UserError: the file is damaged or of another version.
    """
    path, training = folder / FILE, training_of(folder)
    if not path.is_file() or training is None:
        return pl.DataFrame(schema=SCHEMA)
    return _read(path, SCHEMA).filter(pl.col("crosscoder") == training)


def with_interpretation(latents: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """The latent table of a crosscoder's folder with the columns of the interpretation, null where a latent has none.

    Raises:
        UserError: as `read_interpretation`.
    """
    found = read_interpretation(folder).drop("crosscoder")
    return latents.with_columns(pl.col("latent").cast(pl.Int64)).join(found, on="latent", how="left", maintain_order="left")


def read_latent_table(folder: Path) -> pl.DataFrame:
    """The latent table with the columns of the interpretation."""
    return with_interpretation(pl.read_parquet(folder / "latents.parquet"), folder)


def write_tables(target: Path, rows: pl.DataFrame, contexts: pl.DataFrame, earlier: Path) -> pl.DataFrame:
    """Write both tables: the new rows, and those of other latents that stand in the folder `earlier`; returns the first."""
    new = rows["latent"].implode()
    old = read_interpretation(earlier).filter(~pl.col("latent").is_in(new))
    table = pl.concat([old, rows]).sort("latent")
    if (earlier / CONTEXTS_FILE).is_file():
        kept = pl.col("latent").is_in(old["latent"].implode())
        contexts = pl.concat([_read(earlier / CONTEXTS_FILE, CONTEXT_SCHEMA).filter(kept), contexts])
    table.write_parquet(target / FILE)
    contexts.sort("latent", maintain_order=True).write_parquet(target / CONTEXTS_FILE)
    return table


def _read(path: Path, schema: dict[str, Any]) -> pl.DataFrame:
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}); delete it and run `crossdiff interpret` again") from None
    if dict(table.schema) != {name: kind() for name, kind in schema.items()}:
        raise UserError(f"{path} is of another version of crossdiff; delete it and run `crossdiff interpret` again")
    return table
