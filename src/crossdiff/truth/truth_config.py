"""Settings of `crossdiff truth`: the planted concepts, the crosscoders trained on them, and the analysis."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from crossdiff.config import (
    AnalyzeConfig,
    BatchTopKConfig,
    ConceptsConfig,
    Config,
    CrosscoderConfig,
    DifferenceConfig,
    L1Config,
    PartitionedConfig,
    Seed,
)

SHORT: dict[str, Any] = {"n_latents": 256, "epochs": 8, "lr": 3e-3}
"""The trainings have about 1,100 steps, so their learning rate is higher than the default."""


class PlantedConfig(Config):
    """Activations generated from known concepts. All draws depend on the seed alone."""

    d_model: int = Field(64, ge=2, description="width of the activations")
    shared: int = Field(80, ge=0, description="concepts with one direction and the same amplitude in both models")
    chat_only: int = Field(16, ge=1, description="concepts that only the chat model has")
    base_only: int = Field(8, ge=0, description="concepts that only the base model has")
    weaker: int = Field(16, ge=0, description="shared concepts with a smaller amplitude in the base model")
    rotated: int = Field(12, ge=0, description="shared concepts with another direction in the base model")
    decoupled: int = Field(12, ge=0, description="shared concepts with other amplitudes and partly other tokens in each model")
    weaker_low: float = Field(0.3, gt=0, le=1, description="smallest ratio of base to chat amplitude of a weaker concept")
    weaker_high: float = Field(0.8, gt=0, le=1, description="largest ratio of base to chat amplitude of a weaker concept")
    rotated_cosine: float = Field(0.3, ge=0, le=1, description="largest cosine of the two directions of a rotated concept")
    decoupled_overlap: float = Field(0.6, ge=0, le=1, description="share of a decoupled concept's tokens with both models")
    active: float = Field(6.0, gt=0, description="mean number of concepts active per token in the chat model")
    rate_spread: float = Field(0.5, ge=0, description="standard deviation of the log of how often concepts fire")
    concept_spread: float = Field(0.3, ge=0, description="standard deviation of the log of the concepts' mean amplitudes")
    amplitude_spread: float = Field(0.4, ge=0, description="standard deviation of the log of a concept's amplitudes")
    topics: int = Field(12, ge=1, description="groups of concepts that fire in the same documents")
    topics_per_document: int = Field(2, ge=1, description="topics in each document")
    topic_boost: float = Field(8.0, ge=1, description="factor on how often a concept fires in documents of its topic")
    noise: float = Field(0.05, ge=0, description="standard deviation of the noise on each dimension of each model")
    documents: int = Field(2500, ge=10, description="number of documents")
    document_tokens: int = Field(64, ge=2, description="tokens per document")
    heldout_share: float = Field(0.1, gt=0, lt=1, description="share of the documents that is held out")
    seed: Seed = Field(0, description="seed of all draws")

    @property
    def n_concepts(self) -> int:
        return self.shared + self.chat_only + self.base_only + self.weaker + self.rotated + self.decoupled

    @model_validator(mode="after")
    def _ranges(self) -> PlantedConfig:
        if self.weaker_low > self.weaker_high:
            raise ValueError(f"weaker_low {self.weaker_low} is above weaker_high {self.weaker_high}; swap them")
        if self.topics_per_document > self.topics:
            raise ValueError(f"topics_per_document {self.topics_per_document} is more than the {self.topics} topics; lower it")
        return self


class TruthConfig(Config):
    """Settings of the benchmark."""

    planted: PlantedConfig = PlantedConfig()
    crosscoders: dict[str, CrosscoderConfig] = Field(
        {
            "batchtopk": CrosscoderConfig(sparsity=BatchTopKConfig(k=12), **SHORT),
            "l1": CrosscoderConfig(sparsity=L1Config(mu=2.1), decoder_norm=0.1, **SHORT),
            "dfc": CrosscoderConfig(sparsity=BatchTopKConfig(k=12), structure=PartitionedConfig(exclusive_share=0.1), **SHORT),
            "diff_sae": CrosscoderConfig(sparsity=BatchTopKConfig(k=6), inputs=DifferenceConfig(), **SHORT),
        },
        description="crosscoders to train; the first sets the held-out L0 to which those with a mu are tuned; those that read "
        "both models are trained from 3 seeds unless their `seeds` says otherwise, to score concepts",
    )
    l0_tolerance: float = Field(0.1, gt=0, description="largest relative difference from the first crosscoder's held-out L0")
    l0_trials: int = Field(6, ge=1, description="largest number of trainings of a crosscoder with a mu")
    match_cosine: float = Field(0.7, ge=0, le=1, description="smallest decoder cosine of a latent that stands for a concept")
    match_correlation: float = Field(0.5, ge=0, le=1, description="smallest correlation of its activations with the concept's")
    device: str = Field("auto", description="auto, cpu, or a torch device name")
    analyze: AnalyzeConfig = AnalyzeConfig()
    concepts: ConceptsConfig = ConceptsConfig()
