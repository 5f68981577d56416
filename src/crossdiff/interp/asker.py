"""Who is asked, in the abstract: what a question is, what it took, and a dry run that asks nobody."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from crossdiff.errors import UserError
from crossdiff.interp.cache import Cache, key_of
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.prompts import Answer, Request

CHARACTERS_PER_TOKEN = 4
"""For the estimate of a dry run."""
A = TypeVar("A", bound=Answer)


class Unanswered(Exception):
    """A question that got no valid answer; the message is the reason, free of secrets."""


@dataclass
class Usage:
    """What was asked: calls made and tokens as the server counts them, answers from the cache, failed attempts."""

    calls: int = 0
    cached: int = 0
    failed_attempts: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def cost(self, config: InterpretConfig) -> float:
        return (self.prompt_tokens * config.input_price + self.answer_tokens * config.output_price) / 1e6


class Asker(Protocol):
    """Whoever answers: a server, a dry run."""

    usage: Usage

    async def ask(self, request: Request[A]) -> A:
        """The answer.

        Raises:
            Unanswered: there is none.
        """
        ...


def check_server(config: InterpretConfig) -> tuple[str, str]:
    """The server's URL and the model.

    Raises:
        UserError: one of them is missing, or the URL is none or carries a secret, which would be written into files.
    """
    if config.server is None or config.model is None:
        raise UserError(
            "a model is asked with both --server URL and --model NAME; without either, only offline scores are made"
        )
    parts = urlsplit(config.server)
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"--server must carry no user, password or query; put the key into the environment variable {config.key_variable}"
        )
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UserError(f"--server: {config.server!r} is no URL such as http://localhost:8000/v1")
    return config.server.rstrip("/"), config.model


def question(config: InterpretConfig, request: Request[Any]) -> dict[str, Any]:
    """What decides an answer, so that an equal question has an equal answer."""
    server, model = check_server(config)
    return {
        "server": server, "model": model, "messages": list(request.messages), "temperature": config.temperature,
        "max_tokens": config.answer_tokens, "seed": config.seed, "answer_format": config.answer_format,
    }  # fmt: skip


@dataclass
class DryRun:
    """Asks nobody: counts the calls that are not in the cache, and answers with text of the usual length."""

    config: InterpretConfig
    cache: Cache
    usage: Usage = field(default_factory=Usage)

    async def ask(self, request: Request[A]) -> A:
        found = self.cache.get(key_of(question(self.config, request)))
        if found is not None:
            self.usage.cached += 1
            return request.parse(found.text)
        self.usage.calls += 1
        self.usage.prompt_tokens += sum(len(m["content"]) for m in request.messages) // CHARACTERS_PER_TOKEN
        self.usage.answer_tokens += len(request.typical.model_dump_json()) // CHARACTERS_PER_TOKEN + 1
        return request.typical
