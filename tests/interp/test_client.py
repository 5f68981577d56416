"""The client against a server that misbehaves: transient failures are retried, others are named, and no answer is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import Reply, scripted, unused_url

from crossdiff.errors import UserError
from crossdiff.interp.cache import Cache
from crossdiff.interp.client import Client
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.language_model import DryRun, Unanswered
from crossdiff.interp.prompts import DETECT, Explanation, Judgement, explain_request, judge_request

KEY = "sk-very-secret-4711"
GOOD = Reply('{"active": [true, false]}')
REQUEST = judge_request(DETECT, "numbers", ["1 2 3", "a b c"])


def config(url: str, **changes: Any) -> InterpretConfig:
    return InterpretConfig(server=url, model="m", **{"timeout": 20.0, "attempts": 3, "temperature": 0.0, **changes})


def ask(settings: InterpretConfig, cache: Cache, request: Any = REQUEST, times: int = 1) -> tuple[list[Any], Client]:
    """Ask the same client `times` different questions at once (the temperature tells them apart), keeping the failures."""

    async def run() -> tuple[list[Any], Client]:
        client = Client(settings, cache, {"OPENAI_API_KEY": KEY}, first_pause=0.001)
        requests = [request] if times == 1 else [judge_request(DETECT, f"number {n}", ["1", "a"]) for n in range(times)]
        try:
            return list(await asyncio.gather(*(client.ask(r) for r in requests), return_exceptions=True)), client
        finally:
            await client.close()

    return asyncio.run(run())


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make one call, so that the imports of the first call do not count against a timeout."""
    cache = Cache(tmp_path_factory.mktemp("warm") / "answers.sqlite")
    with scripted(lambda body, number: GOOD) as server:
        ask(config(server.url), cache)
    cache.close()


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    found = Cache(tmp_path / "deep" / "answers.sqlite")
    yield found
    found.close()


def then_good(first: Reply) -> Callable[[dict[str, Any], int], Reply]:
    return lambda body, number: first if number == 0 else GOOD


@pytest.mark.parametrize(
    "trouble",
    [
        Reply("I think the first is active."),
        Reply('{"active": [true, '),
        Reply('{"active": "maybe"}'),
        Reply('{"active": [true]}'),
        Reply('{"other": 1}'),
        Reply(""),
        Reply('{"active": [true, false]}', finish="length"),
        Reply(body="<html>proxy error</html>"),
        Reply(body='{"choices": []}'),
        Reply(body='{"choices": null}'),
        Reply(status=429, headers={"retry-after": "0"}),
        Reply(status=429, headers={"retry-after": "soon"}),
        Reply(status=500),
        Reply(status=503, body="not even JSON"),
        Reply(GOOD.text, seconds=30),
        Reply(GOOD.text, cut=True),
    ],
    ids=[
        "prose", "broken-json", "wrong-type", "too-few", "other-key", "empty", "cut-off", "html", "no-choices", "null-choices",
        "429", "429-odd-header", "500", "503", "hang", "truncated",
    ],
)  # fmt: skip
def test_a_transient_failure_is_retried(trouble: Reply, cache: Cache) -> None:
    with scripted(then_good(trouble)) as server:
        (answer,), client = ask(config(server.url, timeout=0.7 if trouble.seconds else 20.0), cache)
    assert answer == Judgement(active=[True, False])
    assert len(server.calls) == 2
    assert client.usage.failed_attempts == 1


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (Reply("no"), "the answer is not valid: there is no JSON object in it; it begins 'no' (after 3 attempts)"),
        (Reply('{"active": [true]}'), "it has 1 values for 2 excerpts"),
        (Reply(status=429), "the server answered with status 429 (after 3 attempts)"),
        (Reply(status=500), "the server answered with status 500"),
        (Reply(GOOD.text, seconds=30), "no answer within 0.2 s"),
        (Reply(GOOD.text, cut=True), "the connection failed or broke off"),
        (Reply(GOOD.text, finish="length"), "the answer was cut off at 1000 tokens"),
    ],
)
def test_a_lasting_failure_is_named(trouble: Reply, reason: str, cache: Cache) -> None:
    with scripted(lambda body, number: trouble) as server:
        (answer,), client = ask(config(server.url, timeout=0.2 if trouble.seconds else 20.0), cache)
    assert isinstance(answer, Unanswered) and reason in str(answer)
    assert len(server.calls) == client.usage.calls == 3


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (Reply(None, refusal="I would rather not"), "the model refuses: I would rather not"),
        (Reply("", finish="content_filter"), "the model refuses: content filter"),
        (Reply(status=400, body='{"error": {"message": "the prompt is too long"}}'), "status 400: .*the prompt is too long"),
    ],
)
def test_a_hopeless_request_is_made_once(trouble: Reply, reason: str, cache: Cache) -> None:
    with scripted(lambda body, number: trouble) as server:
        (answer,), _ = ask(config(server.url), cache)
    assert isinstance(answer, Unanswered)
    with pytest.raises(Unanswered, match=reason):
        raise answer
    assert len(server.calls) == 1


def test_a_wrong_answer_is_corrected_in_the_conversation(cache: Cache) -> None:
    with scripted(then_good(Reply('{"active": [true]}'))) as server:
        ask(config(server.url), cache)
    messages = server.calls[1][1]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert "it has 1 values for 2 excerpts" in messages[-1]["content"]


@pytest.mark.parametrize("text", ['```json\n{"active": [1, 0]}\n```', 'Sure! {"why": "digits", "active": [true, false]} Bye'])
def test_an_object_within_prose_is_found(text: str, cache: Cache) -> None:
    with scripted(lambda body, number: Reply(text)) as server:
        (answer,), _ = ask(config(server.url), cache)
    assert answer == Judgement(active=[True, False])


def test_a_repeat_costs_nothing_and_a_failure_is_asked_again(cache: Cache) -> None:
    with scripted(lambda body, number: Reply("no") if number < 3 else GOOD) as server:
        (first,), _ = ask(config(server.url), cache)
        (second,), _ = ask(config(server.url), cache)
        (third,), client = ask(config(server.url), cache)
        assert isinstance(first, Unanswered) and second == third == Judgement(active=[True, False])
        assert (client.usage.calls, client.usage.cached, len(server.calls)) == (0, 1, 4)
        ask(config(server.url, temperature=0.5), cache)
        assert len(server.calls) == 5  # another question


def test_no_more_calls_at_a_time_than_allowed(cache: Cache) -> None:
    with scripted(lambda body, number: Reply(GOOD.text, seconds=0.03)) as server:
        answers, client = ask(config(server.url, concurrency=3), cache, times=12)
    assert answers == [Judgement(active=[True, False])] * 12
    assert server.busiest == 3
    assert client.usage.prompt_tokens == 1200 and client.usage.answer_tokens == 120
    assert client.usage.cost(config(server.url, input_price=2.0, output_price=50.0)) == pytest.approx(0.0024 + 0.006)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            Reply(status=401, body=f'{{"error": {{"message": "wrong key {KEY}"}}}}'),
            "refuses the key in OPENAI_API_KEY: status 401",
        ),
        (
            Reply(status=404, body='{"error": {"message": "no such model"}}'),
            "has no model 'm', or is not an OpenAI",
        ),
    ],
)
def test_an_error_of_every_call_ends_the_run(reply: Reply, message: str, cache: Cache) -> None:
    with scripted(lambda body, number: reply) as server:
        (answer,), _ = ask(config(server.url), cache)
    assert isinstance(answer, UserError) and message in str(answer)
    assert KEY not in str(answer)


def test_nobody_listens(cache: Cache) -> None:
    url = unused_url()
    (answer,), _ = ask(config(url), cache)
    assert isinstance(answer, UserError) and f"the server {url} cannot be reached" in str(answer)


def test_the_key_is_in_the_header_and_nowhere_else(
    tmp_path: Path, cache: Cache, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a server repeats it: in an answer, a refusal, an invalid answer, an error."""
    caplog.set_level(logging.DEBUG)
    replies = [
        Reply(f'{{"explanation": "the word {KEY}"}}'),
        Reply(None, refusal=f"I will not say {KEY}"),
        Reply(f"{KEY} is no JSON"), Reply(f"{KEY} is no JSON"), Reply(f"{KEY} is no JSON"),
        Reply(status=400, body=f'{{"error": {{"message": "key {KEY} has no such right"}}}}'),
        Reply(status=403, body=f'{{"error": {{"message": "{KEY}"}}}}'),
    ]  # fmt: skip
    errors = []
    with scripted(lambda body, number: replies[number]) as server:
        for n in range(5):
            answers, _ = ask(config(server.url), cache, explain_request([(f"text {n}", "")], "facts"))
            errors.append(str(answers[0]))
    assert len(server.calls) == 7
    assert all(
        {name.lower(): value for name, value in headers.items()}["authorization"] == f"Bearer {KEY}"
        for headers, _ in server.calls
    )
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    printed = capsys.readouterr()
    for text in [*errors, caplog.text, printed.out, printed.err, *(file.decode(errors="replace") for file in files)]:
        assert KEY not in text
    assert "the word [OPENAI_API_KEY]" in errors[0] and "I will not say [OPENAI_API_KEY]" in errors[1]


@pytest.mark.parametrize("url", ["http://me:pw@localhost/v1", "http://localhost/v1?key=pw"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str, cache: Cache) -> None:
    with pytest.raises(UserError, match="must not contain a user, password or query") as caught:
        Client(config(url), cache)
    assert "pw" not in str(caught.value)


def test_a_server_needs_a_model(cache: Cache) -> None:
    with pytest.raises(UserError, match="both --server URL and --model NAME"):
        Client(InterpretConfig(server="http://localhost/v1"), cache)
    with pytest.raises(UserError, match="'localhost' is not a URL"):
        Client(InterpretConfig(server="localhost", model="m"), cache)


def test_a_schema_is_sent_where_the_server_takes_one(cache: Cache) -> None:
    with scripted(lambda body, number: GOOD) as server:
        ask(config(server.url, answer_format="json_schema"), cache)
        ask(config(server.url), cache)
    schema = server.calls[0][1]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["active"]["items"] == {"type": "boolean"} and schema["additionalProperties"] is False
    assert "response_format" not in server.calls[1][1]


def test_parameters_that_a_server_does_not_take_are_omitted(cache: Cache) -> None:
    with scripted(lambda body, number: GOOD) as server:
        ask(config(server.url), cache)
        ask(config(server.url, temperature=None, answer_limit="max_completion_tokens", answer_tokens=77), cache)
    first, second = (body for _, body in server.calls)
    assert (first["temperature"], first["max_tokens"]) == (0.0, 1000)
    assert second["max_completion_tokens"] == 77 and not {"temperature", "max_tokens"} & second.keys()


def test_a_dry_run_asks_nobody_and_knows_what_is_cached(cache: Cache) -> None:
    with scripted(lambda body, number: GOOD) as server:
        ask(config(server.url), cache)
        settings = config(server.url)
    dry = DryRun(settings, cache)
    assert asyncio.run(dry.ask(REQUEST)) == Judgement(active=[True, False])
    assert isinstance(asyncio.run(dry.ask(explain_request([("x" * 4000, "")], ""))), Explanation)
    assert (dry.usage.calls, dry.usage.cached, len(server.calls)) == (1, 1, 1)
    assert 1000 < dry.usage.prompt_tokens < 1500


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(UserError, match=r"answers.sqlite is damaged"):
        Cache(path)


def test_an_answer_outlives_a_killed_process(tmp_path: Path, cache: Cache) -> None:
    """What one connection has put, another reads although the first was never closed."""
    with scripted(lambda body, number: GOOD) as server:
        ask(config(server.url), cache)
        again = Cache(cache.path)
        (answer,), client = ask(config(server.url), again)
        again.close()
    assert answer == Judgement(active=[True, False]) and client.usage.cached == 1
