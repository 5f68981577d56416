"""One run directory, read into typed, immutable records that the page and the terminal summary are written from.

Nothing here computes a measure: every figure comes from the files that the analysis wrote.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, field_validator

from crossdiff.config import AnalyzeConfig, UserError, read_yaml, validate
from crossdiff.report.examples import Example, read_examples
from crossdiff.report.interpretation import Interpretation, read_explanations, read_summary
from crossdiff.run import read_json

N_TOP_LATENTS = 12
FEW_SPECIFIC = 5
"""With fewer chat-specific latents than this, the list is filled up with candidates that missed a condition."""
CANDIDATE_DELTA_NORM = 0.6

TOKEN_GROUPS = ("plain", "bos", "template", "user", "assistant")
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


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the ends of its 95% interval; NaN where undefined."""

    value: float
    low: float = math.nan
    high: float = math.nan


class _Record(BaseModel):
    """A JSON record of which later versions may hold more than is read here."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Massive(_Record):
    """Tokens of massive activation norm, kept out of the other figures."""

    n_tokens: int = 0
    fve: Mapping[str, float | None] = {}


class HeldOut(_Record):
    """Quality on held-out tokens. `fve` has a key per source and `total`, `fve_interval` those with an interval."""

    n_tokens: int
    fve: Mapping[str, float | None]
    fve_interval: Mapping[str, tuple[float, float]] = {}
    l0: float
    n_dead: int
    dead_share: float
    massive: Massive | None = None

    @field_validator("fve_interval", mode="before")
    @classmethod
    def _pairs_only(cls, found: object) -> dict[str, tuple[float, float]]:
        """Accept `[low, high]` and `{"low":, "high":}`; a source without a finite interval has none."""
        pairs = {}
        for source, ends in (found if isinstance(found, dict) else {}).items():
            values = [ends.get("low"), ends.get("high")] if isinstance(ends, dict) else ends
            if isinstance(values, list) and len(values) == 2 and all(_is_finite(value) for value in values):
                pairs[source] = (float(values[0]), float(values[1]))
        return pairs


@dataclass(frozen=True, slots=True)
class Limits:
    """What the run asked of a chat-specific latent: both nu below, delta_norm at least."""

    nu_error: float
    nu_reconstruction: float
    delta_norm: float


class FrequencyHistogram(_Record):
    """Latents by log10 of the share of tokens they are active on."""

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]


class Health(_Record):
    """health.json of one crosscoder."""

    n_latents: int
    d_model: int
    layer: int
    architecture: str
    sources: tuple[str, ...] = ("base", "chat")
    k: int | None = None
    training_tokens: int | None = None
    analysed_tokens: int | None = None
    heldout: HeldOut
    frequency_histogram: FrequencyHistogram | None = None
    decoder_norm_movement: Mapping[str, JsonValue] = {}
    counts: Mapping[str, int] = {}
    controls: Mapping[str, JsonValue] = {}
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Latent:
    """One row of the latent table with the examples read for it. Activations are v (f times the decoder norms).

    alone: what it takes off the KL to the chat model when patched alone (`crossdiff causal`), in nats.
    """

    latent: int
    verdict: str
    verdict_reason: str
    delta_norm: float
    delta_norm_class: str
    decoder_cosine: float
    frequency: float
    n_active: int
    max_activation: float
    nu_error: Estimate
    nu_reconstruction: Estimate
    nu_activation: Estimate
    alone: Estimate
    rank_sum: float
    shares: Mapping[str, float]
    examples: tuple[Example, ...]
    explanation: str | None = None


@dataclass(frozen=True, slots=True)
class TopLatents:
    """The latents shown in full: the first `n_specific` have the verdict chat_specific, the others are candidates."""

    latents: tuple[Latent, ...]
    n_specific: int


@dataclass(frozen=True, slots=True)
class PoolScore:
    """How well the best member of one pool predicts a behaviour on held-out conversations."""

    pool: str
    pool_size: int | None
    latent: int | None
    auroc: Estimate
    n_positive: int
    n_negative: int


@dataclass(frozen=True, slots=True)
class BehaviourResult:
    """One behaviour under one question, with a score per pool."""

    behaviour: str
    question: str
    scores: Mapping[str, PoolScore]


@dataclass(frozen=True, slots=True)
class CrosscoderReport:
    """What one crosscoder's folder holds. `behaviour_latents` are the best specific ones not already in `top`."""

    name: str
    health: Health
    latents: pl.DataFrame
    behaviours: pl.DataFrame | None
    top: TopLatents
    behaviour_latents: tuple[Latent, ...]
    interpretation: Interpretation | None = None

    @property
    def title(self) -> str:
        """The architecture in its usual spelling, with the folder's name where that says something else."""
        usual = {"l1": "L1", "batchtopk": "BatchTopK", "topk": "TopK", "jumprelu": "JumpReLU"}
        spelling = usual.get(self.health.architecture, self.health.architecture)
        return spelling if self.name == self.health.architecture else f"{spelling} ({self.name})"

    @property
    def compares(self) -> bool:
        """Whether its latents have a direction in both models; those of an SAE or a diff-SAE have one decoder."""
        return len(self.health.sources) > 1

    def count(self, key: str) -> int:
        """Number of latents: a delta_norm class, a verdict, or a set (chat_specific, chat_specific_paper, template_only).

        health.json's own count is taken where it has one, so that the page agrees with the file.
        """
        if key in self.health.counts:
            return self.health.counts[key]
        if key in ("chat_specific", "chat_specific_paper", "template_only"):
            return int(self.latents[key].sum())
        column = "delta_norm_class" if key in ("base_only", "chat_only", "shared", "other") else "verdict"
        return self.latents.filter(pl.col(column) == key).height

    def rate(self, key: str) -> float:
        """Share of the live latents in a set or verdict; NaN without a live one."""
        live = self.latents.filter(pl.col("verdict") != "dead").height
        return self.count(key) / live if live else math.nan

    def behaviour_results(self) -> tuple[BehaviourResult, ...]:
        """The behaviours table, a record per behaviour and question, in the file's order."""
        return behaviour_results(self.behaviours)


@dataclass(frozen=True, slots=True)
class DatasetShare:
    """Documents and tokens of one dataset in one split."""

    dataset: str
    split: str
    n_documents: int
    n_tokens: int


class NullRates(_Record):
    """What the null diff gave for one crosscoder: live latents, and their share in each verdict and set."""

    n_live: int
    rates: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunReport:
    """A whole run. `not_analysed` names crosscoders that are trained but have no latent table yet; `null` are the rates of
    the null diff, by crosscoder."""

    directory: Path
    base: str | None
    chat: str | None
    layer: int | None
    n_tokens: int | None
    datasets: tuple[DatasetShare, ...]
    limits: Limits
    crosscoders: tuple[CrosscoderReport, ...]
    not_analysed: tuple[str, ...]
    null: Mapping[str, NullRates]

    @property
    def primary(self) -> CrosscoderReport:
        """The crosscoder that the answer is about: BatchTopK, whose loss lacks L1's artifacts, or else the first."""
        comparing = [coder for coder in self.crosscoders if coder.compares] or list(self.crosscoders)
        return next((coder for coder in comparing if coder.health.architecture == "batchtopk"), comparing[0])


def behaviour_results(behaviours: pl.DataFrame | None) -> tuple[BehaviourResult, ...]:
    """A record per behaviour and question of a behaviours table, in its order."""
    scores: dict[tuple[str, str], dict[str, PoolScore]] = {}
    for row in () if behaviours is None else behaviours.iter_rows(named=True):
        estimate = Estimate(_number(row["auroc"]), _number(row["auroc_low"]), _number(row["auroc_high"]))
        scores.setdefault((row["behaviour"], row["question"]), {})[row["pool"]] = PoolScore(
            row["pool"], row["pool_size"], row["latent"], estimate, row["n_positive"] or 0, row["n_negative"] or 0
        )
    return tuple(BehaviourResult(*key, by_pool) for key, by_pool in scores.items())


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
    return latent_of(row, examples[latent], read_explanations(folder).get(latent))


def read_latents(folder: Path) -> pl.DataFrame:
    """The latent table of a crosscoder's folder, joined with what single latents do where the causal test measured it.

    Raises:
        UserError: it is damaged or of another version.
    """
    return _with_causal(_read_table(folder / "latents.parquet", _LATENT_COLUMNS), folder / "causal_latents.parquet")


def read_behaviours(folder: Path) -> pl.DataFrame | None:
    """The behaviour table of a crosscoder's folder, where it has one; raises as `read_latents`."""
    path = folder / "behaviours.parquet"
    return _read_table(path, _BEHAVIOUR_COLUMNS) if path.is_file() else None


def _read_crosscoder(folder: Path) -> CrosscoderReport:
    health_path = folder / "health.json"
    try:
        health = Health.model_validate(_read_record(health_path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{health_path}: {key}: {first['msg']}; run `crossdiff analyze` again") from error
    latents, behaviours = read_latents(folder), read_behaviours(folder)
    top_rows, n_specific = _top_rows(latents)
    shown = top_rows["latent"].to_list()
    behaviour_rows = latents.filter(pl.col("latent").is_in(_best_specific(behaviours))).filter(~pl.col("latent").is_in(shown))
    wanted = pl.concat([top_rows, behaviour_rows])
    examples = read_examples(folder / "examples.sqlite", wanted["latent"].to_list())
    explanations = read_explanations(folder)
    cards = tuple(
        latent_of(row, examples.get(row["latent"], ()), explanations.get(row["latent"])) for row in wanted.iter_rows(named=True)
    )
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


def latent_of(row: Mapping[str, Any], examples: tuple[Example, ...], explanation: str | None = None) -> Latent:
    """The record of one row of the latent table."""

    def estimate(nu: str) -> Estimate:
        return Estimate(_number(row[nu]), _number(row[f"{nu}_low"]), _number(row[f"{nu}_high"]))

    return Latent(
        latent=row["latent"],
        verdict=row["verdict"],
        verdict_reason=row["verdict_reason"],
        delta_norm=_number(row["delta_norm"]),
        delta_norm_class=row["delta_norm_class"],
        decoder_cosine=_number(row["decoder_cosine"]),
        frequency=_number(row["frequency"]),
        n_active=row["n_active"],
        max_activation=_number(row["max_activation"]),
        nu_error=estimate("nu_error"),
        nu_reconstruction=estimate("nu_reconstruction"),
        nu_activation=estimate("nu_activation"),
        alone=estimate(_ALONE),
        rank_sum=_number(row["rank_sum"]),
        shares={group: _number(row[f"share_{group}"]) for group in TOKEN_GROUPS},
        examples=examples,
        explanation=explanation,
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


def _number(found: object) -> float:
    """A float, with NaN for null."""
    return float(found) if isinstance(found, int | float) else math.nan


def _is_finite(found: object) -> bool:
    return isinstance(found, int | float) and math.isfinite(found)
