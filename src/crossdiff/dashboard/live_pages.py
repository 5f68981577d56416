"""Pages that need models: live prompts with answers and steering, the logit lens, and both models' view of an example."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qsl

import polars as pl
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.live import Live, Reading
from crossdiff.dashboard.live_form import MAX_TURNS, Form, Turn, edited, read_form, whole
from crossdiff.dashboard.site import ROOT, Site, is_partial
from crossdiff.errors import UserError, check_latents
from crossdiff.latents.ranking import plausible
from crossdiff.report.cards import ExampleView, Piece, example_view, pieces, prompt_view
from crossdiff.report.examples import Context, Token, visible
from crossdiff.report.reading import CANDIDATE_DELTA_NORM
from crossdiff.report.wording import number
from crossdiff.sources import BASE, CHAT, SOURCES

if TYPE_CHECKING:
    from crossdiff.causal.steering import Steering

SHOWN = 6
"""Latents that are shown unless the reader chooses some."""


@dataclass(frozen=True)
class Result:
    """What the page shows under the form."""

    reading: Reading | None = None
    strip: tuple[Piece, ...] = ()
    views: tuple[tuple[int, ExampleView], ...] = ()
    answers: tuple[tuple[str, str], ...] = ()
    problem: str = ""


async def posted(request: Request) -> list[tuple[str, str]]:
    """The fields of a posted form in their order. The guard has limited the size of the body."""
    body = await request.body()
    try:
        return parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200)
    except ValueError as error:
        raise HTTPException(422, "The form could not be read; load the page again.") from error


def act(live: Live, coder: Coder, form: Form, action: str) -> tuple[Form, Result]:
    """Do what a button stands for: change the form, read the text, or let the models answer."""
    changed = edited(form, action)
    if changed is not None:
        return changed, Result()
    if action == "read":
        return form, read(live, coder, form)
    if action in ("answer-base", "answer-chat", "answer-both"):
        models = SOURCES if action == "answer-both" else (action.removeprefix("answer-"),)
        texts = live.answer(coder, form.prompt(), [None] * len(models), models, form.length)
        answers = tuple((f"{model} model", text) for model, text in zip(models, texts, strict=True))
        if action != "answer-both" and form.kind == "chat":
            written = tuple(turn for turn in form.turns if turn.content.strip())
            form = replace(form, turns=(*written, Turn("assistant", texts[0]))[:MAX_TURNS])
        return form, replace(read(live, coder, form), answers=answers)
    if action == "steer":
        steering = _steering(coder, form)
        texts = live.answer(coder, form.prompt(), [None, steering], [form.model, form.model], form.length)
        what = f"latent {steering.latent} {'added' if form.mode == 'add' else 'ablated'}, strength {form.strength:g}"
        answers = ((f"{form.model} model, not steered", texts[0]), (f"{form.model} model with {what}", texts[1]))
        return form, replace(read(live, coder, form), answers=answers)
    raise UserError(f"there is no action {action[:40]!r}; load the page again")


def _steering(coder: Coder, form: Form) -> Steering:
    from crossdiff.causal.steering import Steering

    if not form.steer.strip():
        raise UserError("no latent to steer with is chosen; give its number, for example one from below the text")
    latent = whole(form.steer)
    check_latents([latent], coder.table.height, coder.title)
    choices: dict[str, Any] = {"mode": form.mode, "model": form.model, "tokens": form.tokens}
    return Steering(latent, strength=form.strength, **choices)


def read(live: Live, coder: Coder, form: Form) -> Result:
    """Run both models on the text. The strip shows the number of active latents per token, each view one latent."""
    chosen = form.latents() if form.order == "chosen" else []
    if form.order == "chosen" and not chosen:
        raise UserError("no latent is chosen; give numbers, or show the most active or most chat-specific ones")
    check_latents(chosen, coder.table.height, coder.title)
    reading = live.read(coder, form.prompt())
    if not chosen:
        leaning = coder.table.filter(plausible() & (pl.col("delta_norm") >= CANDIDATE_DELTA_NORM))
        ranks = dict(leaning.select("latent", "rank_sum").iter_rows())
        chosen = reading.strongest("active" if form.order == "active" else "specific", ranks, SHOWN)
    counts = reading.counts()
    strip = pieces(
        Context(_tokens(reading, counts.astype(float).tolist()), -1, False, False),
        float(max(counts.max(initial=1), 1)),
        unit="latents active",
    )
    return Result(reading, strip, tuple((latent, view_of(coder, reading, latent)) for latent in chosen))


def view_of(coder: Coder, reading: Reading, latent: int) -> ExampleView:
    """The text tinted by the activation of one latent."""
    row = coder.row(latent)
    assert row is not None
    values = reading.of(latent).tolist()
    highest = max(row["max_activation"], *values) or 1.0
    origin = f"maximum {number(max(values))} here, {number(row['max_activation'])} in the analysed text"
    return prompt_view(origin, _tokens(reading, values), highest)


def _tokens(reading: Reading, values: list[float]) -> tuple[Token, ...]:
    return tuple(map(Token, reading.texts, reading.flags, values, reading.ids, reading.data))


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
        form = Form()
        try:
            form = read_form(pairs)
            form, result = act(site.live, coder, form, dict(pairs).get("action", "read"))
        except UserError as error:
            result = Result(problem=f"{error}.")
        return page(coder, form, result, is_partial(request))

    @app.get(ROOT + "/live/{key}/token/{position}")
    @site.in_turn
    def token(request: Request, run: str, name: str, key: str, position: int) -> HTMLResponse:
        coder = site.coder(run, name)
        reading = site.live.recall(coder, key)
        if reading is None:
            raise HTTPException(404, "This text is no longer in memory. Read it again.")
        if not 0 <= position < len(reading.texts):
            raise HTTPException(404, f"The text has no token {position}: it has {len(reading.texts)}, counted from 0.")
        active = [(latent, v, coder.row(latent)) for latent, v in reading.at(position)]
        template = "token.html.j2" if is_partial(request) else "token_page.html.j2"
        return site.page(template, coder=coder, position=position, active=active, text=visible(reading.texts[position]))

    @app.get(ROOT + "/latent/{latent}/lens")
    @site.waits
    def lens(request: Request, run: str, name: str, latent: int) -> HTMLResponse:
        coder = site.coder(run, name)
        site.row(coder, latent)
        template = "lens.html.j2" if is_partial(request) else "lens_page.html.j2"
        return site.page(template, coder=coder, latent=latent, directions=site.live.lens(coder, latent))

    @app.get(ROOT + "/latent/{latent}/sides/{number}")
    @site.waits
    def sides(request: Request, run: str, name: str, latent: int, number: int) -> HTMLResponse:
        coder = site.coder(run, name)
        record = coder.latent(site.row(coder, latent))
        if not 0 <= number < len(record.examples):
            raise HTTPException(404, f"Latent {latent} has no example {number}: it has {len(record.examples)}, counted from 0.")
        example = record.examples[number]
        found = site.live.sides(coder, latent, example.tokens.ids)
        at = example.position
        highest = float(max(abs(found.base).max(), abs(found.chat).max(), 1e-9))
        views = []
        for model, parts in ((BASE, found.base), (CHAT, found.chat)):
            side = replace(example, tokens=example.tokens.with_activations(parts), activation=float(parts[at]))
            view = example_view(side, highest)
            views.append(view._replace(origin=f"{model} side: {parts[at]:+.2f} at the marked token"))
        template = "sides.html.j2" if is_partial(request) else "sides_page.html.j2"
        return site.page(template, coder=coder, latent=latent, views=views, sides=found, at=at, v=example.activation)
