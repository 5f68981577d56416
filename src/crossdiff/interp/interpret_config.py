"""The settings of `crossdiff interpret`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from crossdiff.config import Config, Seed


class InterpretConfig(Config):
    """What to interpret, its contexts, and the server and model that explain it."""

    server: str | None = Field(
        None,
        description="base URL of an OpenAI-compatible server, such as http://localhost:8000/v1; default: ask no model",
    )
    model: str | None = Field(None, description="name, on the server, of the model that explains and judges")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable with the server's key, if it needs one")
    answer_format: Literal["text", "json_schema"] = Field(
        "text", description="json_schema: send the server the schema of the answer; text: ask for JSON in the prompt only"
    )
    crosscoders: tuple[str, ...] = Field((), description="crosscoders to interpret; default: all of the run")
    concepts: tuple[str, ...] | None = Field(
        None,
        description="numbers of concepts, or COLUMN=VALUE for a column of the concept table; default: replicated=true, unless "
        "latents are given",
    )
    latents: tuple[str, ...] = Field(
        (), description="numbers of latents, or COLUMN=VALUE for a column of the latent table, such as verdict=chat_specific"
    )
    per_selection: int | None = Field(
        50, ge=1, description="size of the random sample if more latents or concepts have a COLUMN=VALUE; null for all"
    )
    tokens: int = Field(200_000, ge=1000, description="tokens of each split that are searched for contexts")
    before: int = Field(20, ge=1, description="tokens of a context before its strongest token")
    after: int = Field(11, ge=0, description="tokens of a context after its strongest token")
    contexts: int = Field(20, ge=5, description="held-out contexts of each kind (active, random, similar) to score a latent on")
    embedding: str = Field(
        "packaged", description="sentence encoder: packaged (MiniLM from the extra `interp`), a folder, or none"
    )
    batch: int = Field(10, ge=1, description="contexts judged in one call")
    concurrency: int = Field(8, ge=1, description="simultaneous calls")
    timeout: float = Field(120.0, gt=0, description="seconds until a call is aborted and tried again")
    attempts: int = Field(5, ge=1, description="attempts per call")
    answer_tokens: int = Field(1000, ge=16, description="longest answer, in tokens")
    answer_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens",
        description="the server's name for the longest answer; OpenAI's reasoning models need max_completion_tokens",
    )
    temperature: float | None = Field(0.0, ge=0, description="sampling temperature; null for servers that do not take one")
    input_price: float = Field(0.0, ge=0, description="price of a million prompt tokens, to estimate the cost")
    output_price: float = Field(0.0, ge=0, description="price of a million answer tokens")
    batch_tokens: int = Field(4096, ge=1, description="tokens per batch in the search for contexts")
    seed: Seed = 0

    @property
    def chosen_concepts(self) -> tuple[str, ...]:
        """The concepts to interpret."""
        return self.concepts if self.concepts is not None else () if self.latents else ("replicated=true",)
