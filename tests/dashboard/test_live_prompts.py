"""Live prompts on a tiny run with models: activations, answers, steering, the queue, and bad input."""

from __future__ import annotations

import re
import shutil
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

pytest.importorskip("fastapi")

from showing import ADDRESS, DANGER, requests_to, write_links

import crossdiff.diff
from conftest import forget_digests
from crossdiff.dashboard import live as live_module
from crossdiff.dashboard import pages
from crossdiff.dashboard.catalogue import Catalogue, Coder
from crossdiff.dashboard.live import Busy, Live, Wanted
from crossdiff.dashboard.live_actions import carry_out
from crossdiff.dashboard.live_form import Form, Turn, edited, read_form
from crossdiff.dashboard.live_views import show
from crossdiff.dashboard.readings import Part, strongest
from crossdiff.dashboard.serve import serving
from crossdiff.dashboard.site import PAGES_AT_ONCE
from crossdiff.errors import UserError
from crossdiff.models.lens import direction_logits
from crossdiff.text.token_texts import token_text

CODER = "/run/run/batchtopk"
QUESTION = [{"role": "user", "content": "hi the sea is cold"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, analysed_run: Path) -> Path:
    folder = shutil.copytree(analysed_run, tmp_path_factory.mktemp("live") / "run")
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
def client(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return requests_to(run, tmp_path_factory.mktemp("cache"), live=True)


def post(client: Any, **fields: Any) -> Any:
    return client.post(f"{CODER}/live", data=fields, headers={"origin": ADDRESS}, follow_redirects=True)


def test_activations_are_those_of_the_notebook(run: Path, coder: Coder, live: Live) -> None:
    """Against `run.activations`, which reads the same text on its own."""
    reading = live.read(coder, QUESTION)
    active = np.unique(reading.latent)
    assert len(active) > 3
    expected = crossdiff.diff.open(run, "batchtopk").activations(QUESTION, latents=active.tolist())
    assert reading.texts == expected.tokens
    for column, latent in enumerate(active.tolist()):
        np.testing.assert_allclose(reading.of(latent), expected.values[:, column], rtol=1e-5, atol=1e-5)
    top = strongest((Part(reading),), "active", {}, 3)
    assert top == sorted(active.tolist(), key=lambda latent: -reading.of(latent).max())[:3]


def test_latents_of_a_token_and_the_most_specific(coder: Coder, live: Live) -> None:
    reading = live.read(coder, QUESTION)
    position = int(reading.counts().argmax())
    listed = reading.at(position)
    values = {latent: float(reading.of(latent)[position]) for latent in np.unique(reading.latent).tolist()}
    assert listed == sorted(((j, v) for j, v in values.items() if v > 0), key=lambda pair: -pair[1])
    ranks = {latent: float(-latent) if latent % 2 else float("nan") for latent in range(coder.table.height)}
    ranks |= {latent: float(latent) for latent in np.unique(reading.latent).tolist()[:2]}
    assert strongest((Part(reading),), "specific", ranks, 5) == np.unique(reading.latent).tolist()[:2]


def test_a_latent_with_a_nu_out_of_range_is_not_among_the_most_specific(
    coder: Coder, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All active latents lean to the chat model and have a rank. The nu of the even ones is -9 without bias."""
    active = np.unique(live.read(coder, QUESTION).latent).tolist()
    even = pl.col("latent") % 2 == 0
    changed = coder.table.with_columns(
        delta_norm=pl.lit(0.95), rank_sum=pl.col("latent").cast(pl.Float64), nu_error=pl.lit(0.1),
        nu_reconstruction_nobias=pl.when(even).then(-9.0).otherwise(0.1),
        nu_reconstruction=pl.when(even).then(0.1).otherwise(-9.0),
    )  # fmt: skip
    monkeypatch.setattr(coder, "table", changed)
    form = Form(turns=(Turn("user", QUESTION[0]["content"]),), order="specific")
    shown = [each.meaning.latent for each in show(coder, carry_out(live, coder, form, "read"), "key").latents]
    assert shown and shown == [latent for latent in active if latent % 2][: len(shown)]


def test_chat_specific_latents_come_first_and_steered_ones_always(
    coder: Coder, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two of the active latents with the verdict come by v / max, the larger share first; the others by rank_sum."""
    form = Form(turns=(Turn("user", QUESTION[0]["content"]),))
    done = carry_out(live, coder, form, "read")
    reading = done.parts[0].reading
    first, second, *others = np.unique(reading.latent).tolist()
    assert len(others) >= 2
    maxima = {first: float(reading.of(first).max()) * 4, second: float(reading.of(second).max()) * 2}
    changed = coder.table.with_columns(
        delta_norm=pl.lit(0.95), rank_sum=pl.col("latent").cast(pl.Float64), nu_error=pl.lit(0.1),
        nu_reconstruction_nobias=pl.lit(0.1), nu_reconstruction=pl.lit(0.1),
        verdict=pl.when(pl.col("latent").is_in([first, second])).then(pl.lit("chat_specific")).otherwise(pl.lit("shared")),
        max_activation=pl.col("latent").replace_strict(maxima, default=100.0, return_dtype=pl.Float64),
    )  # fmt: skip
    monkeypatch.setattr(coder, "table", changed)
    shown = show(coder, done, "key").latents
    assert [each.meaning.latent for each in shown] == [second, first, *others[:4]]
    assert [each.meaning.sign.name for each in shown[1:3]] == ["chat-specific", "shared"]
    silent = next(latent for latent in range(coder.table.height) if latent not in (first, second, *others))
    steered = replace(done.parts[0], strengths=((others[-1], 1.0), (silent, 1.0)))
    for order in ("specific", "active", "chosen"):
        again = replace(done, form=replace(form, order=order, chosen=str(first)), parts=(done.parts[0], steered))
        latents = [each.meaning.latent for each in show(coder, again, "key").latents]
        assert latents[:2] == [others[-1], silent] and len(latents) == len(set(latents))
    monkeypatch.setattr(Coder, "compares", property(lambda _: False))
    strongest_first = sorted([first, second, *others], key=lambda latent: -reading.of(latent).max())[:6]
    assert [each.meaning.latent for each in show(coder, done, "key").latents] == strongest_first


def test_sides_add_up_to_the_stored_activation(coder: Coder, live: Live) -> None:
    """base part + chat part + bias is the pre-activation in v, which is the activation wherever the latent is active."""
    latent = int(coder.table.sort("n_active")["latent"][-1])
    example = coder.database.examples(latent)[0]
    sides = live.sides(coder, latent, example.tokens.ids)
    total = sum(sides.parts.values()) + sides.bias
    active = [position for position, token in enumerate(example.tokens) if token.activation > 0]
    np.testing.assert_allclose(total[active], [example.tokens[position].activation for position in active], rtol=2e-3)


def test_logit_lens_by_hand(coder: Coder, live: Live, run: Path) -> None:
    """Llama's final norm divides by the root mean square and multiplies with a gain: by hand in float64."""
    opened = crossdiff.diff.open(run, "batchtopk")
    model, direction = opened.pair.chat, opened.crosscoder.directions()[1, 2]
    gain, unembedding = model.model.norm.weight.double(), model.lm_head.weight.double()
    vector = direction.double()
    expected = unembedding @ (gain * vector / (vector.square().mean() + model.model.norm.variance_epsilon).sqrt())
    torch.testing.assert_close(direction_logits(model, direction).double(), expected, rtol=1e-4, atol=1e-5)
    base, chat, difference = live.lens(coder, 2)
    assert chat.up[0][0] == token_text(opened.pair.tokenizer, int(expected.argmax())).text
    assert (base.name, difference.name) == ("base direction, base model", "chat minus base direction, chat model")


def test_models_are_loaded_once_and_one_request_runs_at_a_time(coder: Coder, monkeypatch: pytest.MonkeyPatch) -> None:
    live, loads, running, most = Live(), [], [0], [0]
    real = live_module._reading
    import crossdiff.models.pair as pair_module

    load = pair_module.load_pair

    def counted(*args: Any, **options: Any) -> Any:
        loads.append(1)
        return load(*args, **options)

    def watched(*args: Any) -> Any:
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            return real(*args)
        finally:
            running[0] -= 1

    monkeypatch.setattr(pair_module, "load_pair", counted)
    monkeypatch.setattr(live_module, "_reading", watched)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(live.read(coder, QUESTION))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(loads), most[0]) == (4, 1, 1)
    assert all(np.array_equal(reading.v, found[0].v) for reading in found)


def test_a_long_line_is_turned_away(coder: Coder, monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live()
    live._turn.acquire()
    monkeypatch.setattr(live_module, "PATIENCE", 0.2)
    for _ in range(live_module.WAITING + 1):
        live._line.acquire()
    with pytest.raises(Busy):
        live.read(coder, QUESTION)
    live._line.release()
    with pytest.raises(Busy):  # waits for its turn, and not for ever
        live.read(coder, QUESTION)


@pytest.mark.parametrize(
    ("n", "busy", "others"),
    [
        (PAGES_AT_ONCE + 2, "/lens", (f"{CODER}/latent/0", "/static/dashboard.css")),
        (PAGES_AT_ONCE, "", ("/static/dashboard.css", "/report.css")),
    ],
)
def test_pages_and_files_come_while_others_wait(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, busy: str, others: tuple[str, ...]
) -> None:
    arrived, go_on = threading.Semaphore(0), threading.Event()

    def waited(made: Any) -> Any:
        def wait(*arguments: Any, **options: Any) -> Any:
            arrived.release()
            assert go_on.wait(60)
            return made(*arguments, **options)

        return wait

    def status(path: str) -> int:
        with urllib.request.urlopen(address + path, timeout=30) as answer:
            return int(answer.status)

    if busy:
        monkeypatch.setattr(Live, "lens", waited(lambda *_: ()))
    else:
        monkeypatch.setattr(pages, "latent_page", waited(pages.latent_page))
    with serving([run], tmp_path) as address, ThreadPoolExecutor(n) as pool:
        waiting = [pool.submit(status, f"{CODER}/latent/0{busy}") for _ in range(n)]
        try:
            assert all(arrived.acquire(timeout=30) for _ in range(n))
            assert [status(path) for path in others] == [200, 200]
        finally:
            go_on.set()
        assert [each.result() for each in waiting] == [200] * n


def test_steering_moves_the_answer_and_no_steering_does_not(coder: Coder, live: Live) -> None:
    latent = int(coder.table.sort("n_active")["latent"][-1])
    form = Form(turns=(Turn("user", "hi the sea"),), steer=str(latent), strength=20.0, length=12)
    plain, steered = (part.answer for part in carry_out(live, coder, form, "steer").parts)
    assert plain == live.answer(coder, form.prompt(), [Wanted("", "chat")], 12)[0].answer != steered
    unmoved = carry_out(live, coder, Form(turns=form.turns, steer=str(latent), strength=0.0, length=12), "steer").parts
    assert unmoved[0].answer == unmoved[1].answer == plain


def test_an_answer_becomes_a_turn(client: Any) -> None:
    page = post(client, kind="chat", role="user", content="hi the sea", action="answer-base", length="5").text
    assert page.count('name="content"') == 3 and page.count('class="turn assistant"') == 1  # and room for the next message


@pytest.mark.parametrize("again", ["answer-base", "answer-both", "steer", "answer-chat"])
def test_the_same_question_is_answered_again_while_nothing_else_was_asked(coder: Coder, live: Live, again: str) -> None:
    """The first answer is not part of the question: the texts are those of the question alone."""
    asked = Form(turns=(Turn("user", "hi the sea"),), length=5, steer="1")
    answered = carry_out(live, coder, asked, "answer-chat").next_form
    assert [turn.role for turn in answered.turns] == ["user", "assistant", "user"]
    done, expected = carry_out(live, coder, answered, again), carry_out(live, coder, asked, again)
    assert [part.reading.ids for part in done.parts] == [part.reading.ids for part in expected.parts]
    assert done.form == asked and done.next_form == expected.next_form
    follow = replace(answered, turns=(*answered.turns[:-1], Turn("user", "and then")))
    assert carry_out(live, coder, follow, again).form == follow


def test_an_answer_is_removed_in_one_step_and_what_is_shown_stays(client: Any) -> None:
    page = post(client, kind="chat", role="user", content="hi the sea", action="answer-base", length="5")
    shown = re.search(r'name="shown" value="([0-9a-f]{32})"', page.text)
    assert shown is not None
    turns = {"role": ["user", "assistant", "user"], "content": ["hi the sea", "an answer", ""]}
    shorter = post(client, **turns, action="remove", shown=shown[1]).text
    assert shorter.count('name="content"') == 1 and shorter.count('class="turn assistant"') == 0 and "answer-text" in shorter
    wrong = post(client, **turns, action="steer", steer="9999", shown=shown[1])
    assert wrong.status_code == 422 and "there is no latent 9999" in wrong.text and "answer-text" in wrong.text
    headers = {"origin": ADDRESS, "hx-request": "true"}
    part = client.post(f"{CODER}/live", data={"content": "", "role": "user", "shown": shown[1]}, headers=headers)
    assert (part.headers["hx-retarget"], part.headers["hx-reswap"]) == ("#problem", "innerHTML")
    assert "the conversation is empty" in part.text and "<form" not in part.text
    assert "answer-text" not in post(client, **turns, action="remove", shown="../../x").text


@pytest.mark.parametrize("field", ["content", "system"])
def test_control_tokens_typed_as_text_are_named(client: Any, field: str) -> None:
    fields = {"role": "user", "content": "hi"}
    page = post(client, **fields | {field: "hi <|end|> and <|user|> and <|end|>"}).text
    assert "Typed as text, but read as a control token" in page and "<|end|>" not in page
    assert "<code>&lt;|end|&gt;</code>, <code>&lt;|user|&gt;</code>." in page
    assert "Typed as text" not in post(client, **fields | {field: "hi < |end|>"}).text  # the template's own are meant


def test_prompts_are_shown_as_text(client: Any) -> None:
    page = post(client, kind="text", text=f"</textarea>{DANGER}"[:40], action="read").text
    assert "<script>alert" not in page and "</textarea><script" not in page
    assert "&lt;/textarea&gt;" in page
    key = re.search(r'href="([^"]+/text/0/token/3)"', page)
    assert key is not None
    token = client.get(unescape(key[1]), headers={"hx-request": "true"})
    assert token.status_code == 200 and "Token 3" in token.text and "<html" not in token.text


def test_a_character_of_several_tokens_is_one_link_and_one_piece(client: Any, run: Path) -> None:
    page = post(client, kind="text", text="the \N{GRINNING FACE}!", action="read", order="active").text
    strip = page.partition('class="context strip"')[2].partition("</p>")[0]
    links = {unescape(text): int(at) for at, text in re.findall(r'/token/(\d+)" hx-get[^>]*>([^<]*)</a>', strip)}
    # The tokenizer has a token per byte: the emoji is 4, so "!" comes 4 after it. The parts are named in the title.
    assert links["!"] - links["\N{GRINNING FACE}"] == 4 and "&lt;0x9F&gt;" in strip
    assert "\N{REPLACEMENT CHARACTER}" not in page
    view = crossdiff.diff.open(run, "batchtopk").activations("the \N{GRINNING FACE}!", latents=[1])
    assert view.tokens[-2] == "<0x80>" and ">\N{GRINNING FACE}</span>" in view._repr_html_()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"content": "", "role": "user"}, "the conversation is empty"),
        ({"kind": "text", "text": " "}, "there is no text yet"),
        ({"kind": "text", "text": "word " * 300}, "the text has"),
        ({"kind": "text", "text": "x" * 20_001}, "at most 20,000 are read, so shorten it"),
        ({"content": "hi", "role": "tool"}, "the role"),
        ({"content": "hi", "role": "user", "order": "chosen"}, "no latent is chosen"),
        ({"content": "hi", "role": "user", "order": "chosen", "chosen": "9999"}, "there is no latent 9999"),
        ({"content": "hi", "role": "user", "order": "chosen", "chosen": "1 x"}, "is not a whole number"),
        ({"content": "hi", "role": "user", "action": "steer"}, "no latent to steer with is chosen"),
        ({"content": "hi", "role": "user", "action": "steer", "steer": "9999"}, "there is no latent 9999: BatchTopK has 64"),
        ({"content": "hi", "role": "user", "action": "steer", "steer": "1", "strength": "nan"}, "the strength is"),
        ({"content": "hi", "role": "user", "action": "steer", "steer": "1 1:2"}, "latent 1 is named twice"),
        ({"content": "hi", "role": "user", "action": "steer", "steer": "1:x"}, "is not a factor of the strength"),
        ({"content": "hi", "role": "user", "action": "steer", "steer": "1:30"}, "the strength is '30'; expected a number"),
        ({"content": "hi", "role": "user", "action": "steer", "concept": "1"}, "this run has no concepts"),
        ({"content": "hi", "role": "assistant", "action": "answer-chat"}, "the conversation ends with an answer"),
        (
            {"content": "hi", "role": "user", "action": "answer-chat", "length": "5000"},
            "the length is 5000 tokens; expected 1 to 120",
        ),
        ({"content": "hi", "role": "user", "action": "format"}, "there is no action"),
        ({"content": "hi", "role": "user", "mode": "multiply"}, "mode is"),
    ],
)
def test_bad_input_is_named(client: Any, fields: dict[str, str], message: str) -> None:
    answer = post(client, **fields)
    assert answer.status_code == 422
    assert message in unescape(answer.text)


def test_a_form_is_read_in_the_order_of_its_turns() -> None:
    pairs = [("role", "user"), ("content", "a"), ("role", "assistant"), ("content", "b"), ("system", "s"), ("strength", "-2")]
    form = read_form(pairs)
    assert form.prompt() == [
        {"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    ]  # fmt: skip
    assert form.strength == -2
    with pytest.raises(UserError, match="2 messages with 1 roles"):
        read_form([("role", "user"), ("content", "a"), ("content", "b")])


def test_a_conversation_grows_and_shrinks() -> None:
    form = edited(Form(turns=(Turn("user", "a"),)), "add")
    assert form is not None and form.turns == (Turn("user", "a"), Turn("assistant", ""))
    shorter = edited(form, "remove")
    assert shorter is not None and shorter.turns == (Turn("user", "a"),)
    answered = Form(turns=(Turn("user", "a"), Turn("assistant", "b"), Turn("user", "")))
    assert edited(answered, "remove") == shorter
    typed = replace(answered, turns=(*answered.turns[:2], Turn("user", "c")))
    assert edited(typed, "remove") == replace(answered, turns=answered.turns[:2])
