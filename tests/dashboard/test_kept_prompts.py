"""Live prompts that stay: their addresses, the folder that keeps them, answers that are stopped, and requests of programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

pytest.importorskip("fastapi")

from showing import ADDRESS, requests_to, write_links, write_run

import crossdiff.diff
from conftest import forget_digests
from crossdiff.dashboard.catalogue import Catalogue, Coder
from crossdiff.dashboard.kept import Kept
from crossdiff.dashboard.live import Live, Wanted
from crossdiff.dashboard.live_actions import Done, keep, recall, wanted
from crossdiff.dashboard.live_form import Form, Turn
from crossdiff.errors import UserError
from crossdiff.models.access import residuals_after
from crossdiff.text.chat import Flag
from crossdiff.text_activations import read_text

CODER = "/run/run/batchtopk"
LIVE = f"{CODER}/live"
ORIGIN = {"origin": ADDRESS}
QUESTION = {"kind": "chat", "role": "user", "content": "hi the sea is cold"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, analysed_run: Path) -> Path:
    folder = shutil.copytree(analysed_run, tmp_path_factory.mktemp("kept") / "run")
    forget_digests(folder)
    write_links(folder / "batchtopk", latent=0, twin=1, neighbour=2)
    return folder


@pytest.fixture(scope="module")
def coder(run: Path) -> Coder:
    return next(iter(Catalogue([run])))


@pytest.fixture(scope="module")
def live() -> Live:
    return Live()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def client(run: Path, cache: Path) -> Any:
    return requests_to(run, cache, live=True)


def asked(client: Any, **fields: str) -> str:
    """The address of a request."""
    answer = client.post(LIVE, data=QUESTION | fields, headers=ORIGIN)
    assert answer.status_code == 303 and not answer.text
    return str(answer.headers["location"])


def result(page: str) -> str:
    return page.partition('id="result"')[2]


def test_a_request_has_an_address_that_shows_it_again(client: Any, run: Path, cache: Path) -> None:
    """In a server that starts later, without loading a model: it has none."""
    address = asked(client, action="answer-chat", length="6", order="active")
    assert re.fullmatch(rf"{LIVE}/[0-9a-f]{{32}}", address)
    first = client.get(address)
    assert first.status_code == 200 and "hi the sea is cold" in first.text and "answer-text" in first.text
    part = client.get(address, headers={"hx-request": "true"})
    assert part.headers["hx-push-url"] == address and "<html" not in part.text and result(part.text) in first.text
    later = requests_to(run, cache, live=False)
    assert result(later.get(address).text).split("</main>")[0].strip() in first.text
    token = f"{address}/text/0/token/3"
    assert later.get(token).text == client.get(token).text.replace(f'<a href="{LIVE}" data-key="l">Live</a>', "")
    assert asked(client, action="answer-chat", length="6", order="active") == address  # the same request, the same result


def test_only_the_user_can_read_what_is_kept(client: Any, cache: Path) -> None:
    asked(client, action="read")
    assert (cache / "live").stat().st_mode & 0o777 == 0o700
    files = list((cache / "live").iterdir())
    assert files and all(re.fullmatch(r"[0-9a-f]{32}\.json\.gz", file.name) for file in files)
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)


@pytest.mark.parametrize("key", ["0" * 32, "0" * 31, "..%2Fsearch", "%2e%2e", "A" * 32, "0" * 32 + "%0a"])
def test_unknown_and_hostile_keys_lead_to_an_empty_form(client: Any, key: str) -> None:
    answer = client.get(f"{LIVE}/{key}")
    assert answer.status_code == 404 and ("kept under this address" in answer.text or "no such page" in answer.text)
    assert client.get(f"{LIVE}/{key}.json").status_code == 404


def test_a_request_is_of_one_crosscoder_and_one_set_of_results(client: Any, coder: Coder, cache: Path) -> None:
    kept = Kept(cache / "live")
    entry = kept.get(asked(client, action="read").rpartition("/")[2])
    for name, other, status in (("edition", "other", 409), ("crosscoder", "l1", 404), ("run", "/x", 404), ("format", 0, 404)):
        answer = client.get(f"{LIVE}/{kept.put({**entry, name: other})}")
        assert answer.status_code == status
        assert ("hi the sea is cold" in answer.text) == (status == 409) == ("were replaced since" in answer.text)
        assert "strip" not in answer.text


def test_the_oldest_make_room_and_the_newest_stays(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "live", most=3)
    keys = []
    for number in range(5):
        keys.append(kept.put({"number": number}))
        os.utime(kept.folder / f"{keys[-1]}.json.gz", ns=(number, number))
    found = Kept(kept.folder)
    assert [found.get(key) for key in keys] == [None, None, {"number": 2}, {"number": 3}, {"number": 4}]
    size = (kept.folder / f"{keys[-1]}.json.gz").stat().st_size
    few = Kept(kept.folder, most_bytes=2 * size)
    newest = few.put({"number": 9})
    assert {file.name[:32] for file in kept.folder.iterdir()} == {keys[-1], newest}
    large = Kept(kept.folder, most_bytes=1).put({"text": "x" * 100})
    assert [file.name[:32] for file in kept.folder.iterdir()] == [large]


def test_damaged_entries_are_not_shown(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    key, other = kept.put({"number": 1}), kept.put({"number": 2})
    path = tmp_path / f"{key}.json.gz"
    whole = path.read_bytes()
    for content in (b"", whole[:-5], (tmp_path / f"{other}.json.gz").read_bytes(), b"\0" * 40):
        path.write_bytes(content)
        assert Kept(tmp_path).get(key) is None
    assert Kept(tmp_path).get(other) == {"number": 2}


def test_two_servers_may_keep_at_once(tmp_path: Path) -> None:
    """Both write the same entries, and each makes room while the other writes."""
    servers = [Kept(tmp_path, most=20) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda n: servers[n % 2].put({"number": n // 2 % 30}), range(240)))
    assert not any(server.problem for server in servers)
    files = {file.name[:32] for file in tmp_path.iterdir()}
    assert 20 <= len(files) <= 30 and files <= set(keys)
    assert all(Kept(tmp_path).get(key) is not None for key in files)


def test_without_a_folder_to_write_the_result_is_shown_and_says_so(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "live").write_text("a file where the folder should be")
    client = requests_to(run, tmp_path / "cache", live=True)
    page = client.get(asked(client, action="read")).text
    assert "strip" in page and "lost when the server stops" in page


def test_an_answer_is_read_with_its_prompt(run: Path, coder: Coder, live: Live) -> None:
    """Against the code of both models' residual streams on the tokens that were read."""
    prompt = [{"role": "user", "content": "hi the sea is cold"}]
    parts = live.answer(coder, prompt, [Wanted("chat model", "chat"), Wanted("base model", "base")], 6)
    assert [part.name for part in parts] == ["chat model", "base model"]
    opened = crossdiff.diff.open(run, "batchtopk")
    pair, crosscoder = opened.pair, opened.crosscoder_at_pair
    before = read_text(pair.tokenizer, prompt, 100)
    for part in parts:
        reading, n = part.reading, part.reading.answer_from
        assert reading.ids[:n] == tuple(before.token_ids.tolist()) and reading.flags[:n] == tuple(before.flags.tolist())
        assert len(reading.ids) > n and set(reading.flags[n:]) == {int(Flag.ASSISTANT)}
        assert pair.tokenizer.decode(list(reading.ids[n:]), skip_special_tokens=True).strip() == part.answer
        ids, layer = torch.tensor([reading.ids]), crosscoder.origin["layer"]
        h = torch.stack([residuals_after(model, ids, [layer])[0][0] for model in pair.models], 1)
        code = crosscoder.sparse_code(crosscoder.normalise(h))
        found = zip(code.token.tolist(), code.latent.tolist(), crosscoder.v(code).tolist(), strict=True)
        expected = {(token, latent): v for token, latent, v in found if token >= n and v > 0}
        got = zip(reading.token.tolist(), reading.latent.tolist(), reading.v.tolist(), strict=True)
        assert {(token, latent): v for token, latent, v in got if token >= n} == pytest.approx(expected, rel=1e-4)
        assert expected


def test_a_stopped_answer_is_kept_as_far_as_it_was_written(coder: Coder, live: Live, tmp_path: Path) -> None:
    heard: list[tuple[int, str]] = []

    def hear(number: int, name: str, text: str) -> bool:
        heard.append((number, text))
        return len(heard) < 3

    prompt = [{"role": "user", "content": "hi the sea"}]
    both = [Wanted("chat model", "chat"), Wanted("base model", "base")]
    (part,) = live.answer(coder, prompt, both, 12, hear)
    whole = live.answer(coder, prompt, both[:1], 12)[0]
    assert part.ending == "stopped" and len(heard) == 3
    n = part.reading.answer_from
    assert part.reading.ids == whole.reading.ids[: n + 3]
    before = whole.reading.token < n + 3  # models are causal, so what was stopped is read as before
    np.testing.assert_array_equal(part.reading.latent, whole.reading.latent[before])
    np.testing.assert_allclose(part.reading.v, whole.reading.v[before], rtol=1e-4)
    kept, form = Kept(tmp_path), Form(turns=(Turn("user", "hi the sea"),))
    again = recall(kept, coder, keep(kept, coder, Done(form, "answer-both", (part,)))).parts[0]
    assert (again.answer, again.ending, again.reading.ids) == (part.answer, part.ending, part.reading.ids)
    np.testing.assert_array_equal(again.reading.v, part.reading.v)


def lines(client: Any, fields: dict[str, str]) -> list[dict[str, Any]]:
    answer = client.post(LIVE, data=QUESTION | fields, headers={**ORIGIN, "accept": "application/x-ndjson"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_an_answer_comes_token_by_token(client: Any) -> None:
    first, *told, last = lines(client, {"action": "answer-both", "length": "5"})
    assert set(first) == {"running"}
    texts = {number: [line["text"] for line in told if line["answer"] == number] for number in (0, 1)}
    assert {line["name"] for line in told if line["answer"] == 0} == {"base model"}
    assert all(len(each) <= 5 and each for each in texts.values())
    data = client.get(f"{last['address']}.json").json()
    whole = [text["answer"].rstrip("\N{REPLACEMENT CHARACTER}") for text in data["texts"]]
    assert whole == [each[-1] for each in texts.values()]
    assert lines(client, {"action": "steer"})[-1]["problem"].startswith("no latent to steer with is chosen")
    gone = client.post(f"{LIVE}/stop/{first['running']}", headers=ORIGIN)
    assert gone.status_code == 404 and client.post(f"{LIVE}/stop/x").status_code == 403  # without an Origin


def test_stopping_ends_an_answer(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request to stop comes after the second token; the answer waits for it."""
    client, opened = requests_to(run, tmp_path, live=True), threading.Event()
    real = Live.answer

    def watched(self: Live, coder: Coder, text: Any, wanted: Any, n: int, hear: Any) -> Any:
        def slow(number: int, name: str, words: str) -> bool:
            if not opened.is_set():
                opened.set()
                (running,) = self.stops
                assert client.post(f"{LIVE}/stop/{running}", headers=ORIGIN).status_code == 204
            return bool(hear(number, name, words))

        return real(self, coder, text, wanted, n, slow)

    monkeypatch.setattr(Live, "answer", watched)
    told = lines(client, {"action": "answer-both", "length": "60"})
    assert len(told) == 3 and told[1]["answer"] == 0
    page = client.get(told[-1]["address"]).text
    assert page.count("answer-text") == 1 and "Stopped by you" in page


def test_a_reader_who_goes_away_stops_the_answer(live: Live, coder: Coder) -> None:
    import asyncio

    from crossdiff.dashboard.live_stream import stream

    ended = threading.Event()

    def answer(hear: Any) -> dict[str, Any]:
        while hear(0, "chat model", "x"):
            time.sleep(0.01)
        ended.set()
        return {"address": "/"}

    async def leave() -> None:
        body = stream(live, answer).body_iterator
        await anext(aiter(body))
        await anext(aiter(body))
        await body.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert ended.wait(10) and not live.stops


def test_programs_post_json_and_get_json(client: Any) -> None:
    wanted_request = {"action": "answer-both", "turns": [{"role": "user", "content": "hi the sea"}], "length": 4}
    answer = client.post(LIVE, json=wanted_request, headers=ORIGIN)
    assert answer.status_code == 201
    data = answer.json()
    assert data["address"] == answer.headers["location"] and data["settings"]["length"] == 4
    for same in (client.get(f"{data['address']}.json"), client.get(data["address"], headers={"accept": "application/json"})):
        assert same.json() == data
    base, chat = data["texts"]
    assert (base["name"], chat["name"]) == ("base model", "chat model")
    tokens = chat["tokens"][chat["answer_from"] :]
    written = b"".join(bytes.fromhex(token["bytes"]) if "bytes" in token else token["text"].encode() for token in tokens)
    assert written.decode(errors="replace").strip() == chat["answer"]
    active = [each for token in chat["tokens"] for each in token["active"]]
    assert active and all(set(each) == {"latent", "v"} and each["v"] > 0 for each in active)
    assert client.post(LIVE, json=wanted_request).status_code == 403  # without an Origin, as for every post


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"turns": [', "The JSON could not be read"),
        ("[" * 100_000, "The JSON could not be read"),
        ("[1]", "the request has list"),
        ('{"prompt": "hi"}', "the request has ['prompt']; expected a JSON object with some of action, "),
        ('{"turns": "hi"}', "turns is not a list of messages"),
        ('{"turns": [{"role": "user"}]}', "turns is not a list of messages"),
        ('{"turns": [{"role": "user", "content": 3.5}], "length": true}', "length is True; expected a text or a number"),
        ('{"turns": [{"role": "user", "content": "hi"}], "length": 1000}', "the length is 1000 tokens"),
        ('{"action": "read"}', "the conversation is empty"),
    ],
)
def test_bad_json_is_named_in_json(client: Any, content: str, message: str) -> None:
    answer = client.post(LIVE, content=content, headers={**ORIGIN, "content-type": "application/json"})
    assert answer.status_code == 422 and message in answer.json()["error"]


def test_several_latents_are_steered_each_with_its_strength(coder: Coder) -> None:
    _, steered = wanted(coder, Form(steer="3, 5:0.5 7:-1", strength=4.0, mode="ablate"), "steer")
    assert steered.steering is not None and steered.steering.strengths == {3: 4.0, 5: 2.0, 7: -4.0}
    assert steered.name == "chat model, ablated: latents 3 at strength 4, 5 at strength 2, 7 at strength -4"
    with pytest.raises(UserError, match="there is no latent 99: BatchTopK has 64"):
        wanted(coder, Form(steer="3, 99"), "steer")
    with pytest.raises(UserError, match="13 latents are to be steered; at most 12"):
        wanted(coder, Form(steer=" ".join(map(str, range(13)))), "steer")


def test_a_concept_is_steered_with_its_latents(tmp_path: Path) -> None:
    written = Catalogue([write_run(tmp_path)])
    members = next(iter(written.concepts.values())).found.members
    for name in ("batchtopk", "l1"):
        own = written.coders["a-b-1", name]
        for concept in range(5):
            latents = sorted(members.filter(pl.col("concept") == concept, pl.col("training") == name)["latent"].to_list())
            form = Form(steer="50:2", concept=str(concept), strength=1.5)
            if latents:
                _, steered = wanted(own, form, "steer")
                assert steered.steering is not None
                assert steered.steering.strengths == {**dict.fromkeys(latents, 1.5), 50: 3.0}
                assert steered.name.startswith(f"chat model, concept {concept} added: latents {latents[0]} at strength 1.5")
            else:
                with pytest.raises(UserError, match=f"concept {concept} has no latent in"):
                    wanted(own, form, "steer")
    with pytest.raises(UserError, match="there is no concept 5"):
        wanted(own, Form(concept="5"), "steer")


def test_a_conversation_continues_with_either_answer(client: Any) -> None:
    address = asked(client, action="answer-both", length="4")
    answers = [text["answer"] for text in client.get(f"{address}.json").json()["texts"]]
    page = client.get(f"{address}?turn=1").text
    assert page.count('name="content"') == 3 and answers[1] in page and "strip" not in page
    assert client.get(f"{address}?turn=2").status_code == 404


def test_a_token_lists_its_latents_with_verdict_and_meaning(client: Any) -> None:
    address = asked(client, action="answer-chat", length="4", order="active")
    (text,) = client.get(f"{address}.json").json()["texts"]
    position = max(range(len(text["tokens"])), key=lambda at: len(text["tokens"][at]["active"]))
    page = client.get(f"{address}/text/0/token/{position}", headers={"hx-request": "true"}).text
    assert f"id {text['tokens'][position]['id']}" in page
    for each in text["tokens"][position]["active"]:
        assert f'href="{CODER}/latent/{each["latent"]}"' in page
    assert page.count('class="brief"') + page.count("never active") == len(text["tokens"][position]["active"])
    assert client.get(f"{address}/text/1/token/0").status_code == client.get(f"{address}/text/0/token/999").status_code == 404
