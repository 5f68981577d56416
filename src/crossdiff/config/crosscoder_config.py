"""Settings of a crosscoder: what it reads, its kind of sparsity, how its latents are tied, and its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    model_serializer,
    model_validator,
)

from crossdiff.config.base import Config, Seed
from crossdiff.sources import SOURCES


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
    """A diff-SAE: reads and writes the activation of one model minus that of another, by default chat minus base."""

    kind: Literal["difference"] = "difference"
    of: tuple[str, str] = Field(
        SOURCES,
        description="names of the two models, the earlier one first",
        exclude_if=lambda value: value == SOURCES,  # trainings from before this setting existed keep their fingerprint
    )


class SingleConfig(Kind):
    """An SAE: reads and writes one source."""

    kind: Literal["single"] = "single"
    source: str = Field("base", description="name of the source")


Inputs = Annotated[PairedConfig | DifferenceConfig | SingleConfig, Field(discriminator="kind")]


DEFAULT_SEEDS = 3
"""Trainings of the first BatchTopK crosscoder of a run: the fewest of which two thirds are more than one."""


OF_TRAINING = (
    "reconstruction", "difference_weight", "decoder_norm", "epochs", "batch_size", "lr", "warmup_steps", "decay_share",
    "gradient_clip", "dead_after_tokens", "checkpoint_seconds", "seed", "batch_seed", "seeds", "matmul", "optimizer_state",
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
    difference_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the error in the difference between each model and the one before it, beside the error in "
        "each (the idea of delta-crosscoders, arXiv 2603.04426); at 1 the difference counts as much as one model's activations",
        exclude_if=lambda value: value == 0,
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
    matmul: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="precision of the products on a GPU; their sums are in float32 either way, and a CPU computes in float32",
        exclude_if=lambda value: value == "bfloat16",
    )
    optimizer_state: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="precision of Adam's moments; bfloat16 saves 4 bytes per parameter",
        exclude_if=lambda value: value == "float32",
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
        if self.difference_weight and self.inputs.kind != "paired":
            raise ValueError(f"difference_weight compares two models; inputs {self.inputs.kind} has only one column: remove it")
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


def default_crosscoder(kinds: Mapping[str, tuple[str, str]]) -> str:
    """The crosscoder that is meant if none is named.

    It is the first BatchTopK one that reads both models, since its loss lacks the artifacts of L1's; else the first that reads
    both models, else the first.

    Args:
        kinds: kind of sparsity and kind of inputs of each crosscoder, in the order of the settings.
    """
    paired = [name for name, (_, inputs) in kinds.items() if inputs == "paired"]
    return next((name for name in paired if kinds[name][0] == "batchtopk"), [*paired, *kinds][0])
