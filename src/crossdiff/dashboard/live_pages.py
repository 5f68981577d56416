"""The live page: a text or conversation, what is active on it, what the models answer, and what they answer steered."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qsl

import polars as pl
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.live import MAX_LATENTS, MAX_NEW_TOKENS, MAX_STRENGTH, Live, Prompt, Reading
from crossdiff.errors import UserError
from crossdiff.report.cards import example_view, pieces, prompt_view
from crossdiff.report.examples import Context, Token, visible
from crossdiff.report.reading import CANDIDATE_DELTA_NORM
from crossdiff.report.wording import number

if TYPE_CHECKING:
    from crossdiff.causal.steering import Steering
    from crossdiff.dashboard.app import Site

ROOT = "/run/{run}/{name}"
MAX_TURNS = 20
SHOWN = 6
MODELS = ("base", "chat")
CHOICES = {
    "kind": ("chat", "text"), "order": ("active", "specific", "chosen"), "mode": ("add", "ablate"), "model": ("chat", "base"),
    "tokens": ("all", "prompt", "template", "generated"),
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: str
    content: str


@dataclass(frozen=True)
class Form:
    """What the reader has typed and chosen; the page shows it again with the result."""

    kind: str = "chat"
    text: str = ""
    system: str = ""
    turns: tuple[Turn, ...] = (Turn("user", ""),)
    order: str = "specific"
    chosen: str = ""
    steer: str = ""
    mode: str = "add"
    strength: float = 1.0
    model: str = "chat"
    tokens: str = "all"
    length: int = 60

    def prompt(self) -> Prompt:
        """The text or messages that the models read.

        Raises:
            UserError: nothing was typed.
        """
        if self.kind == "text":
            if not self.text.strip():
                raise UserError("there is no text yet: type some, then read it")
            return self.text
        system = [{"role": "system", "content": self.system}] if self.system.strip() else []
        turns = [{"role": turn.role, "content": turn.content} for turn in self.turns if turn.content.strip()]
        if not turns:
            raise UserError("the conversation is empty: type a message, then read it")
        return [*system, *turns]

    def latents(self) -> list[int]:
        """The chosen latents."""
        words = self.chosen.replace(",", " ").split()
        if len(words) > MAX_LATENTS:
            raise UserError(f"{len(words)} latents are chosen; at most {MAX_LATENTS} are shown at once")
        return [_whole(word) for word in words]


@dataclass(frozen=True)
class Result:
    """What the page shows under the form."""

    reading: Reading | None = None
    strip: tuple[Any, ...] = ()
    views: tuple[tuple[int, Any], ...] = ()
    answers: tuple[tuple[str, str], ...] = ()
    problem: str = ""


async def posted(request: Request) -> list[tuple[str, str]]:
    """The fields of a posted form, in their order; the guard has bounded the body."""
    body = await request.body()
    try:
        return parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200)
    except ValueError as error:
        raise HTTPException(422, "The form could not be read; load the page again.") from error


def read_form(pairs: list[tuple[str, str]]) -> Form:
    """A form from its fields.

    Raises:
        UserError: a choice that there is not, or a number that is none.
    """
    last = dict(pairs)
    roles, contents = ([value for key, value in pairs if key == name] for name in ("role", "content"))
    if len(roles) != len(contents) or len(roles) > MAX_TURNS:
        raise UserError(f"the conversation has {len(contents)} messages with {len(roles)} roles; at most {MAX_TURNS} are read")
    if wrong := [role for role in roles if role not in ("user", "assistant")]:
        raise UserError(f"the role {wrong[0][:40]!r} is not one of user and assistant")
    for key, choices in CHOICES.items():
        if last.get(key, choices[0]) not in choices:
            raise UserError(f"{key} is {last[key][:40]!r}; expected one of {', '.join(choices)}")
    turns = tuple(Turn(role, content) for role, content in zip(roles, contents, strict=True)) or (Turn("user", ""),)
    texts = {
        key: last[key]
        for key in ("kind", "text", "system", "order", "chosen", "steer", "mode", "model", "tokens")
        if key in last
    }
    return Form(turns=turns, strength=_strength(last.get("strength", "1")), length=_length(last.get("length", "60")), **texts)


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_STRENGTH:
        raise UserError(f"the strength is {text[:40]!r}; expected a number from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}")
    return value


def _length(text: str) -> int:
    value = _whole(text)
    if not 1 <= value <= MAX_NEW_TOKENS:
        raise UserError(f"{value} tokens are asked for; an answer has 1 to {MAX_NEW_TOKENS}")
    return value


def _whole(text: str) -> int:
    if not (text.strip().isdecimal() and len(text) < 10):
        raise UserError(f"{text[:40]!r} is no whole number")
    return int(text)


def act(live: Live, coder: Coder, form: Form, action: str) -> tuple[Form, Result]:
    """Do what a button says: change the form, read the text, let models answer.

    Raises:
        Busy: too many requests wait. UserError: what was typed cannot be read, or there is no such button or latent.
    """
    if action == "add":
        role = "assistant" if form.turns[-1].role == "user" else "user"
        if len(form.turns) >= MAX_TURNS:
            raise UserError(f"a conversation has at most {MAX_TURNS} messages here")
        return replace(form, turns=(*form.turns, Turn(role, ""))), Result()
    if action == "remove":
        return replace(form, turns=form.turns[:-1] or (Turn("user", ""),)), Result()
    if action == "read":
        return form, read(live, coder, form)
    if action in ("answer-base", "answer-chat", "answer-both"):
        models = MODELS if action == "answer-both" else (action.removeprefix("answer-"),)
        texts = live.answer(coder, form.prompt(), [None] * len(models), models, form.length)
        answers = tuple((f"{model} model", text) for model, text in zip(models, texts, strict=True))
        if action != "answer-both" and form.kind == "chat":
            said = tuple(turn for turn in form.turns if turn.content.strip())
            form = replace(form, turns=(*said, Turn("assistant", texts[0]))[:MAX_TURNS])
        return form, replace(read(live, coder, form), answers=answers)
    if action == "steer":
        steering = _steering(coder, form)
        texts = live.answer(coder, form.prompt(), [None, steering], [form.model, form.model], form.length)
        what = f"latent {steering.latent} {'added' if form.mode == 'add' else 'taken out'}, strength {form.strength:g}"
        answers = ((f"{form.model} model as it is", texts[0]), (f"{form.model} model with {what}", texts[1]))
        return form, replace(read(live, coder, form), answers=answers)
    raise UserError(f"there is no action {action[:40]!r}")


def _steering(coder: Coder, form: Form) -> Steering:
    from crossdiff.causal.steering import Steering

    if not form.steer.strip():
        raise UserError("which latent? give its number to steer with; the latents below the text have theirs")
    latent = _whole(form.steer)
    if coder.row(latent) is None:
        raise UserError(f"there is no latent {latent} to steer with: {coder.title} has {coder.table.height:,}")
    choices: dict[str, Any] = {"mode": form.mode, "model": form.model, "tokens": form.tokens}
    return Steering(latent, strength=form.strength, **choices)


def read(live: Live, coder: Coder, form: Form) -> Result:
    """Both models read the text; the strip shows how many latents each token has, the views one latent each."""
    chosen = form.latents() if form.order == "chosen" else []
    if form.order == "chosen" and not chosen:
        raise UserError("no latent is chosen: give numbers, or show the most active or most chat-specific ones")
    if missing := [latent for latent in chosen if coder.row(latent) is None]:
        raise UserError(f"there is no latent {missing[0]}: {coder.title} has {coder.table.height:,}")
    reading = live.read(coder, form.prompt())
    if not chosen:
        leaning = coder.table.filter(pl.col("delta_norm") >= CANDIDATE_DELTA_NORM)
        ranks = dict(leaning.select("latent", "rank_sum").iter_rows())
        chosen = reading.strongest("active" if form.order == "active" else "specific", ranks, SHOWN)
    views = tuple((latent, view_of(coder, reading, latent)) for latent in chosen)
    counts = reading.counts()
    tokens = tuple(
        Token(text, flags, float(count)) for text, flags, count in zip(reading.texts, reading.flags, counts, strict=True)
    )
    strip = pieces(Context(tokens, -1, False, False), float(max(counts.max(initial=1), 1)))
    return Result(reading, strip, views)


def view_of(coder: Coder, reading: Reading, latent: int) -> Any:
    """The text tinted by one latent."""
    row = coder.row(latent)
    assert row is not None
    values = reading.of(latent).tolist()
    highest = max(row["max_activation"], *values) or 1.0
    origin = f"maximum {number(max(values))} here, {number(row['max_activation'])} in the analysed text"
    tokens = tuple(Token(*token) for token in zip(reading.texts, reading.flags, values, strict=True))
    return prompt_view(origin, tokens, highest)


def add(app: FastAPI, site: Site) -> None:
    """Add the pages that need models."""

    def page(coder: Coder, form: Form, result: Result, partial: bool) -> HTMLResponse:
        template = "live_form.html.j2" if partial else "live.html.j2"
        return site.page(template, 422 if result.problem and not partial else 200, coder=coder, form=form, result=result)

    @app.get(ROOT + "/live")
    @site.in_turn
    def live_page(run: str, name: str, latent: int | None = None) -> HTMLResponse:
        coder = site.coder(run, name)
        if latent is None:
            return page(coder, Form(), Result(), partial=False)
        site.row(coder, latent)
        return page(coder, Form(order="chosen", chosen=str(latent), steer=str(latent)), Result(), partial=False)

    @app.post(ROOT + "/live")
    @site.waits
    def live_act(
        request: Request, run: str, name: str, pairs: Annotated[list[tuple[str, str]], Depends(posted)]
    ) -> HTMLResponse:
        coder = site.coder(run, name)
        partial = request.headers.get("hx-request") == "true"
        form = Form()
        try:
            form = read_form(pairs)
            form, result = act(site.live, coder, form, dict(pairs).get("action", "read"))
        except UserError as error:
            result = Result(problem=f"{error}.")
        return page(coder, form, result, partial)

    @app.get(ROOT + "/live/{key}/token/{position}")
    @site.in_turn
    def token(request: Request, run: str, name: str, key: str, position: int) -> HTMLResponse:
        coder = site.coder(run, name)
        reading = site.live.recall(key)
        if reading is None:
            raise HTTPException(404, "This text is no longer remembered. Read it again.")
        if not 0 <= position < len(reading.texts):
            raise HTTPException(404, f"The text has {len(reading.texts)} tokens, from 0.")
        active = [(latent, v, coder.row(latent)) for latent, v in reading.at(position)]
        values: dict[str, Any] = {"coder": coder, "position": position, "active": active}
        values["text"] = visible(reading.texts[position])
        partial = request.headers.get("hx-request") == "true"
        return site.page("token.html.j2" if partial else "token_page.html.j2", **values)

    @app.get(ROOT + "/latent/{latent}/lens")
    @site.waits
    def lens(request: Request, run: str, name: str, latent: int) -> HTMLResponse:
        coder = site.coder(run, name)
        site.row(coder, latent)
        values: dict[str, Any] = {"coder": coder, "latent": latent, "directions": site.live.lens(coder, latent)}
        partial = request.headers.get("hx-request") == "true"
        return site.page("lens.html.j2" if partial else "lens_page.html.j2", **values)

    @app.get(ROOT + "/latent/{latent}/sides/{number}")
    @site.waits
    def sides(request: Request, run: str, name: str, latent: int, number: int) -> HTMLResponse:
        coder = site.coder(run, name)
        record = coder.latent(site.row(coder, latent))
        if not 0 <= number < len(record.examples):
            raise HTTPException(404, f"Latent {latent} has {len(record.examples)} examples, from 0.")
        example = record.examples[number]
        found = site.live.sides(coder, latent, example.tokens.ids)
        highest = float(max(found.base.max(), found.chat.max(), 1e-9))
        views = []
        for model, parts in (("base", found.base), ("chat", found.chat)):
            side = replace(example, tokens=example.tokens.with_activations(parts), activation=float(parts[example.position]))
            view = example_view(side, replace(record, max_activation=highest))
            origin = f"{model} side: {parts[example.position]:+.2f} at the marked token"
            views.append(replace(view, origin=origin))
        partial = request.headers.get("hx-request") == "true"
        at = example.position
        values: dict[str, Any] = {"coder": coder, "latent": latent, "views": views, "sides": found, "at": at}
        values["v"] = example.activation
        return site.page("sides.html.j2" if partial else "sides_page.html.j2", **values)
