"""`interpretation.parquet`, the table of explanations and scores, and its join with the latent table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from crossdiff.errors import UserError
from crossdiff.integrity import read_parquet
from crossdiff.run_manifest import MANIFEST, RunManifest

CONCEPTS = "concepts"
"""Folder of a run's concepts, whose numbers are in the column `latent` here."""
FILE = "interpretation.parquet"
CONTEXTS_FILE = "interpretation_contexts.parquet"
SUMMARY_FILE = "interpretation.json"
SCORES = {
    "detection": "balanced accuracy with which the model, given the explanation, tells active contexts from others",
    "fuzzing": "balanced accuracy with which the model, given the explanation, tells rightly from wrongly marked tokens",
    "embedding_explanation": "AUROC of the similarity between the embeddings of a context and the explanation",
    "embedding_examples": "AUROC of the similarity between the embedding of a context and the mean of the shown examples'",
    "bag_of_words": "AUROC of a logistic regression on the words of a context, fitted on training contexts",
}
"""Scores of how well held-out contexts with an active latent are told from others: 0.5 is chance, 1 is perfect."""
KINDS = ("random", "similar")
"""Contexts without activation: at random places, or where one of the latent's nearest neighbours is active."""
COLUMNS = {
    "latent": "number of the latent",
    "explanation": "what the latent responds to, according to the model; null without a model or an answer",
    **SCORES,
    "<score>_low, <score>_high": "ends of the score's 95% interval",
    "<score>_random, <score>_similar": "the score against one kind of contexts without activation",
    "n_shown": "examples shown to the model for the explanation",
    "contexts_active, contexts_random, contexts_similar": "held-out contexts of each kind",
    "interpretation_reason": "why a score is NaN or a request unanswered; null if nothing is missing",
    "explainer": "name of the model that explained and judged; null without one",
    "crosscoder": "fingerprint of the crosscoder's training; rows of an older training are ignored",
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
    "document, sequence, start, stop": "its place in the activation store",
    "activation": "largest v of the latent in it; 0 if the latent is not active",
    "detection": "the model's answer: is the latent active in it",
    "fuzzing": "the model's answer: are the right tokens marked",
    "embedding_explanation, embedding_examples": "similarity of its embedding",
    "bag_of_words": "log-odds of activation from its words",
    "text": "its text",
}
CONTEXT_SCHEMA: dict[str, Any] = {
    "latent": pl.Int64, "kind": pl.String, "document": pl.Int64, "sequence": pl.Int64, "start": pl.Int64, "stop": pl.Int64,
    "activation": pl.Float64, "detection": pl.Boolean, "fuzzing": pl.Boolean, "embedding_explanation": pl.Float64,
    "embedding_examples": pl.Float64, "bag_of_words": pl.Float64, "text": pl.String,
}  # fmt: skip


def training_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the training of a run's crosscoder, or of its concepts, which changes when they are made again."""
    run = folder.parent
    if not (run / MANIFEST).is_file():
        return None
    record = RunManifest.read(run).stages.get("concepts" if folder.name == CONCEPTS else f"train/{folder.name}")
    return None if record is None else record.fingerprint


def read_interpretation(folder: Path) -> pl.DataFrame:
    """The explanations and scores in a crosscoder's folder; no rows if there are none for its current training.

    A pulled run has no manifest; what it holds was published together.
    """
    path = folder / FILE
    if not path.is_file():
        return pl.DataFrame(schema=SCHEMA)
    found = _read(path, SCHEMA)
    is_pulled = not (folder.parent / MANIFEST).is_file()
    return found if is_pulled else found.filter(pl.col("crosscoder") == training_fingerprint(folder))


def with_interpretation(latents: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """A latent table with the columns of the interpretation in a crosscoder's folder; null for other latents."""
    interpretation = read_interpretation(folder).drop("crosscoder")
    return latents.with_columns(pl.col("latent").cast(pl.Int64)).join(
        interpretation, on="latent", how="left", maintain_order="left"
    )


def read_latent_table(folder: Path) -> pl.DataFrame:
    """The latent table in a crosscoder's folder, or that of concepts, with the columns of the interpretation."""
    if folder.name == CONCEPTS:
        return with_interpretation(read_parquet(folder / "concepts.parquet").rename({"concept": "latent"}), folder)
    return with_interpretation(read_parquet(folder / "latents.parquet"), folder)


def write_tables(target: Path, rows: pl.DataFrame, contexts: pl.DataFrame, earlier: Path) -> pl.DataFrame:
    """Write both tables, with the new rows and those of other latents in the folder `earlier`; return the table of latents."""
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
    table = read_parquet(path, "crossdiff interpret")
    if dict(table.schema) != {name: kind() for name, kind in schema.items()}:
        raise UserError(f"{path} was written by another version of crossdiff; delete it and run `crossdiff interpret` again")
    return table
