"""The typed definition of every setting, from which YAML files, the command line and the defaults follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from crossdiff.errors import UserError
from crossdiff.files import short_repr


def check_url(url: str) -> str:
    """Check the URL of a folder, which is stored in files that others read."""
    if "://" not in url or "::" in url:
        raise UserError(f"{url!r} is not the URL of a folder; expected something like s3://bucket/folder")
    host = url.partition("://")[2].partition("/")[0]
    if ":" in host.rpartition("@")[0]:
        raise UserError("a URL must not contain a password; give credentials the way the protocol's driver expects them")
    return url


class Config(BaseModel):
    """A frozen group of settings that rejects unknown keys, infinity and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""The seed of a random number generator."""


class DatasetConfig(Config):
    """One source of text: plain documents or conversations."""

    path: str | tuple[str, ...] = Field(
        description="local .jsonl, .json, .csv, .parquet or .txt file (all but .parquet also as .gz), a pattern such as "
        "texts/*.jsonl, a list of either, or the name of a Hub dataset"
    )
    name: str | None = Field(None, description="its name in tables; default: the file's stem, or the folder of a pattern")
    subset: str | None = Field(
        None, description="configuration of a Hub dataset that has several", exclude_if=lambda value: value is None
    )
    split: str = Field("train", description="the split of a Hub dataset")
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "prompt_chosen", "alpaca", "text"] = Field(
        "auto",
        description="layout of a record; auto: messages, else text, else the first layout whose columns the record has",
        exclude_if=lambda value: value == "auto",
    )
    text_column: str = "text"
    messages_column: str = "messages"
    roles: dict[str, str] = Field(
        {},
        description="roles of the conversations under other names, and the role that each stands for, such as {pupil: user}",
        exclude_if=lambda value: not value,
    )
    label_column: str | None = Field(None, description="column with the label of each conversation, for the behaviour tables")
    sub_label_column: str | None = None
    heldout_share: float = Field(0.1, ge=0, le=1, description="share of documents held out of training, chosen by content hash")
    max_documents: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="stop after the document that reaches this many tokens")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of the tokens in a mix of the datasets, relative to the other weights; the mix ends with the first "
        "dataset that ends; default: one dataset after the other, each to its end",
        exclude_if=lambda value: value is None,
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The files, patterns or Hub name, as given."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def title(self) -> str:
        if self.name:
            return self.name
        path = Path(self.paths[0].replace(":", "/"))
        return path.parent.name if "*" in path.name and path.parent.name else path.name.split(".")[0]

    @field_validator("path")
    @classmethod
    def _is_given(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("give at least one file, pattern or name")
        return value


def _dataset_from_text(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | list | tuple) else value


MASSIVE_NORM = 10.0
"""Times the median norm above which a token is massive. Ordinary tokens stay below 5 times, massive ones begin at about 30."""


class HarvestConfig(Config):
    """Which activations are collected and how they are stored."""

    max_length: int = Field(256, ge=2, description="tokens per sequence; longer plain text is cut into windows")
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        "float16", description="dtype of the stored activations; int8 stores a scale per token and source"
    )
    batch_tokens: int = Field(8192, ge=1, description="padded tokens per forward pass")
    shard_tokens: int = Field(65536, ge=1, description="tokens per shard of the store")
    leave_out: int = Field(1, ge=0, description="leading positions of each sequence to exclude from training and statistics")
    max_norm_multiple: float | None = Field(
        MASSIVE_NORM,
        gt=1,
        description="tokens whose activation in either model has more than this many times the median norm are excluded from "
        "training and statistics, wherever they are; null: none",
        exclude_if=lambda value: value == MASSIVE_NORM,  # stores from before this setting existed keep their fingerprint
    )
    storage: Literal["blocks", "passes", "live"] = Field(
        "blocks",
        description="blocks: activations on disk, shuffled in blocks of 128 tokens; passes: on disk, shuffled by whole forward "
        "passes; live: only the tokens on disk, and the models run again for every reading, in the order of passes",
        exclude_if=lambda value: value == "blocks",  # stores from before this setting existed keep their fingerprint
    )
    store: Annotated[str, AfterValidator(check_url)] | None = Field(
        None,
        description="URL of a folder such as s3://bucket/stores, to keep the activations there instead of in the run directory "
        "(s3:// needs pip install 'crossdiff[remote]')",
        exclude_if=lambda value: value is None,
    )
    max_damaged: float = Field(
        0.01, ge=0, le=1, description="share of a dataset's records that may be damaged; they are skipped"
    )
    base_tokens: dict[str, str] = Field(
        {},
        description="tokens that the base model was never trained on, such as template tokens, and the tokens it reads instead",
    )
    template_date: date | None = Field(
        None,
        description="the date that a chat template writes if it asks for today's; default: the day of the run's first harvest",
        exclude_if=lambda value: value is None,  # templates that do not read the clock keep their fingerprint
    )


class Kind(Config):
    """A member of a union, identified by its `kind`."""

    kind: str


class L1Config(Kind):
    """ReLU and an L1 penalty weighted by the decoder norms (Lindsey et al. 2024)."""

    kind: Literal["l1"] = "l1"
    mu: float = Field(0.04, ge=0, description="weight of the sparsity penalty")
    mu_warmup_share: float = Field(0.2, ge=0, le=1, description="share of the steps over which mu grows from 0")
    resamplings: int = Field(2, ge=0, description="how many times dead latents are resampled, within the first half of the run")


class AuxConfig(Config):
    """The auxiliary loss that revives dead latents where there is no penalty (Gao et al. 2024)."""

    weight: float = Field(1 / 32, ge=0, description="weight of the auxiliary loss")
    k: int | None = Field(None, ge=1, description="dead latents per token in the auxiliary loss; default d/2")


class BatchTopKConfig(Kind):
    """Keeps the k * batch largest activations of a batch (Bussmann et al. 2024; Minder, Dumas et al. 2025)."""

    kind: Literal["batchtopk"] = "batchtopk"
    k: int = Field(32, ge=1, description="mean number of active latents per token")
    aux: AuxConfig = AuxConfig()
    threshold_beta: float = Field(0.999, gt=0, lt=1, description="running mean of the inference threshold")
    threshold_start_share: float = Field(0.2, ge=0, lt=1, description="the running mean starts after this share of the run")


class TopKConfig(Kind):
    """Keeps the k largest activations of each token (Gao et al. 2024)."""

    kind: Literal["topk"] = "topk"
    k: int = Field(32, ge=1, description="active latents per token")
    aux: AuxConfig = AuxConfig()


class JumpReLUConfig(Kind):
    """A trained threshold per latent, with a straight-through gradient, and a tanh penalty (Anthropic, January 2025)."""

    kind: Literal["jumprelu"] = "jumprelu"
    weight: float = Field(1.0, ge=0, description="weight of the tanh sparsity penalty; grows from 0 over the whole run")
    tanh_scale: float = Field(4.0, gt=0, description="c in tanh(c * f * decoder norm)")
    pre_activation_weight: float = Field(
        3e-6, ge=0, description="weight of the loss that raises the pre-activations of silent latents"
    )
    bandwidth: float = Field(2.0, gt=0, description="width of the window around the threshold in which it gets a gradient")
    threshold: float = Field(0.1, gt=0, description="initial threshold of every latent")


Sparsity = Annotated[L1Config | BatchTopKConfig | TopKConfig | JumpReLUConfig, Field(discriminator="kind")]


class FreeConfig(Kind):
    """No constraint: every latent has its own encoder and decoder direction in every source."""

    kind: Literal["free"] = "free"


class DesignatedConfig(Kind):
    """Designated shared latents: some have the same decoder in all sources and a lower penalty (Anthropic, February 2025)."""

    kind: Literal["designated"] = "designated"
    shared_share: float = Field(0.1, gt=0, lt=1, description="share of the latents that are designated; they come first")
    penalty_factor: float = Field(0.1, gt=0, le=1, description="factor on their sparsity penalty, if there is one")


class PartitionedConfig(Kind):
    """Dedicated features: some latents belong to one source only (DFC, arXiv 2602.11729)."""

    kind: Literal["partitioned"] = "partitioned"
    exclusive_share: float = Field(0.05, gt=0, description="share of the latents exclusive to each source; they come first")


Structure = Annotated[FreeConfig | DesignatedConfig | PartitionedConfig, Field(discriminator="kind")]


class PairedConfig(Kind):
    """A crosscoder: reads and writes every source."""

    kind: Literal["paired"] = "paired"


class DifferenceConfig(Kind):
    """A diff-SAE: reads and writes the chat activation minus the base activation."""

    kind: Literal["difference"] = "difference"


class SingleConfig(Kind):
    """An SAE: reads and writes one source."""

    kind: Literal["single"] = "single"
    source: str = Field("base", description="name of the source")


Inputs = Annotated[PairedConfig | DifferenceConfig | SingleConfig, Field(discriminator="kind")]


DEFAULT_SEEDS = 3
"""Trainings of the first BatchTopK crosscoder of a run: the fewest of which two thirds are more than one."""


OF_TRAINING = (
    "reconstruction", "decoder_norm", "epochs", "batch_size", "lr", "warmup_steps", "decay_share", "gradient_clip",
    "dead_after_tokens", "checkpoint_seconds", "seed", "batch_seed", "seeds",
)  # fmt: skip
"""Settings of a crosscoder that say how it is trained; a published one has none of them."""


class CrosscoderConfig(Config):
    """One crosscoder and its training: what it reads, how its latents are tied, what makes them sparse, and the optimiser.

    With `published`, it is not trained but read from files; the other settings then say what these files hold.

    Examples:
        >>> config = crossdiff.CrosscoderConfig(sparsity={"kind": "batchtopk", "k": 16}, expansion=4)
        >>> config.latents_for(d_model=256), config.epochs
        (1024, 2.0)
    """

    sparsity: Sparsity
    structure: Structure = FreeConfig()
    inputs: Inputs = PairedConfig()
    expansion: int | None = Field(8, ge=1, description="latents per dimension of the residual stream")
    n_latents: int | None = Field(None, ge=1, description="number of latents; overrides the expansion")
    reconstruction: Literal["squared", "norm"] = Field(
        "squared",
        description="squared error, summed over the sources, or the norm of the error, averaged over them; the authors' "
        "use_mse_loss averages the squared error over the sources, so its mu times the number of sources is the mu here",
    )
    decoder_norm: float = Field(1.0, gt=0, description="initial norm of each decoder direction")
    epochs: float = Field(2.0, gt=0, description="passes over the training tokens")
    batch_size: int = Field(1024, ge=2, description="tokens per step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate (Adam)")
    warmup_steps: int = Field(100, ge=0, description="steps over which the learning rate rises")
    decay_share: float = Field(0.3, ge=0, le=1, description="share of the steps over which the learning rate falls to 0")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient of all parameters")
    dead_after_tokens: int | None = Field(
        None, ge=1, description="tokens after which a silent latent is dead; default: min(10M, 5% of the run's tokens)"
    )
    checkpoint_seconds: float = Field(30.0, gt=0, description="seconds between checkpoints")
    seed: Seed = Field(0, description="seed of the random decoder directions at the start of training")
    batch_seed: Seed | None = Field(
        None,
        description="seed of the order of the batches; default: that of the start",
        exclude_if=lambda value: value is None,  # trainings from before this setting existed keep their fingerprint
    )
    seeds: int | None = Field(
        None,
        ge=1,
        description="number of trainings that differ only in the seed of the start, to see which concepts replicate; default: "
        f"{DEFAULT_SEEDS} for the first BatchTopK crosscoder of a run, 1 for the others",
        exclude_if=lambda value: value is None,
    )
    published: str | None = Field(
        None,
        description="folder, file or Hub name (owner/name@commit) of a published crosscoder, which is read and not trained",
        exclude_if=lambda value: value is None,
    )
    sources: tuple[str, ...] | None = Field(
        None,
        description="of a published crosscoder: the models that it reads, in its file's order; default: base, chat",
        exclude_if=lambda value: value is None,
    )
    input_scales: tuple[float, ...] | None = Field(
        None,
        description="of a published crosscoder: one number per model that the activations were multiplied by in training, "
        "where its files do not hold it",
        exclude_if=lambda value: value is None,
    )

    @property
    def is_repeated(self) -> bool:
        """Whether it is of the kind that is trained from several seeds by default: a BatchTopK crosscoder of both models."""
        return self.published is None and self.sparsity.kind == "batchtopk" and self.inputs.kind == "paired"

    @property
    def order_seed(self) -> int:
        """Seed of the order of the batches."""
        return self.seed if self.batch_seed is None else self.batch_seed

    def latents_for(self, d_model: int) -> int:
        """Number of latents for activations of width `d_model`."""
        if self.n_latents is not None:
            return self.n_latents
        assert self.expansion is not None
        return self.expansion * d_model

    @model_validator(mode="after")
    def _size_is_given(self) -> CrosscoderConfig:
        if self.n_latents is None and self.expansion is None:
            raise ValueError("either expansion or n_latents must be set")
        if self.inputs.kind != "paired" and self.structure.kind != "free":
            raise ValueError(
                f"structure {self.structure.kind} ties latents between sources; inputs {self.inputs.kind} has only one"
            )
        return self

    @model_validator(mode="after")
    def _is_trained_or_published(self) -> CrosscoderConfig:
        if self.published is None:
            if self.sources is not None or self.input_scales is not None:
                raise ValueError("sources and input_scales describe a published crosscoder: set published too, or remove them")
            return self
        set_ = [name for name in OF_TRAINING if getattr(self, name) != type(self).model_fields[name].default]
        if set_:
            raise ValueError(
                f"a published crosscoder cannot be trained again: remove {', '.join(set_)}, or train one of your own"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_a_training(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        values = handler(self)
        return values if self.published is None else {key: values[key] for key in values if key not in OF_TRAINING}


class AnalyzeConfig(Config):
    """Latent scaling, examples and behaviours."""

    batch_tokens: int = Field(4096, ge=1, description="tokens per step of the pass")
    blocks: int = Field(20, ge=2, description="blocks of documents of the jackknife")
    nu_error: float = Field(0.2, gt=0, description="chat-specific: nu_error below this")
    nu_reconstruction: float = Field(0.5, gt=0, description="chat-specific: nu_reconstruction below this")
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
    model: Literal["chat", "base"] = Field("chat", description="the model that is steered")
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


TAKEN = {"activations", "concepts", "interpretation", "old", "tensorboard", "work"}
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


def default_crosscoder(kinds: Mapping[str, tuple[str, str]]) -> str:
    """The crosscoder that is meant if none is named.

    It is the first BatchTopK one that reads both models, since its loss lacks the artifacts of L1's; else the first that reads
    both models, else the first.

    Args:
        kinds: kind of sparsity and kind of inputs of each crosscoder, in the order of the settings.
    """
    paired = [name for name, (_, inputs) in kinds.items() if inputs == "paired"]
    return next((name for name in paired if kinds[name][0] == "batchtopk"), [*paired, *kinds][0])


C = TypeVar("C", bound=Config)


def validate(model: type[C], values: Any, origin: str) -> C:
    """Build `model` from plain values. A `UserError` lists every wrong key with its value and what was expected."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            found = "" if item["type"] == "missing" else f" (found {short_repr(item['input'])})"
            message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
            lines.append(f"{key}: {message}{found}")
        raise UserError(f"{origin} has wrong settings:\n  " + "\n  ".join(lines)) from None


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `values`, key by key down the tree."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return merged
