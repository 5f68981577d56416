"""Read a run directory into the records of `records`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from textwrap import shorten
from typing import Any

import polars as pl

from crossdiff.config import RunConfig, validate
from crossdiff.errors import UserError
from crossdiff.interp.explanation_table import SUMMARY_FILE, read_interpretation, with_interpretation
from crossdiff.interp.summary import summarise
from crossdiff.latents.ranking import by_rank, plausible
from crossdiff.latents.settings import analysis_settings, verdict_settings
from crossdiff.look.reading import OVERLAP_FILE, read_look, with_overlap
from crossdiff.report.concept_reading import FOLDER as CONCEPTS
from crossdiff.report.concept_reading import read_concepts
from crossdiff.report.examples import TOP_EXAMPLES, ExampleDatabase
from crossdiff.report.records import (
    TOKEN_GROUPS,
    BehaviourResult,
    CrosscoderReport,
    DatasetShare,
    Health,
    Interpretation,
    Label,
    Latent,
    Limits,
    NullDiff,
    RunReport,
    StoreManifest,
    TopLatents,
)
from crossdiff.report.tables import as_float, estimate, overlap_of, read_behaviours, read_table
from crossdiff.sources import BASE, CHAT
from crossdiff.yaml_files import read_yaml

DOCUMENTS = Path("activations", "documents.parquet")
PROMPT_CHARACTERS = 160
"""Of the prompt that stands for a label."""
N_TOP_LATENTS = 12
FEW_SPECIFIC = 5
"""With fewer chat-specific latents than this, the list is filled up with candidates that missed a condition."""
CANDIDATE_DELTA_NORM = 0.6

_NUS = ("nu_error", "nu_reconstruction", "nu_reconstruction_nobias", "nu_activation")
_LATENT_COLUMNS = (
    "latent", "n_active", "frequency", "mean_activation", "max_activation", "norm_base", "norm_chat", "delta_norm",
    "delta_norm_class", "decoder_cosine", *(f"{nu}{end}" for nu in _NUS for end in ("", "_low", "_high")),
    "rank_sum", "rank_sum_paper", "verdict", "verdict_reason", "chat_specific", "chat_specific_paper", "template_only",
    *(f"share_{group}" for group in TOKEN_GROUPS),
)  # fmt: skip
_ALONE = "kl_reduction_response"


def read_run(directory: Path, names: Sequence[str] | None = None) -> RunReport:
    """Read a run directory.

    Args:
        names: the crosscoder folders to read, in this order; default: every analysed one, in the order of the settings.
    """
    if not directory.is_dir():
        raise UserError(f"there is no run directory at {directory}; run `crossdiff run` first, or give the path of a run")
    analysed, waiting = _crosscoder_folders(directory, names)
    if not analysed:
        raise UserError(f"{directory} has no crosscoder folder with a latents.parquet; run `crossdiff analyze` first")
    crosscoders = tuple(_read_crosscoder(directory / name) for name in analysed)
    path = directory / "activations" / "manifest.json"
    null, null_outdated = NullDiff.of_run(directory).split(directory)
    manifest = StoreManifest.read(path, "crossdiff harvest") if path.is_file() else StoreManifest()
    return RunReport(
        directory=directory,
        base=manifest.model(BASE),
        chat=manifest.model(CHAT),
        layer=crosscoders[0].health.layer,
        n_tokens=manifest.n_tokens,
        datasets=_read_datasets(directory / DOCUMENTS),
        crosscoders=crosscoders,
        not_analysed=waiting,
        null=null,
        null_outdated=null_outdated,
        concepts=read_concepts(directory),
        texts=manifest.texts,
        same_model=manifest.same_model,
        massive=manifest.massive,
        look=read_look(directory / "look"),
        titles=titles_of(directory),
        labels=_read_labels(directory / DOCUMENTS),
    )


def titles_of(directory: Path) -> dict[str, str]:
    """What the models of a run are called, by source, in the order of the training."""
    path = directory / "config.yaml"
    config = validate(RunConfig, read_yaml(path), str(path)) if path.is_file() else RunConfig()
    return config.titles


def _crosscoder_folders(directory: Path, names: Sequence[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """Folders with a latent table, and those that only have a trained crosscoder."""
    if names is None:
        folders = sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name != CONCEPTS)
        repeated = repetitions(directory, folders)
        folders = [name for name in folders if name not in repeated]
        config = directory / "config.yaml"
        listed = (read_yaml(config).get("crosscoders") if config.is_file() else None) or {}
        names = [name for name in dict.fromkeys((*listed, "l1", "batchtopk", *folders)) if name in folders]
    analysed = [name for name in names if (directory / name / "latents.parquet").is_file()]
    trained = [name for name in names if (directory / name / "model.safetensors").is_file()]
    return analysed, tuple(name for name in trained if name not in analysed)


def repetitions(directory: Path, folders: Sequence[str]) -> set[str]:
    """The folders of trainings that repeat a crosscoder with another seed; they appear within the concepts only."""
    path = directory / "config.yaml"
    if not path.is_file():
        return set()
    crosscoders = validate(RunConfig, read_yaml(path), str(path)).crosscoders
    of = {name: re.fullmatch(r"(.+)-seed\d+", name) for name in folders if name not in crosscoders}
    return {name for name, found in of.items() if found and found[1] in crosscoders}


def read_latent(folder: Path, latents: pl.DataFrame, latent: int) -> Latent:
    """Read one latent of a crosscoder's folder, with its examples."""
    row = latents.row(by_predicate=pl.col("latent") == latent, named=True)
    with closing(ExampleDatabase(folder / "examples.sqlite")) as database:
        return latent_of(row, database)


def read_latents(folder: Path) -> pl.DataFrame:
    """The latent table of a crosscoder's folder, joined with the effect of single latents (`crossdiff causal`), with their
    explanations and scores (`crossdiff interpret`) and with their overlap with the first look; null where these were not made.
    """
    latents = read_table(folder / "latents.parquet", _LATENT_COLUMNS, "crossdiff analyze")
    described = with_interpretation(_with_causal(latents, folder / "causal_latents.parquet"), folder)
    return with_overlap(described, folder / OVERLAP_FILE)


def _read_crosscoder(folder: Path) -> CrosscoderReport:
    health = Health.read(folder / "health.json", "crossdiff analyze")
    latents = read_latents(folder)
    behaviours = read_behaviours(folder)
    top_rows, n_specific = _top_rows(latents)
    shown = top_rows["latent"].to_list()
    best = [latent for latent in _best_specific(behaviours) if latent not in shown]
    wanted = pl.concat([top_rows, latents.filter(pl.col("latent").is_in(best))])
    with closing(ExampleDatabase(folder / "examples.sqlite")) as database:
        records = tuple(latent_of(row, database, per_band=TOP_EXAMPLES) for row in wanted.iter_rows(named=True))
    top = TopLatents(records[: len(shown)], n_specific)
    settings = analysis_settings(folder)
    limits = Limits(settings.nu_error, settings.nu_reconstruction, settings.delta_norm)
    summary = _read_summary(folder, latents)
    return CrosscoderReport(folder.name, health, limits, latents, behaviours, top, records[len(shown) :], summary)


def _top_rows(latents: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """The most chat-specific rows by rank_sum, and how many of them have the verdict chat_specific.

    Those whose nu is out of range, or undefined, are not ranked.
    """
    ranked = latents.filter(plausible()).sort(*by_rank(), nulls_last=True)
    is_specific = pl.col("verdict") == "chat_specific"
    specific = ranked.filter(is_specific).head(N_TOP_LATENTS)
    if specific.height >= FEW_SPECIFIC:
        return specific, specific.height
    leans_to_chat = (pl.col("delta_norm") >= CANDIDATE_DELTA_NORM) & pl.col("delta_norm").is_not_nan()
    others = ranked.filter(leans_to_chat & ~is_specific).head(N_TOP_LATENTS - specific.height)
    return pl.concat([specific, others]), specific.height


def _best_specific(behaviours: Sequence[BehaviourResult]) -> list[int]:
    """The latents of the specific pool that predict a behaviour best before the answer."""
    scores = [result.scores.get("chat_specific") for result in behaviours if result.question == "before_answer"]
    return [score.latent for score in scores if score is not None and score.latent is not None]


def _read_summary(folder: Path, latents: pl.DataFrame) -> Interpretation | None:
    """The interpretation of the crosscoder that is now in the folder, by its present verdicts; None if there is none."""
    path, rows = folder / SUMMARY_FILE, read_interpretation(folder)
    if not path.is_file() or not rows.height:
        return None
    found = Interpretation.read(path, "crossdiff interpret")
    if found.analysis == verdict_settings(folder):
        return found
    verdicts = latents.select(pl.col("latent").cast(pl.Int64), "verdict")
    return Interpretation.model_validate(summarise(verdicts.join(rows, on="latent"), found.seed))


def latent_of(row: Mapping[str, Any], database: ExampleDatabase, **most: int) -> Latent:
    """The record of one row of the latent table, with at most so many examples (see `ExampleDatabase.examples`)."""
    return Latent(
        latent=row["latent"],
        verdict=row["verdict"],
        verdict_reason=row["verdict_reason"],
        delta_norm=as_float(row["delta_norm"]),
        delta_norm_class=row["delta_norm_class"],
        decoder_cosine=as_float(row["decoder_cosine"]),
        frequency=as_float(row["frequency"]),
        n_active=row["n_active"],
        max_activation=as_float(row["max_activation"]),
        nu_error=estimate(row, "nu_error"),
        nu_reconstruction=estimate(row, "nu_reconstruction"),
        nu_reconstruction_nobias=estimate(row, "nu_reconstruction_nobias"),
        nu_activation=estimate(row, "nu_activation"),
        alone=estimate(row, _ALONE),
        rank_sum=as_float(row["rank_sum"]),
        shares={group: as_float(row[f"share_{group}"]) for group in TOKEN_GROUPS},
        examples=database.examples(row["latent"], **most),
        histogram=database.histogram(row["latent"]),
        explanation=_explanation(row),
        overlap=overlap_of(row),
    )


def _explanation(row: Mapping[str, Any]) -> str | None:
    """What a model says the latent responds to, and how well that predicts its activations."""
    if row["explanation"] is None:
        return None
    score = as_float(row["detection"])
    judged = "" if math.isnan(score) else f" (detection {score:.2f})"
    return f"{row['explainer']} says: {row['explanation']}{judged}"


def _with_causal(latents: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The latents with the effect of each alone, null where that was not measured."""
    columns = [f"{_ALONE}{end}" for end in ("", "_low", "_high")]
    if not path.is_file():
        return latents.with_columns(pl.lit(None, dtype=pl.Float64).alias(column) for column in columns)
    measured = (
        read_table(path, ("latent", *columns), "crossdiff causal").select("latent", *columns).unique("latent", keep="first")
    )
    return latents.join(measured, on="latent", how="left", maintain_order="left")


def _read_datasets(path: Path) -> tuple[DatasetShare, ...]:
    if not path.is_file():
        return ()
    documents = read_table(path, ("dataset", "split", "n_tokens"), "crossdiff harvest")
    shares = documents.group_by("dataset", "split").agg(pl.len().alias("n_documents"), pl.col("n_tokens").sum())
    rows = shares.sort("dataset", "split").select("dataset", "split", "n_documents", "n_tokens").rows()
    return tuple(DatasetShare(*row) for row in rows)


def _read_labels(path: Path) -> tuple[Label, ...]:
    """The labels of the texts by name; none if the store is of an earlier version, which keeps no prompts."""
    if not path.is_file():
        return ()
    documents = read_table(path, ("label",), "crossdiff harvest").filter(pl.col("label").is_not_null())
    if not {"prompt", "n_messages"} <= set(documents.columns):
        return ()
    turns = (pl.col("n_messages") + 1) // 2
    groups = documents.group_by("label").agg(
        pl.len().alias("n"), turns.min().alias("least"), turns.max().alias("most"), pl.col("prompt").drop_nulls().first()
    )
    return tuple(
        Label(
            row["label"],
            row["n"],
            f"{row['least']}" if row["least"] == row["most"] else f"{row['least']} to {row['most']}",
            shorten(row["prompt"] or "", PROMPT_CHARACTERS, placeholder=" \N{HORIZONTAL ELLIPSIS}"),
        )
        for row in groups.sort("label").iter_rows(named=True)
    )
