"""The one typed definition of every setting: YAML files, the command line and the defaults all come from here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator


class UserError(ValueError):
    """Something the user gave cannot work. The message names the value, what was expected and what to do."""


class Config(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DatasetConfig(Config):
    """One source of text: plain documents or conversations."""

    path: str = Field(description="local .jsonl, .jsonl.gz, .parquet or .txt file, or the name of a Hub dataset")
    name: str | None = Field(None, description="what tables call it; default: the file's stem")
    split: str = Field("train", description="the split of a Hub dataset")
    text_column: str = "text"
    messages_column: str = "messages"
    label_column: str | None = Field(None, description="column with a label per conversation, for the behaviour tables")
    sub_label_column: str | None = None
    heldout_share: float = Field(0.1, ge=0, le=1, description="share of documents kept out of training, by content hash")
    max_documents: int | None = Field(None, ge=1)

    @property
    def title(self) -> str:
        return self.name or Path(self.path.replace(":", "/")).name.split(".")[0]


def _dataset_from_text(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class HarvestConfig(Config):
    """Which activations are collected and how they are stored."""

    max_length: int = Field(256, ge=2, description="tokens per sequence; longer plain text is cut into windows")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float16", description="of the stored activations")
    batch_tokens: int = Field(8192, ge=1, description="padded tokens per forward pass")
    shard_tokens: int = Field(65536, ge=1, description="tokens per shard of the store")
    leave_out: int = Field(1, ge=0, description="leading positions of a sequence left out of training and statistics")


class L1Config(Config):
    """ReLU and an L1 penalty weighted by the decoder norms (Lindsey et al. 2024)."""

    kind: Literal["l1"] = "l1"
    mu: float = Field(0.04, ge=0, description="weight of the sparsity penalty")
    mu_warmup_share: float = Field(0.2, ge=0, le=1, description="share of the steps over which mu grows from 0")


class BatchTopKConfig(Config):
    """The k x batch largest activations of a batch stay (Bussmann et al. 2024; Minder, Dumas et al. 2025)."""

    kind: Literal["batchtopk"] = "batchtopk"
    k: int = Field(32, ge=1, description="mean number of active latents per token")
    aux_weight: float = Field(1 / 32, ge=0, description="weight of the auxiliary loss that revives dead latents")
    aux_k: int | None = Field(None, ge=1, description="dead latents per token in the auxiliary loss; default d/2")
    dead_after_tokens: int | None = Field(
        None, ge=1, description="silent for so many tokens = dead; default min(10M, 5% of the run's tokens)"
    )
    threshold_beta: float = Field(0.999, gt=0, lt=1, description="running mean of the inference threshold")
    threshold_start_share: float = Field(0.2, ge=0, lt=1, description="the running mean starts after this share of the run")


Sparsity = Annotated[L1Config | BatchTopKConfig, Field(discriminator="kind")]


class CrosscoderConfig(Config):
    """One crosscoder and its training."""

    sparsity: Sparsity
    expansion: int | None = Field(8, ge=1, description="latents per dimension of the residual stream")
    n_latents: int | None = Field(None, ge=1, description="number of latents; overrides the expansion")
    reconstruction: Literal["squared", "norm"] = Field("squared", description="squared error, or its unsquared norm")
    decoder_norm: float = Field(1.0, gt=0, description="norm of each decoder direction at the start")
    epochs: float = Field(2.0, gt=0, description="passes over the training tokens")
    batch_size: int = Field(1024, ge=2, description="tokens per step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate (Adam)")
    warmup_steps: int = Field(100, ge=0)
    decay_share: float = Field(0.3, ge=0, le=1, description="share of the steps over which the rate falls to 0")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    checkpoint_seconds: float = Field(30.0, gt=0, description="seconds between checkpoints")
    seed: int = 0

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
        return self


class AnalyzeConfig(Config):
    """Latent scaling, examples and behaviours."""

    batch_tokens: int = Field(4096, ge=1, description="tokens per step of the pass")
    blocks: int = Field(20, ge=2, description="blocks of documents of the jackknife")
    nu_error: float = Field(0.2, gt=0, description="chat-specific: nu_error below")
    nu_reconstruction: float = Field(0.5, gt=0, description="chat-specific: nu_reconstruction below")
    delta_norm: float = Field(0.75, ge=0.5, le=1, description="chat-specific: delta_norm at least")
    min_active: int = Field(100, ge=1, description="a latent with fewer active tokens is undecided")
    examples: int = Field(12, ge=1, description="highest-activating examples kept per latent")
    examples_per_quantile: int = Field(3, ge=0, description="examples kept per activation quantile")
    pool_size: int = Field(50, ge=1, description="latents in each pool of the behaviour comparison")
    seed: int = 0


class CausalConfig(Config):
    """The causal test: which conversations are patched, and how the numbers are made."""

    interventions: str | None = Field(None, description="YAML file of interventions; default: the list in the package")
    split: Literal["heldout", "train"] = Field("heldout", description="split of the conversations")
    max_conversations: int | None = Field(256, ge=2, description="conversations, chosen by content hash; null for all")
    pool: int | None = Field(None, ge=2, description="latents ranked against each other; default: 5% of all")
    batch_tokens: int = Field(4096, ge=1, description="padded tokens per forward pass")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples of the conversations")
    seed: int = 0


class SteerConfig(Config):
    """Steering with one latent: a few prompts side by side, or a table over the labelled prompts."""

    crosscoder: str | None = Field(None, description="whose latent it is; default: the first of the run")
    latent: int | None = Field(None, description="number of the latent")
    mode: Literal["add", "ablate"] = Field("add", description="add the chat direction, or take the contribution out")
    strength: tuple[float, ...] = Field((1.0,), min_length=1, description="in units of the latent's largest contribution")
    model: Literal["chat", "base"] = Field("chat", description="the model that is steered")
    tokens: Literal["all", "prompt", "template", "generated"] = Field("all", description="tokens that are edited")
    prompt: tuple[str, ...] = Field((), description="questions; without any, the labelled prompts of the run are asked")
    labels: tuple[str, ...] = Field((), description="labels of the prompts that are asked; default: all")
    prompts_per_label: int = Field(100, ge=1, description="labelled prompts of each kind, chosen by content hash")
    split: Literal["heldout", "train"] = Field("heldout", description="split of the labelled prompts")
    controls: int = Field(3, ge=0, description="random latents of like frequency and norm, with labelled prompts")
    rules: str | None = Field(None, description="YAML file of behaviours; default: those of the embedded pair")
    max_new_tokens: int = Field(60, ge=1)
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token")
    seed: int = 0


class RunConfig(Config):
    """A whole diff: two models, a layer, texts, and the crosscoders to train."""

    base: str = Field("demo:base", description="Hub name or folder of the base model")
    chat: str = Field("demo:chat", description="Hub name or folder of the model fine-tuned from it")
    layer: int | None = Field(None, ge=0, description="decoder layer after which activations are taken; default: the middle")
    dataset: tuple[Annotated[DatasetConfig, BeforeValidator(_dataset_from_text)], ...] = Field(
        (), description="texts: paths, Hub names, or mappings with the keys of a dataset"
    )
    device: str = Field("auto", description="auto, cpu, or what torch calls the accelerator")
    harvest: HarvestConfig = HarvestConfig()
    crosscoders: dict[str, CrosscoderConfig] = Field(
        {
            "l1": CrosscoderConfig(sparsity=L1Config(), decoder_norm=0.1),
            "batchtopk": CrosscoderConfig(sparsity=BatchTopKConfig()),
        },
        description="one folder each",
    )
    analyze: AnalyzeConfig = AnalyzeConfig()
    causal: CausalConfig = CausalConfig()

    @field_validator("crosscoders")
    @classmethod
    def _names_are_folders(cls, value: dict[str, CrosscoderConfig]) -> dict[str, CrosscoderConfig]:
        for name in value:
            if not name.replace("-", "").replace("_", "").isalnum() or name in {"activations", "old", "work"}:
                raise ValueError(f"{name!r} cannot name a crosscoder's folder: use letters, digits, - and _")
        if not value:
            raise ValueError("at least one crosscoder is needed")
        return value


C = TypeVar("C", bound=Config)


def validate(model: type[C], values: Any, origin: str) -> C:
    """Build `model` from plain values; a `UserError` lists every wrong key with its value and what was expected."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            found = "" if item["type"] == "missing" else f" (found {item['input']!r})"
            message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
            lines.append(f"{key}: {message}{found}")
        raise UserError(f"{origin} has wrong settings:\n  " + "\n  ".join(lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a `UserError` names the file when it is missing, unreadable or no mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of settings, found {type(values).__name__}")
    return values


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` put over them, key by key down the tree."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return merged
