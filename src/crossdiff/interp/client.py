"""Requests to an OpenAI-compatible server, many at a time, with retries and a cache.

The key comes from the environment and is sent only in the requests' header. If the server repeats it, the key is removed
before the text reaches a file, a message or the terminal.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar

import openai

from crossdiff.errors import UserError
from crossdiff.interp.cache import Cache, Entry
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.language_model import Unanswered, Usage, cache_key, check_server
from crossdiff.interp.prompts import AnswerSchema, Message, Request

# The retries of the `openai` package (3.57) do not suffice. Without a Retry-After header they never wait longer than 8 s, too
# little for a rate limit per minute. They give up if the header asks for more than 2 minutes. And they do not report failed
# attempts, which are counted and limited here together with invalid answers.
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 60.0
"""Seconds before the second attempt, doubled for each further one, and the longest pause."""
RETRIED = {408, 409, 425, 429}
"""Statuses worth another attempt, besides those from 500."""
A = TypeVar("A", bound=AnswerSchema)


class Client:
    """A server, asked through the `openai` package.

    A call is repeated, after pauses that double, if the server is busy, fails, drops the connection or does not answer in time.
    If the answer is not valid, it is requested again with a message that names the problem.
    """

    def __init__(
        self,
        config: InterpretConfig,
        cache: Cache,
        environment: Mapping[str, str] = os.environ,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        server, self._model = check_server(config)
        self.config = config
        self.usage = Usage()
        self._cache = cache
        self._first_pause = first_pause
        self._key = environment.get(config.key_variable, "")
        self._client = openai.AsyncOpenAI(base_url=server, api_key=self._key or "none", max_retries=0, timeout=config.timeout)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._random = random.Random(config.seed)

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, request: Request[A]) -> A:
        """The answer, from the cache or the server."""
        key = cache_key(self.config, request)
        if (entry := self._cache.get(key)) is not None:
            self.usage.cached += 1
            return request.parse(entry.text)
        async with self._slots:
            return await self._retrying(request, key)

    async def _retrying(self, request: Request[A], key: str) -> A:
        messages = list(request.messages)
        reason = ""
        for attempt in range(self.config.attempts):
            is_last = attempt + 1 == self.config.attempts
            try:
                entry = await self._call(messages, request)
            except _Transient as failure:
                reason = str(failure)
                self.usage.failed_attempts += 1
                if not is_last:
                    await asyncio.sleep(self._pause(attempt, failure.retry_after))
                elif failure.unreachable:
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

    def _pause(self, attempt: int, retry_after: float) -> float:
        """Seconds to wait: twice the last pause, at least `retry_after`, with jitter so that calls do not return together."""
        doubled: float = self._first_pause * 2**attempt * self._random.uniform(0.5, 1.5)
        return min(LONGEST_PAUSE, max(doubled, retry_after))

    async def _call(self, messages: list[Message], request: Request[Any]) -> Entry:
        config = self.config
        options: dict[str, Any] = {config.answer_limit: config.answer_tokens}
        if config.temperature is not None:
            options["temperature"] = config.temperature
        if config.answer_format == "json_schema":
            options["response_format"] = {"type": "json_schema", "json_schema": request.schema()}
        self.usage.calls += 1
        create: Any = self._client.chat.completions.create
        try:
            async with asyncio.timeout(config.timeout):
                completion = await create(model=self._model, messages=messages, seed=config.seed, **options)
        except (TimeoutError, openai.APITimeoutError):
            raise _Transient(f"no answer within {config.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._explain_status(error) from None
        except openai.APIConnectionError as error:
            refused = type(error.__cause__).__name__ in {"ConnectError", "ConnectTimeout"}
            raise _Transient("the connection failed or broke off", unreachable=refused) from None
        except (openai.OpenAIError, ValueError) as error:
            raise _Transient(f"the server's reply cannot be read: {self._clean(type(error).__name__)}") from None
        return self._entry(completion)

    def _entry(self, completion: Any) -> Entry:
        """The text of a reply. A server may send anything, so every part is checked."""
        choices = getattr(completion, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise _Transient("the server's reply contains no answer")
        choice = choices[0]
        usage = getattr(completion, "usage", None)
        prompt_tokens = int(getattr(usage, "prompt_tokens", 0) or 0)
        answer_tokens = int(getattr(usage, "completion_tokens", 0) or 0)
        self.usage.prompt_tokens += prompt_tokens
        self.usage.answer_tokens += answer_tokens
        refusal = getattr(choice.message, "refusal", None)
        if refusal or choice.finish_reason == "content_filter":
            raise Unanswered(f"the model refuses: {self._clean(str(refusal or 'content filter'))[:200]}")
        if choice.finish_reason == "length":
            raise _Transient(f"the answer was cut off at {self.config.answer_tokens} tokens; raise --answer_tokens")
        if not isinstance(choice.message.content, str) or not choice.message.content.strip():
            raise _Transient("the answer is empty")
        return Entry(self._clean(choice.message.content), prompt_tokens, answer_tokens)

    def _explain_status(self, error: openai.APIStatusError) -> Exception:
        """The consequence of an error status: for this attempt, for this request, or for all of them."""
        status = error.status_code
        server = f"the server {self.config.server}"
        message = self._clean(str(error.message))[:300]
        if status in {401, 403}:
            variable = self.config.key_variable
            refused = f"the key in {variable}" if self._key else f"calls without a key ({variable} is not set)"
            return UserError(f"{server} refuses {refused}: status {status}")
        if status == 404:
            return UserError(f"{server} has no model {self._model!r}, or is not an OpenAI-compatible server: {message}")
        if status in RETRIED or status >= 500:
            retry_after = 0.0
            with suppress(ValueError):
                retry_after = float(error.response.headers.get("retry-after", 0))
            return _Transient(f"the server answered with status {status}", retry_after)
        return Unanswered(f"the server answered with status {status}: {message}")

    def _clean(self, text: str) -> str:
        return text.replace(self._key, f"[{self.config.key_variable}]") if self._key else text


class _Transient(Exception):
    """A failed attempt; another one may succeed. unreachable: nothing listens at the server's address."""

    def __init__(self, reason: str, retry_after: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.unreachable = unreachable


def _correction(text: str, problem: str) -> list[Message]:
    return [
        {"role": "assistant", "content": text[:2000]},
        {"role": "user", "content": f"This cannot be used: {problem}. Answer again, with the JSON object only."},
    ]
