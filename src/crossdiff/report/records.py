"""What the page and the terminal summary are written from: typed, immutable records of one run directory.

Nothing here computes a measure: every figure comes from the files that the analysis wrote (`reading`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from pydantic import JsonValue, field_validator

from crossdiff.report.examples import Example
from crossdiff.report.interpretation import Interpretation
from crossdiff.report.record import Record

TOKEN_GROUPS = ("plain", "bos", "template", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the ends of its 95% interval; NaN where undefined."""

    value: float
    low: float = math.nan
    high: float = math.nan


class Massive(Record):
    """Tokens of massive activation norm, kept out of the other figures."""

    n_tokens: int = 0
    fve: Mapping[str, float | None] = {}


class HeldOut(Record):
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


class FrequencyHistogram(Record):
    """Latents by log10 of the share of tokens they are active on."""

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]


class Health(Record):
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


class NullRates(Record):
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
        estimate = Estimate(as_float(row["auroc"]), as_float(row["auroc_low"]), as_float(row["auroc_high"]))
        scores.setdefault((row["behaviour"], row["question"]), {})[row["pool"]] = PoolScore(
            row["pool"], row["pool_size"], row["latent"], estimate, row["n_positive"] or 0, row["n_negative"] or 0
        )
    return tuple(BehaviourResult(*key, by_pool) for key, by_pool in scores.items())


def as_float(found: object) -> float:
    """A float, with NaN for null."""
    return float(found) if isinstance(found, int | float) else math.nan


def _is_finite(found: object) -> bool:
    return isinstance(found, int | float) and math.isfinite(found)
