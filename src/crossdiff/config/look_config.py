"""Settings of the first look."""

from __future__ import annotations

from pydantic import Field

from crossdiff.config.base import Config, Seed


class LookConfig(Config):
    """The first look at two models, which trains nothing."""

    max_tokens: int = Field(
        200_000, ge=0, description="tokens that both models read, in equal parts from every dataset; 0: `run` makes no look"
    )
    depth_tokens: int = Field(4000, ge=100, description="of these, tokens for which the models are compared layer by layer")
    batch_tokens: int = Field(4096, ge=1, description="padded tokens per forward pass")
    positions: int = Field(100, ge=1, description="positions of the largest KL that are listed")
    longest_phrase: int = Field(4, ge=1, le=8, description="tokens of the longest phrases that are counted")
    phrases: int = Field(50, ge=1, description="tokens and phrases that are listed in each direction")
    components: int = Field(5, ge=1, description="principal directions of the difference")
    prompts: int = Field(3, ge=0, description="prompts that both models answer while a mean difference is added")
    blocks: int = Field(20, ge=2, description="blocks of documents of the jackknife")
    seed: Seed = 0
