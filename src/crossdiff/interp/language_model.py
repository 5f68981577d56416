"""The interface to a language model, the usage it reports, and a dry run that asks no model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from crossdiff.errors import UserError
from crossdiff.interp.cache import Cache
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.prompts import AnswerSchema, Request

CHARACTERS_PER_TOKEN = 4
"""For the estimate of a dry run."""
A = TypeVar("A", bound=AnswerSchema)


class Unanswered(Exception):
    """A request without a valid answer; the message gives the reason and holds no secrets."""


@dataclass
class Usage:
    """Calls made, answers taken from the cache, failed attempts, and tokens as the server counts them."""

    calls: int = 0
    cached: int = 0
    failed_attempts: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def cost(self, config: InterpretConfig) -> float:
        return (self.prompt_tokens * config.input_price + self.answer_tokens * config.output_price) / 1e6


class LanguageModel(Protocol):
    """Answers requests: a server, or a dry run."""

    usage: Usage

    async def ask(self, request: Request[A]) -> A:
        """The answer; raises `Unanswered` if there is none."""
        ...


def check_server(config: InterpretConfig) -> tuple[str, str]:
    """The server's URL and the model's name.

    A URL must not carry a secret, because it is written into files.
    """
    if config.server is None or config.model is None:
        raise UserError(
            "asking a model needs both --server URL and --model NAME; without either, only the offline scores are computed"
        )
    parts = urlsplit(config.server)
    if parts.username or parts.password or parts.query:
        raise UserError(
            "--server must not contain a user, password or query; put the key into the environment variable "
            f"{config.key_variable}"
        )
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UserError(f"--server: {config.server!r} is not a URL; expected something like http://localhost:8000/v1")
    return config.server.rstrip("/"), config.model


def cache_key(config: InterpretConfig, request: Request[Any]) -> str:
    """The key of a request: a digest of everything that may change its answer."""
    server, model = check_server(config)
    content = {
        "server": server, "model": model, "messages": list(request.messages), "temperature": config.temperature,
        "max_tokens": config.answer_tokens, "seed": config.seed, "answer_format": config.answer_format,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class DryRun:
    """Counts the calls whose answers are not in the cache, and returns answers of typical length without asking a model."""

    config: InterpretConfig
    cache: Cache
    usage: Usage = field(default_factory=Usage)

    async def ask(self, request: Request[A]) -> A:
        entry = self.cache.get(cache_key(self.config, request))
        if entry is not None:
            self.usage.cached += 1
            return request.parse(entry.text)
        self.usage.calls += 1
        self.usage.prompt_tokens += sum(len(message["content"]) for message in request.messages) // CHARACTERS_PER_TOKEN
        self.usage.answer_tokens += len(request.typical.model_dump_json()) // CHARACTERS_PER_TOKEN + 1
        return request.typical
