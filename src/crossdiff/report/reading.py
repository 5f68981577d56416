"""Reads one run directory into the records of `model`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ValidationError

from crossdiff.config import AnalyzeConfig, read_yaml, validate
from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.interp.explanation_table import with_interpretation
from crossdiff.report.examples import Example, read_examples
from crossdiff.report.interpretation import explained, read_summary
from crossdiff.report.records import (
    TOKEN_GROUPS,
    CrosscoderReport,
    DatasetShare,
    Estimate,
    Health,
    Latent,
    Limits,
    NullRates,
    RunReport,
    TopLatents,
    as_float,
)

N_TOP_LATENTS = 12
FEW_SPECIFIC = 5
"""With fewer chat-specific latents than this, the list is filled up with candidates that missed a condition."""
CANDIDATE_DELTA_NORM = 0.6

_NUS = ("nu_error", "nu_reconstruction", "nu_activation")
_LATENT_COLUMNS = (
    "latent", "n_active", "frequency", "mean_activation", "max_activation", "norm_base", "norm_chat", "delta_norm",
    "delta_norm_class", "decoder_cosine", *(f"{nu}{end}" for nu in _NUS for end in ("", "_low", "_high")),
    "rank_sum", "verdict", "verdict_reason", "chat_specific", "chat_specific_paper", "template_only",
    *(f"share_{group}" for group in TOKEN_GROUPS),
)  # fmt: skip
_ALONE = "kl_reduction_response"
_BEHAVIOUR_COLUMNS = (
    "behaviour", "question", "pool", "pool_size", "latent", "auroc", "auroc_low", "auroc_high", "n_positive",
    "n_negative",
)  # fmt: skip


def read_run(directory: Path, names: Sequence[str] | None = None) -> RunReport:
    """Read a run directory; `names` gives its crosscoder folders and their order, by default all analysed ones.

    Raises UserError when the directory or a file in it is missing, damaged or of another format.
    """
    if not directory.is_dir():
        raise UserError(f"no run directory at {directory}: run `crossdiff run` first, or give the path of a run")
    analysed, waiting = _crosscoder_folders(directory, names)
    if not analysed:
        raise UserError(f"{directory} has no crosscoder folder with a latents.parquet: run `crossdiff analyze`")
    crosscoders = tuple(_read_crosscoder(directory / name) for name in analysed)
    manifest_path = directory / "activations" / "manifest.json"
    manifest = _read_record(manifest_path) if manifest_path.is_file() else {}
    pair = manifest.get("pair")
    sources = pair if isinstance(pair, dict) else {}
    return RunReport(
        directory=directory,
        base=_model_name(sources.get("base")),
        chat=_model_name(sources.get("chat")),
        layer=_whole(manifest.get("layer")) if "layer" in manifest else crosscoders[0].health.layer,
        n_tokens=_whole(manifest.get("n_tokens")),
        limits=_read_limits(directory / "config.yaml"),
        datasets=_read_datasets(directory / "activations" / "documents.parquet"),
        crosscoders=crosscoders,
        not_analysed=waiting,
        null=_read_null(directory / "null.json"),
    )


def _crosscoder_folders(directory: Path, names: Sequence[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """Folders with a latent table, and those that have only a crosscoder."""
    if names is None:
        folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
        preferred = ("l1", "batchtopk")
        names = [n for n in preferred if n in folders] + [n for n in folders if n not in preferred]
    analysed = [name for name in names if (directory / name / "latents.parquet").is_file()]
    trained = [name for name in names if (directory / name / "model.safetensors").is_file()]
    return analysed, tuple(name for name in trained if name not in analysed)


def read_latent(folder: Path, latents: pl.DataFrame, latent: int) -> Latent:
    """One latent of a crosscoder's folder, with its examples.

    Raises:
        UserError: there is no such latent, or the folder has no examples.
    """
    examples = read_examples(folder / "examples.sqlite", [latent])
    row = latents.row(by_predicate=pl.col("latent") == latent, named=True)
    return latent_of(row, examples[latent])


def read_latents(folder: Path) -> pl.DataFrame:
    """The latent table of a crosscoder's folder, joined with what single latents do where the causal test measured it, and
    with the explanations and scores of `crossdiff interpret`; null where there is none.

    Raises:
        UserError: a file is damaged or of another version.
    """
    latents = _read_table(folder / "latents.parquet", _LATENT_COLUMNS)
    return with_interpretation(_with_causal(latents, folder / "causal_latents.parquet"), folder)


def read_behaviours(folder: Path) -> pl.DataFrame | None:
    """The behaviour table of a crosscoder's folder, where it has one; raises as `read_latents`."""
    path = folder / "behaviours.parquet"
    return _read_table(path, _BEHAVIOUR_COLUMNS) if path.is_file() else None


def _read_crosscoder(folder: Path) -> CrosscoderReport:
    health = Health.read(folder / "health.json", "crossdiff analyze")
    latents, behaviours = read_latents(folder), read_behaviours(folder)
    top_rows, n_specific = _top_rows(latents)
    shown = top_rows["latent"].to_list()
    behaviour_rows = latents.filter(pl.col("latent").is_in(_best_specific(behaviours))).filter(~pl.col("latent").is_in(shown))
    wanted = pl.concat([top_rows, behaviour_rows])
    examples = read_examples(folder / "examples.sqlite", wanted["latent"].to_list())
    cards = tuple(latent_of(row, examples.get(row["latent"], ())) for row in wanted.iter_rows(named=True))
    top = TopLatents(cards[: len(shown)], n_specific)
    return CrosscoderReport(folder.name, health, latents, behaviours, top, cards[len(shown) :], read_summary(folder))


def _top_rows(latents: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """The most chat-specific rows by rank_sum and how many of them have the verdict chat_specific."""
    ranked = latents.filter(pl.col("rank_sum").is_not_null() & pl.col("rank_sum").is_not_nan()).sort("rank_sum", "latent")
    is_specific = pl.col("verdict") == "chat_specific"
    specific = ranked.filter(is_specific).head(N_TOP_LATENTS)
    if specific.height >= FEW_SPECIFIC:
        return specific, specific.height
    leans_to_chat = (pl.col("delta_norm") >= CANDIDATE_DELTA_NORM) & pl.col("delta_norm").is_not_nan()
    others = ranked.filter(leans_to_chat & ~is_specific).head(N_TOP_LATENTS - specific.height)
    return pl.concat([specific, others]), specific.height


def _best_specific(behaviours: pl.DataFrame | None) -> list[int]:
    """The latents of the specific pool that predict a behaviour best before the answer."""
    if behaviours is None:
        return []
    rows = behaviours.filter((pl.col("pool") == "chat_specific") & (pl.col("question") == "before_answer"))
    return [int(latent) for latent in rows["latent"].drop_nulls().unique(maintain_order=True)]


def latent_of(row: Mapping[str, Any], examples: tuple[Example, ...]) -> Latent:
    """The record of one row of the latent table."""

    def estimate(nu: str) -> Estimate:
        return Estimate(as_float(row[nu]), as_float(row[f"{nu}_low"]), as_float(row[f"{nu}_high"]))

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
        nu_error=estimate("nu_error"),
        nu_reconstruction=estimate("nu_reconstruction"),
        nu_activation=estimate("nu_activation"),
        alone=estimate(_ALONE),
        rank_sum=as_float(row["rank_sum"]),
        shares={group: as_float(row[f"share_{group}"]) for group in TOKEN_GROUPS},
        examples=examples,
        explanation=explained(row),
    )


def _read_record(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, expected an object; run its stage again")
    return found


def _read_table(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}): run its stage again") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}: run its stage again with this version")
    return table


def _with_causal(latents: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The latents with what each does alone, null where that was not measured."""
    columns = [f"{_ALONE}{end}" for end in ("", "_low", "_high")]
    if not path.is_file():
        return latents.with_columns(pl.lit(None, dtype=pl.Float64).alias(column) for column in columns)
    measured = _read_table(path, ("latent", *columns)).select("latent", *columns).unique("latent", keep="first")
    return latents.join(measured, on="latent", how="left", maintain_order="left")


def _read_limits(path: Path) -> Limits:
    """The thresholds of the run's settings; a run directory without settings was made with the defaults."""
    found = read_yaml(path).get("analyze") if path.is_file() else None
    settings = validate(AnalyzeConfig, found or {}, str(path))
    return Limits(settings.nu_error, settings.nu_reconstruction, settings.delta_norm)


def _read_null(path: Path) -> dict[str, NullRates]:
    """What `crossdiff null` left, if anything."""
    if not path.is_file():
        return {}
    try:
        return {name: NullRates.model_validate(part) for name, part in _read_record(path)["crosscoders"].items()}
    except (ValidationError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged or of another version ({error}); run `crossdiff null` again") from error


def _read_datasets(path: Path) -> tuple[DatasetShare, ...]:
    if not path.is_file():
        return ()
    documents = _read_table(path, ("dataset", "split", "n_tokens"))
    shares = documents.group_by("dataset", "split").agg(pl.len().alias("n_documents"), pl.col("n_tokens").sum())
    rows = shares.sort("dataset", "split").select("dataset", "split", "n_documents", "n_tokens").rows()
    return tuple(DatasetShare(*row) for row in rows)


def _model_name(found: object) -> str | None:
    """A model is written as its name, or as a record with its name among other facts."""
    if isinstance(found, dict):
        found = next((found[key] for key in ("name", "id", "model", "path") if key in found), None)
    return found if isinstance(found, str) else None


def _whole(found: object) -> int | None:
    return found if isinstance(found, int) and not isinstance(found, bool) else None
