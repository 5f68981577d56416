"""Asking an OpenAI-compatible server, many questions at a time; nothing that was answered is lost.

The key comes from the environment and goes into the requests' header alone: whatever the server says is cleaned of it before it
can reach a file, a message or a terminal.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping
from typing import Any, TypeVar

import openai

from crossdiff.errors import UserError
from crossdiff.interp.asker import Unanswered, Usage, check_server, question
from crossdiff.interp.cache import Cache, Entry, key_of
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.prompts import Answer, Message, Request

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds before the second attempt, doubled from one to the next, and the longest pause."""
RETRIED = {408, 409, 425, 429}
"""Statuses that may pass, beside those of 500 and more."""
A = TypeVar("A", bound=Answer)


class Client:
    """A server, asked through the `openai` package.

    A call is tried again, after pauses that double, when the server is busy, fails, breaks off or is silent for too long, and
    with a word on what was wrong when the answer is not what was asked for.

    Raises:
        UserError: see `check_server`.
    """

    def __init__(
        self,
        config: InterpretConfig,
        cache: Cache,
        environment: Mapping[str, str] = os.environ,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        server, self._model = check_server(config)
        self.config, self.usage, self._cache, self._first_pause = config, Usage(), cache, first_pause
        self._key = environment.get(config.key_variable, "")
        self._client = openai.AsyncOpenAI(base_url=server, api_key=self._key or "none", max_retries=0, timeout=config.timeout)
        self._free = asyncio.Semaphore(config.concurrency)
        self._random = random.Random(config.seed)

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, request: Request[A]) -> A:
        """The answer, from the cache or the server.

        Raises:
            Unanswered: no attempt got a valid answer.
            UserError: the server cannot be reached, refuses the key, or does not have the model: no other call would fare
                better.
        """
        key = key_of(question(self.config, request))
        if (found := self._cache.get(key)) is not None:
            self.usage.cached += 1
            return request.parse(found.text)
        async with self._free:
            return await self._attempts(request, key)

    async def _attempts(self, request: Request[A], key: str) -> A:
        messages, reason = list(request.messages), ""
        for attempt in range(self.config.attempts):
            try:
                entry = await self._call(messages, request)
            except _Passing as trouble:
                reason = str(trouble)
                self.usage.failed_attempts += 1
                if attempt + 1 < self.config.attempts:
                    await asyncio.sleep(self._pause(attempt, trouble.wait))
                if trouble.unreachable and attempt + 1 == self.config.attempts:
                    raise UserError(
                        f"the server {self.config.server} cannot be reached; start it and run the command again"
                    ) from None
                continue
            try:
                answer = request.parse(entry.text)
            except ValueError as error:
                reason = f"the answer is not valid: {error}; it begins {entry.text[:60]!r}"
                self.usage.failed_attempts += 1
                messages = [*request.messages, *_correction(entry.text, str(error))]
                continue
            self._cache.put(key, entry)
            return answer
        raise Unanswered(f"{reason} (after {self.config.attempts} attempts)")

    def _pause(self, attempt: int, asked: float | None) -> float:
        """What the server asks for, or twice the last pause, with some chance in it so that calls do not come back at once."""
        doubled: float = self._first_pause * 2**attempt * self._random.uniform(0.5, 1.5)
        return min(LONGEST_PAUSE, doubled if asked is None else max(asked, doubled))

    async def _call(self, messages: list[Message], request: Request[Any]) -> Entry:
        config = self.config
        more: dict[str, Any] = {config.answer_limit: config.answer_tokens}
        if config.temperature is not None:
            more["temperature"] = config.temperature
        if config.answer_format == "json_schema":
            more["response_format"] = {"type": "json_schema", "json_schema": request.schema()}
        self.usage.calls += 1
        create: Any = self._client.chat.completions.create
        try:
            async with asyncio.timeout(config.timeout):
                completion = await create(model=self._model, messages=messages, seed=config.seed, **more)
        except (TimeoutError, openai.APITimeoutError):
            raise _Passing(f"no answer within {self.config.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except openai.APIConnectionError as error:
            raise _Passing("the connection failed or broke off", unreachable=_is_refused(error)) from None
        except (openai.OpenAIError, ValueError) as error:
            raise _Passing(f"the server's reply cannot be read: {self._clean(type(error).__name__)}") from None
        return self._entry(completion)

    def _entry(self, completion: Any) -> Entry:
        """The text of a reply, which may hold anything that a server sends.

        Raises:
            _Passing: it has no text, or was cut off; Unanswered: the model refuses.
        """
        choices = getattr(completion, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise _Passing("the server's reply has no answer in it")
        choice, usage = choices[0], getattr(completion, "usage", None)
        prompt_tokens, answer_tokens = (int(getattr(usage, f"{k}_tokens", 0) or 0) for k in ("prompt", "completion"))
        self.usage.prompt_tokens += prompt_tokens
        self.usage.answer_tokens += answer_tokens
        refusal = getattr(choice.message, "refusal", None)
        if refusal or choice.finish_reason == "content_filter":
            raise Unanswered(f"the model refuses: {self._clean(str(refusal or 'content filter'))[:200]}")
        if choice.finish_reason == "length":
            raise _Passing(f"the answer was cut off at {self.config.answer_tokens} tokens; see --answer_tokens")
        if not isinstance(choice.message.content, str) or not choice.message.content.strip():
            raise _Passing("the answer is empty")
        return Entry(self._clean(choice.message.content), prompt_tokens, answer_tokens)

    def _status(self, error: openai.APIStatusError) -> Exception:
        """What an error of the server means for the call, or for all calls."""
        status = error.status_code
        if status in {401, 403}:
            state = (
                f"the key in {self.config.key_variable}"
                if self._key
                else f"calls without a key ({self.config.key_variable} is not set)"
            )
            return UserError(f"the server {self.config.server} refuses {state}: status {status}")
        said = self._clean(str(error.message))[:300]
        if status == 404:
            return UserError(f"the server {self.config.server} has no model {self._model!r} or is no such server: {said}")
        if status in RETRIED or status >= 500:
            return _Passing(
                f"the server answered with status {status}", wait=_seconds(error.response.headers.get("retry-after"))
            )
        return Unanswered(f"the server answered with status {status}: {said}")

    def _clean(self, text: str) -> str:
        return text.replace(self._key, f"[{self.config.key_variable}]") if self._key else text


class _Passing(Exception):
    """An attempt failed in a way that the next may not."""

    def __init__(self, reason: str, wait: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.unreachable = wait, unreachable


def _correction(text: str, problem: str) -> list[Message]:
    return [
        {"role": "assistant", "content": text[:2000]},
        {"role": "user", "content": f"This cannot be used: {problem}. Answer again, with the JSON object only."},
    ]


def _is_refused(error: openai.APIConnectionError) -> bool:
    """Nobody listens there, in contrast to a connection that broke off."""
    return type(error.__cause__).__name__ in {"ConnectError", "ConnectTimeout"}


def _seconds(header: str | None) -> float | None:
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:
        return None
