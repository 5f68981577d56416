"""Settings of a run, and of the stages after the training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from crossdiff.config.base import Config, Seed
from crossdiff.config.crosscoder_config import (
    DEFAULT_SEEDS,
    BatchTopKConfig,
    CrosscoderConfig,
    L1Config,
)
from crossdiff.config.harvest_config import DatasetConfig, HarvestConfig, _dataset_from_text
from crossdiff.config.look_config import LookConfig
from crossdiff.sources import BASE, CHAT, SOURCES


class AnalyzeConfig(Config):
    """Latent scaling, examples and behaviours."""

    batch_tokens: int = Field(4096, ge=1, description="tokens per step of the pass")
    blocks: int = Field(20, ge=2, description="blocks of documents of the jackknife")
    nu_error: float = Field(0.2, gt=0, description="chat-specific: nu_error below this")
    nu_reconstruction: float = Field(0.5, gt=0, description="chat-specific: nu_reconstruction (without bias) below this")
    delta_norm: float = Field(0.75, ge=0.5, le=1, description="chat-specific: delta_norm at least this")
    rotated_cosine: float = Field(0.5, ge=-1, le=1, description="rotated: cosine of the two decoder directions below this")
    template_share: float = Field(
        0.9, gt=0, le=1, description="template_only: share of active tokens on template tokens at least this"
    )
    twin_cosine: float = Field(0.9, ge=0, le=1, description="twins: cosine of chat and base direction above this")
    min_active: int = Field(100, ge=1, description="a latent with fewer active tokens is undecided")
    examples: int = Field(12, ge=1, description="highest-activating examples kept per latent")
    examples_per_quantile: int = Field(3, ge=0, description="examples kept per activation quantile")
    pool_size: int = Field(100, ge=1, description="latents in each pool of the behaviour comparison")
    seed: Seed = 0


class ConceptsConfig(Config):
    """How latents of several trainings are grouped into concepts."""

    correlation: float = Field(
        0.6, gt=0, lt=1, description="latents whose activations correlate at least this much, on average, are one concept"
    )
    replicated: float = Field(
        2 / 3, gt=0, le=1, description="a concept replicates if at least this share of the trainings has a latent of it"
    )


class CompareConfig(Config):
    """The comparison of crosscoders, for which the models run on the reconstructions."""

    max_tokens: int = Field(50_000, ge=1000, description="held-out tokens that the models are run on")
    batch_tokens: int = Field(4096, ge=1, description="tokens per forward pass")


class CausalConfig(Config):
    """The causal test: which conversations are patched, and how the numbers are computed."""

    interventions: str | None = Field(None, description="YAML file of interventions; default: the list in the package")
    between: tuple[str, str] = Field(
        SOURCES,
        description="the model that is patched and the one that it is to become: of a chain, any two",
        exclude_if=lambda value: value == SOURCES,  # results from before this setting existed keep their fingerprint
    )
    split: Literal["heldout", "train"] = Field("heldout", description="split of the conversations")
    max_conversations: int | None = Field(256, ge=2, description="conversations, chosen by content hash; null for all")
    pool: int | None = Field(None, ge=2, description="number of latents that are ranked against each other; default: 5% of all")
    batch_tokens: int = Field(4096, ge=1, description="padded tokens per forward pass")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples of the conversations")
    seed: Seed = 0


class SteerConfig(Config):
    """Steering with one latent: a few prompts side by side, or a table over the labelled prompts."""

    crosscoder: str | None = Field(
        None, description="the latent's crosscoder; default: the first BatchTopK one that reads both models"
    )
    latent: int | None = Field(None, description="number of the latent")
    mode: Literal["add", "ablate"] = Field("add", description="add the chat direction, or remove the latent's contribution")
    strength: tuple[float, ...] = Field(
        (1.0,), min_length=1, description="in units of the latent's mean contribution where it is active"
    )
    model: str = Field("chat", description="the model that is steered: chat, base, or one between them by its name")
    tokens: Literal["all", "prompt", "template", "generated"] = Field("all", description="tokens that are edited")
    prompt: tuple[str, ...] = Field((), description="questions to ask; default: the labelled prompts of the run")
    labels: tuple[str, ...] = Field((), description="labels of the prompts to ask; default: all")
    prompts_per_label: int = Field(100, ge=1, description="labelled prompts of each kind, chosen by content hash")
    split: Literal["heldout", "train"] = Field("heldout", description="split of the labelled prompts")
    controls: int = Field(
        3, ge=0, description="control latents of similar frequency and norm to compare with, on labelled prompts"
    )
    rules: str | None = Field(None, description="YAML file of behaviours; default: those of the embedded pair")
    max_new_tokens: int = Field(60, ge=1, description="longest answer")
    temperature: float = Field(0.0, ge=0, description="0 always takes the likeliest token")
    seed: Seed = 0


MAX_MODELS = 8
TAKEN = {"activations", "concepts", "interpretation", "look", "old", "tensorboard", "work"}
"""Folders of a run that do not hold a crosscoder."""


class RunConfig(Config):
    """A complete diff: two models, a layer, texts, and the crosscoders to train.

    Examples:
        >>> config = crossdiff.RunConfig(base="org/base", chat="org/chat", dataset=["texts.jsonl"])
        >>> config.dataset[0].title, list(config.crosscoders)
        ('texts', ['l1', 'batchtopk'])
    """

    base: str = Field("demo:base", description="Hub name or folder of the base model")
    chat: str = Field("demo:chat", description="Hub name or folder of the model fine-tuned from it")
    models: dict[str, str] = Field(
        {},
        description="instead of base and chat: two to eight models by name, in the order of the training, as in base=ORG/BASE "
        "sft=ORG/SFT dpo=ORG/DPO; the first is the base model and the last the chat model",
        exclude_if=lambda value: not value,
    )
    layer: int | None = Field(None, ge=0, description="decoder layer after which activations are taken; default: the middle")
    dataset: tuple[Annotated[DatasetConfig, BeforeValidator(_dataset_from_text)], ...] = Field(
        (), description="texts: paths, Hub names, or mappings with the keys of a dataset"
    )
    device: str = Field("auto", description="auto, cpu, or a torch device name")
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype that both models run in; auto: float32 on the CPU, elsewhere that of the two models' files, or "
        "bfloat16 if theirs differ",
        exclude_if=lambda value: value == "auto",  # stores from before this setting existed keep their fingerprint
    )
    latent_ranks: int | None = Field(
        None,
        ge=1,
        description="under torchrun: number of processes over which the latents are split in training; the batch is split over "
        "the rest; default: all",
    )
    look: LookConfig = LookConfig()
    harvest: HarvestConfig = HarvestConfig()
    crosscoders: dict[str, CrosscoderConfig] = Field(
        {
            "l1": CrosscoderConfig(sparsity=L1Config(), decoder_norm=0.1),
            "batchtopk": CrosscoderConfig(sparsity=BatchTopKConfig()),
        },
        description="the crosscoders to train, or to read if they are published, each into its own folder",
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        ("tensorboard",), description="where the metrics of a training go besides train.jsonl"
    )
    analyze: AnalyzeConfig = AnalyzeConfig()
    concepts: ConceptsConfig = ConceptsConfig()
    compare: CompareConfig = CompareConfig()
    causal: CausalConfig = CausalConfig()

    def seeds_of(self, name: str) -> tuple[str, ...]:
        """The trainings of a crosscoder: itself, and its repetitions `NAME-seed1` and so on."""
        seeds = self.crosscoders[name].seeds
        if seeds is None:
            is_first = name == next((key for key, coder in self.crosscoders.items() if coder.is_repeated), None)
            seeds = DEFAULT_SEEDS if is_first and f"{name}-seed1" not in self.crosscoders else 1
        return (name, *(f"{name}-seed{number}" for number in range(1, seeds)))

    @property
    def trainings(self) -> dict[str, CrosscoderConfig]:
        """All trainings of the run: the crosscoders, each followed by its repetitions with other seeds."""
        found = {}
        for name, coder in self.crosscoders.items():
            for number, training in enumerate(self.seeds_of(name)):
                repeated = {"seed": coder.seed + number, "batch_seed": coder.order_seed, "seeds": None}
                found[training] = coder if number == 0 else coder.model_copy(update=repeated)
        return found

    @property
    def steps(self) -> dict[str, str]:
        """The models between the base and the chat model by name, in the order of the training."""
        return dict(list(self.models.items())[1:-1])

    @property
    def model_of(self) -> dict[str, str]:
        """The model of each source, in the order of every source axis."""
        return {BASE: self.base, **self.steps, CHAT: self.chat}

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the models in the order of every source axis."""
        return tuple(self.model_of)

    @property
    def titles(self) -> dict[str, str]:
        """What the user calls each source: the names of `models`, whose first and last are `base` and `chat` elsewhere."""
        return dict(zip(self.sources, self.models or SOURCES, strict=True))

    @model_validator(mode="before")
    @classmethod
    def _ends_of_the_chain(cls, values: Any) -> Any:
        """The first of `models` is the base model and the last the chat model."""
        models = values.get("models") if isinstance(values, dict) else None
        if not models:
            return values
        if not isinstance(models, dict) or not all(isinstance(model, str) for model in models.values()):
            raise ValueError(f"models must be a mapping of names to models, such as base: ORG/BASE; found {models!r}")
        if not 2 <= len(models) <= MAX_MODELS:
            raise ValueError(f"models has {len(models)}, {', '.join(models)}; a chain has two to {MAX_MODELS}")
        for name in models:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"models.{name}: use letters, digits, - and _ in the name of a model")
        for name in list(models)[1:-1]:
            if name in SOURCES:
                raise ValueError(
                    f"models.{name}: the first model is called base and the last one chat in all tables, so none between them "
                    "can have that name; call it by its training, such as sft"
                )
        first, *_, last = models.values()
        ends = {BASE: first, CHAT: last}
        for end, model in ends.items():
            if values.get(end, model) != model:
                raise ValueError(f"{end} is {values[end]!r}, but models has {model!r} there; give one or the other")
        return values | ends

    @property
    def published(self) -> dict[str, CrosscoderConfig]:
        """The crosscoders that are read from files."""
        return {name: coder for name, coder in self.crosscoders.items() if coder.published is not None}

    @model_validator(mode="after")
    def _repetitions_have_names_of_their_own(self) -> RunConfig:
        for name in self.crosscoders:
            for repetition in self.seeds_of(name)[1:]:
                if repetition in self.crosscoders:
                    raise ValueError(
                        f"crosscoders.{name}.seeds makes a training called {repetition!r}, which is also the name of a "
                        "crosscoder: rename that one, or lower seeds"
                    )
        return self

    @field_validator("crosscoders")
    @classmethod
    def _names_are_folders(cls, value: dict[str, CrosscoderConfig]) -> dict[str, CrosscoderConfig]:
        for name in value:
            if not name.replace("-", "").replace("_", "").isalnum() or name in TAKEN:
                raise ValueError(f"{name!r} cannot be the name of a crosscoder: use letters, digits, - and _")
        if not value:
            raise ValueError("at least one crosscoder is needed")
        return value
