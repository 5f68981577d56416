"""Typed, immutable records of one run directory: everything that the page and the terminal summary are written from.

Nothing here computes a measure. Every number comes from the files that the stages wrote; `reading` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

import polars as pl
from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, ValidationError

from crossdiff.config import default_crosscoder
from crossdiff.errors import UserError
from crossdiff.files import number, read_json
from crossdiff.integrity import intact
from crossdiff.latents.settings import verdict_settings
from crossdiff.report.examples import Example, Histogram
from crossdiff.statistics import Estimate

TOKEN_GROUPS = ("plain", "bos", "template", "user", "assistant")

if TYPE_CHECKING:
    from crossdiff.look.reading import LookResults
    from crossdiff.report.concept_records import RunConcepts

SAME = 0.5
"""Size of a cosine or a correlation from which a direction of the first look says the same as a latent or concept."""
R = TypeVar("R", bound="Record")
Number = Annotated[float, BeforeValidator(number)]
"""A number that is NaN where the file has null."""


class Record(BaseModel):
    """A JSON file of another stage. Keys that are not declared are ignored, so that later versions may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def read(cls: type[R], path: Path, command: str) -> R:
        """Read the record from a file that `command` writes."""
        try:
            return cls.model_validate(read_json(intact(path)))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the file"
            raise UserError(f"{path}: {key}: {first['msg']}; run `{command}` again") from error


class Massive(Record):
    """Tokens of massive activation norm, which the other held-out numbers exclude. Their FVE needs at least two of them."""

    n_tokens: int
    fve: Mapping[str, Number] = {}


class HeldOut(Record):
    """Quality on held-out tokens. `fve` and its 95% interval have a key per source and `total`."""

    n_tokens: int
    fve: Mapping[str, Number]
    fve_interval: Mapping[str, tuple[Number, Number]]
    l0: Number
    n_dead: int
    dead_share: Number
    massive: Massive


class FrequencyHistogram(Record):
    """Number of latents by log10 of the share of tokens on which they are active."""

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]


class Health(Record):
    """health.json of one crosscoder. `counts` has the latents of each delta_norm class, set and verdict."""

    n_latents: int
    d_model: int
    layer: int
    architecture: str
    sources: tuple[str, ...]
    k: int | None
    training_tokens: int | None
    analysed_tokens: int
    heldout: HeldOut
    frequency_histogram: FrequencyHistogram
    decoder_norm_movement: Mapping[str, JsonValue]
    counts: Mapping[str, int]
    controls: Mapping[str, JsonValue]


class ScoreSummary(Record):
    """One interpretability score over the latents of a verdict; `low` and `high` are the ends of the mean's 95% interval."""

    score: str
    verdict: str
    n: int
    mean: Number
    quartiles: tuple[Number, Number, Number, Number, Number]
    low: float | None = None
    high: float | None = None


class Difference(Record):
    """Mean score of the chat-specific latents minus that of the shared ones."""

    score: str
    value: Number
    low: Number
    high: Number


class Interpretation(Record):
    """interpretation.json of one crosscoder.

    seed: of the bootstrap. analysis: what the verdicts depend on (`verdict_settings`); None in files of earlier versions.
    """

    n_latents: int
    n_incomplete: int
    models: tuple[str, ...]
    scores: tuple[ScoreSummary, ...]
    differences: tuple[Difference, ...]
    seed: int = 0
    analysis: Mapping[str, JsonValue] | None = None


class NullRates(Record):
    """Result of the null diff for one crosscoder: number of live latents, and their share in each verdict and set.

    analysis: what the verdicts of both runs depend on (`verdict_settings`); None in files of earlier versions.
    """

    n_live: int
    rates: Mapping[str, Number]
    analysis: Mapping[str, JsonValue] | None = None


class NullDiff(Record):
    """null.json, by crosscoder."""

    crosscoders: Mapping[str, NullRates] = {}

    @classmethod
    def of_run(cls, directory: Path) -> NullDiff:
        """The null diff of a run directory; empty if there is none."""
        path = directory / "null.json"
        return cls.read(path, "crossdiff null") if path.is_file() else cls()

    def split(self, directory: Path) -> tuple[dict[str, NullRates], tuple[str, ...]]:
        """The rates that belong to the present verdicts of a run, and the crosscoders that were analysed otherwise since."""
        outdated = tuple(
            name for name, rates in self.crosscoders.items() if rates.analysis != verdict_settings(directory / name)
        )
        return {name: rates for name, rates in self.crosscoders.items() if name not in outdated}, outdated


class Model(Record):
    """A model of the pair."""

    name: str
    digest: str | None = None


class TextsRecord(Record):
    """What a harvest read of one dataset: the assistant's tokens in the store, and those beyond max_length."""

    name: str
    n_assistant: int = 0
    assistant_lost: int = 0

    @property
    def lost_share(self) -> float:
        """Share of the assistant's tokens beyond max_length; 0 if the dataset has none."""
        return self.assistant_lost / max(1, self.n_assistant + self.assistant_lost)


class MassiveTokens(Record):
    """The tokens of a store that are left out because their norm is more than `multiple` times the median.

    most_often: tokens with their numbers.
    """

    multiple: float = 0.0
    n_tokens: int = 0
    most_often: tuple[tuple[str, int], ...] = ()


class StoreManifest(Record):
    """manifest.json of the activation store. `pair` also holds the digest of the tokenizer, which is not read here."""

    pair: Mapping[str, Model | str] | None = None
    n_tokens: int | None = None
    texts: tuple[TextsRecord, ...] = ()
    sources_equal: bool = False
    massive: MassiveTokens = MassiveTokens()

    def model(self, source: str) -> str | None:
        """Name of a source's model."""
        found = (self.pair or {}).get(source)
        return found.name if isinstance(found, Model) else None

    @property
    def same_model(self) -> bool:
        """Whether both sources are one model, by their files or by their activations."""
        digests = [found.digest for found in (self.pair or {}).values() if isinstance(found, Model)]
        return self.sources_equal or (len(digests) == 2 and None not in digests and digests[0] == digests[1])


@dataclass(frozen=True, slots=True)
class Limits:
    """The conditions for a chat-specific latent: both nu below these values, delta_norm at least this."""

    nu_error: float
    nu_reconstruction: float
    delta_norm: float


class Overlap(NamedTuple):
    """The directions of the first look that are nearest to a latent or concept, see `look.reading.OVERLAP_COLUMNS`.

    All fields are NaN or None in a run without a look.
    """

    cosine: float
    cosine_direction: str | None
    correlation: float
    correlation_direction: str | None

    @property
    def points(self) -> bool:
        """Whether a direction points the same way, or the opposite one."""
        return abs(self.cosine) >= SAME

    @property
    def moves(self) -> bool:
        """Whether the difference along a direction rises and falls with the activation, or against it."""
        return abs(self.correlation) >= SAME


@dataclass(frozen=True, slots=True)
class Latent:
    """One row of the latent table with the examples read for it. Activations are v (f times the sum of the decoder norms).

    alone: nats by which the latent reduces the KL to the chat model when patched alone (`crossdiff causal`).
    histogram: of its activations; None if it is never active, or if an older analysis has stored none.
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
    nu_error: Estimate[float]
    nu_reconstruction: Estimate[float]
    nu_reconstruction_nobias: Estimate[float]
    nu_activation: Estimate[float]
    alone: Estimate[float]
    rank_sum: float
    shares: Mapping[str, float]
    examples: tuple[Example, ...]
    overlap: Overlap
    explanation: str | None = None
    histogram: Histogram | None = None


@dataclass(frozen=True, slots=True)
class TopLatents:
    """The latents shown in full: the first `n_specific` have the verdict chat_specific, the others are candidates."""

    latents: tuple[Latent, ...]
    n_specific: int


@dataclass(frozen=True, slots=True)
class PoolScore:
    """How well the best latent of one pool predicts a behaviour on held-out conversations."""

    pool: str
    pool_size: int | None
    latent: int | None
    auroc: Estimate[float]
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
    """The contents of one crosscoder's folder. `limits` are those that its verdicts were made with; `behaviour_latents` are the
    best specific latents that are not in `top`."""

    name: str
    health: Health
    limits: Limits
    latents: pl.DataFrame
    behaviours: tuple[BehaviourResult, ...]
    top: TopLatents
    behaviour_latents: tuple[Latent, ...]
    interpretation: Interpretation | None = None

    @property
    def title(self) -> str:
        """The architecture in its usual spelling, followed by the folder's name unless that is the same."""
        usual = {"l1": "L1", "batchtopk": "BatchTopK", "topk": "TopK", "jumprelu": "JumpReLU"}
        spelling = usual.get(self.health.architecture, self.health.architecture)
        return spelling if self.name == self.health.architecture else f"{spelling} ({self.name})"

    @property
    def inputs(self) -> str:
        """What it reads: the kind `paired` of the settings, or `single` for a coder with one decoder."""
        return "paired" if self.compares else "single"

    @property
    def compares(self) -> bool:
        """Whether its latents have a direction in both models; those of an SAE or a diff-SAE have one decoder."""
        return len(self.health.sources) > 1

    def count(self, key: str) -> int:
        """Number of latents of a delta_norm class, a set or a verdict, as health.json counts them."""
        return self.health.counts[key]

    def rate(self, key: str) -> float:
        """Share of the live latents in a set or verdict; NaN if no latent is live."""
        live = self.latents.height - self.count("dead")
        return self.count(key) / live if live else math.nan


@dataclass(frozen=True, slots=True)
class DatasetShare:
    """Documents and tokens of one dataset in one split."""

    dataset: str
    split: str
    n_documents: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Label:
    """A label of the texts: how many conversations have it, how many user turns those have, and the prompt of one."""

    name: str
    n_documents: int
    turns: str
    prompt: str


@dataclass(frozen=True, slots=True)
class RunReport:
    """A whole run.

    Attributes:
        not_analysed: crosscoders that are trained but have no latent table yet.
        null: the rates of the null diff by crosscoder.
        null_outdated: crosscoders whose null diff was made with other limits or nus of the verdicts, and is not shown.
        concepts: None if the run has none yet.
        look: the first look; None if the run has none.
        same_model: base and chat are one model.
        massive: the tokens of massive norm that were left out; None if nothing is known of them.
        titles: what the models are called, by source, in the order of the training.
    """

    directory: Path
    base: str | None
    chat: str | None
    layer: int
    n_tokens: int | None
    datasets: tuple[DatasetShare, ...]
    crosscoders: tuple[CrosscoderReport, ...]
    not_analysed: tuple[str, ...]
    null: Mapping[str, NullRates]
    concepts: RunConcepts | None = None
    texts: tuple[TextsRecord, ...] = ()
    same_model: bool = False
    massive: MassiveTokens | None = None
    null_outdated: tuple[str, ...] = ()
    look: LookResults | None = None
    titles: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[Label, ...] = ()

    @property
    def primary(self) -> CrosscoderReport:
        """The crosscoder that the page's answer is about, see `default_crosscoder`."""
        kinds = {coder.name: (coder.health.architecture, coder.inputs) for coder in self.crosscoders}
        name = default_crosscoder(kinds)
        return next(coder for coder in self.crosscoders if coder.name == name)
