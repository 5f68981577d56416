"""The settings of `crossdiff interpret`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from crossdiff.config import Config


class InterpretConfig(Config):
    """Which latents are interpreted, on which contexts, and by which model behind which server."""

    server: str | None = Field(
        None,
        description="base URL of an OpenAI-compatible server, such as http://localhost:8000/v1; default: no model is asked",
    )
    model: str | None = Field(None, description="name of the model that explains and judges, as the server knows it")
    key_variable: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the server's key, if it asks for one"
    )
    answer_format: Literal["text", "json_schema"] = Field(
        "text", description="json_schema: the server is told the schema of the answer; text: the prompt alone asks for JSON"
    )
    crosscoders: tuple[str, ...] = Field((), description="crosscoders of the run; default: all")
    latents: tuple[str, ...] = Field(
        ("verdict=chat_specific", "verdict=shared"),
        min_length=1,
        description="numbers of latents, or COLUMN=VALUE of the latent table",
    )
    per_selection: int | None = Field(
        50, ge=1, description="latents drawn at random where a COLUMN=VALUE has more; null for all"
    )
    tokens: int = Field(200_000, ge=1000, description="tokens of each split in which contexts are looked for")
    before: int = Field(20, ge=1, description="tokens of a context before its strongest token")
    after: int = Field(11, ge=0, description="tokens of a context after its strongest token")
    contexts: int = Field(20, ge=5, description="held-out contexts of each kind (active, random, similar) that score a latent")
    embedding: str = Field(
        "packaged", description="sentence encoder: packaged (MiniLM from the extra `interp`), a folder, or none"
    )
    batch: int = Field(10, ge=1, description="contexts that the model judges in one call")
    concurrency: int = Field(8, ge=1, description="calls at a time")
    timeout: float = Field(120.0, gt=0, description="seconds after which a call is given up and tried again")
    attempts: int = Field(5, ge=1, description="times that a call is made until it is answered")
    answer_tokens: int = Field(1000, ge=16, description="longest answer")
    answer_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the server calls the longest answer; OpenAI's reasoning models take the second name"
    )
    temperature: float | None = Field(0.0, ge=0, description="null where the server takes none")
    input_price: float = Field(0.0, ge=0, description="price of a million prompt tokens, for the estimate of the cost")
    output_price: float = Field(0.0, ge=0, description="price of a million answer tokens")
    batch_tokens: int = Field(4096, ge=1, description="tokens per step of the search for contexts")
    seed: int = 0
