"""Pages of live prompts. A request that was carried out has an address of its own, where Back, reload and others find it."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.live import Busy, Hear
from crossdiff.dashboard.live_actions import Done, Lost, as_json, carry_out, keep, members, recall
from crossdiff.dashboard.live_form import Form, continued, edited, read_form, read_json, whole
from crossdiff.dashboard.live_records import LiveRecord, LiveRequest
from crossdiff.dashboard.live_stream import BUSY, MEDIA_TYPE, Line, stream
from crossdiff.dashboard.live_views import Shown, active_on, shared_character, show
from crossdiff.dashboard.site import DATA, ROOT, Site, is_partial, json_body
from crossdiff.errors import UserError
from crossdiff.report.examples import visible

Pairs = list[tuple[str, str]]


async def posted(request: Request) -> Pairs:
    """The fields of a posted form, or of a JSON object, in their order. The guard has limited the size of the body."""
    body = await request.body()
    try:
        if _sends_json(request):
            return read_json(json.loads(body))
        return parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200)
    except UserError as error:
        raise HTTPException(422, f"{error}.") from error
    except (ValueError, RecursionError) as error:
        what = "JSON" if _sends_json(request) else "form"
        raise HTTPException(422, f"The {what} could not be read; send it again.") from error


def _sends_json(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip() == "application/json"


def _accepts(request: Request, media_type: str) -> bool:
    """Whether a program asks for this format; browsers name HTML."""
    return media_type in request.headers.get("accept", "")


def add(app: FastAPI, site: Site) -> None:
    """Add the pages of live prompts."""

    def address(coder: Coder, key: str) -> str:
        return f"{coder.path}/live/{key}"

    def page(
        coder: Coder,
        form: Form,
        shown: Shown | None = None,
        problem: str = "",
        status: int = 200,
        partial: bool = False,
        headers: dict[str, str] | None = None,
        continues: bool = False,
    ) -> HTMLResponse:
        template = "live_form.html.j2" if partial else "live.html.j2"
        named = named_concept(coder, form.concept)
        values = {
            "coder": coder,
            "form": form,
            "named": named,
            "shown": shown,
            "problem": problem,
            "not_kept": site.kept.problem,
        }
        return site.page(template, 200 if partial else status, headers, continues=continues, **values)

    def named_concept(coder: Coder, typed: str) -> dict[str, Any] | str:
        """The concept of the form with its latents, or why there is none."""
        if coder.concepts is None or not typed.strip():
            return {}
        try:
            number = whole(typed.strip())
            latents = members(coder, number)
        except UserError as problem:
            return f"{problem}."
        return {"path": f"{coder.concepts.path}/{number}", "row": coder.concepts.rows([number])[0], "latents": latents}

    def failed(coder: Coder, form: Form, pairs: Pairs, problem: str, status: int, partial: bool) -> HTMLResponse:
        """A problem beside what is shown and typed, which stays."""
        if partial:
            headers = {"HX-Retarget": "#problem", "HX-Reswap": "innerHTML"}
            return site.page("live_problem.html.j2", 200, headers, problem=problem)
        return page(coder, form, shown_on(coder, pairs), problem, status)

    def shown_on(coder: Coder, pairs: Pairs) -> Shown | None:
        """The result on the page that was sent; None if there was none, or it is not kept any more."""
        key = dict(pairs).get("shown", "")
        try:
            return show(coder, recall(site.kept, coder, key), key)
        except Lost:
            return None

    def data(coder: Coder, done: Done, key: str, status: int = 200) -> JSONResponse:
        own = address(coder, key)
        return JSONResponse(as_json(coder, done, own), status, {"location": own} if status == 201 else None)

    def error(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": message}, status)

    @app.get(ROOT + "/live")
    @site.in_turn
    def live_page(run: str, name: str, latent: int | None = None, concept: int | None = None) -> HTMLResponse:
        coder = site.coder(run, name)
        if concept is not None:
            members(coder, concept)
            return page(coder, Form(concept=str(concept)))
        if latent is None:
            return page(coder, Form())
        site.row(coder, latent)
        return page(coder, Form(order="chosen", chosen=str(latent), steer=str(latent)))

    @app.post(
        ROOT + "/live",
        tags=[DATA], status_code=201, response_model=LiveRecord, summary="A live prompt",
        openapi_extra=json_body(LiveRequest),
    )  # fmt: skip
    async def live_act(request: Request, run: str, name: str) -> Response:
        """Both models read a prompt, or answer it and read it with the answer."""
        try:
            pairs = await posted(request)
        except HTTPException as refused:
            if _sends_json(request):
                return error(refused.status_code, refused.detail)
            raise
        if not _accepts(request, MEDIA_TYPE):
            return await act(request=request, run=run, name=name, pairs=pairs)
        coder = site.coder(run, name)

        def answer(hear: Hear) -> Line:
            done = carry_out(site.live, coder, read_form(pairs), dict(pairs).get("action", "read"), hear)
            return {"address": address(coder, keep(site.kept, coder, done))}

        return stream(site.live, answer)

    @site.waits
    def act(request: Request, run: str, name: str, pairs: Pairs) -> Response:
        coder, form, action = site.coder(run, name), Form(), dict(pairs).get("action", "read")
        for_program = _sends_json(request) or _accepts(request, "application/json")
        try:
            form = read_form(pairs)
            changed = None if for_program else edited(form, action)
            if changed is not None:
                return page(coder, changed, shown_on(coder, pairs), partial=is_partial(request))
            done = carry_out(site.live, coder, form, action)
        except UserError as problem:
            if for_program:
                return error(422, f"{problem}.")
            return failed(coder, form, pairs, f"{problem}.", 422, is_partial(request))
        except Busy:
            return error(503, BUSY) if for_program else failed(coder, form, pairs, BUSY, 503, is_partial(request))
        key = keep(site.kept, coder, done)
        return data(coder, done, key, 201) if for_program else RedirectResponse(address(coder, key), 303)

    @app.post(ROOT + "/live/stop/{answer}")
    async def stop(run: str, name: str, answer: str) -> Response:
        site.coder(run, name)
        found = site.live.stops.get(answer)
        if found is None:
            raise HTTPException(404, "This answer is not being written any more.")
        found.set()
        return Response(status_code=204)

    @app.get(ROOT + "/live/concept")
    @site.in_turn
    def concept_name(run: str, name: str, concept: str = "") -> HTMLResponse:
        return site.page("live_concept.html.j2", named=named_concept(site.coder(run, name), concept))

    @app.get(ROOT + "/live/{key}.json", tags=[DATA], response_model=LiveRecord, summary="A live prompt that was kept")
    @site.in_turn
    def kept_json(run: str, name: str, key: str) -> Response:
        """A prompt that was carried out before, by the key in its address."""
        coder = site.coder(run, name)
        try:
            return data(coder, recall(site.kept, coder, key), key)
        except Lost as lost:
            return error(lost.status, str(lost))

    @app.get(ROOT + "/live/{key}")
    @site.in_turn
    def kept_page(request: Request, run: str, name: str, key: str, turn: int | None = None) -> Response:
        coder = site.coder(run, name)
        is_json = _accepts(request, "application/json")
        try:
            done = recall(site.kept, coder, key)
        except Lost as lost:
            if is_json:
                return error(lost.status, str(lost))
            return page(coder, lost.form, problem=str(lost), status=lost.status, partial=is_partial(request))
        if is_json:
            return data(coder, done, key)
        if turn is not None:
            answers = [part.answer for part in done.parts]
            if not 0 <= turn < len(answers) or answers[turn] is None:
                raise HTTPException(404, f"There is no answer {turn}: this request has {len(answers)}, counted from 0.")
            return page(coder, continued(done.form, str(answers[turn])), continues=True)
        headers = {"HX-Push-Url": address(coder, key)}
        return page(coder, done.next_form, show(coder, done, key), partial=is_partial(request), headers=headers)

    @app.get(ROOT + "/live/{key}/text/{number}/token/{position}")
    @site.in_turn
    def token(request: Request, run: str, name: str, key: str, number: int, position: int) -> HTMLResponse:
        coder = site.coder(run, name)
        try:
            parts = recall(site.kept, coder, key).parts
        except Lost as lost:
            raise HTTPException(lost.status, str(lost)) from None
        if not 0 <= number < len(parts):
            raise HTTPException(404, f"There is no text {number}: this request has {len(parts)}, counted from 0.")
        reading = parts[number].reading
        if not 0 <= position < len(reading.texts):
            raise HTTPException(404, f"The text has no token {position}: it has {len(reading.texts)}, counted from 0.")
        template = "token.html.j2" if is_partial(request) else "token_page.html.j2"
        return site.page(
            template,
            coder=coder,
            address=address(coder, key),
            number=number,
            position=position,
            last=len(reading.texts) - 1,
            token_id=reading.ids[position],
            by=parts[number].name,
            written=position >= reading.answer_from,
            text=visible(reading.texts[position]),
            shared=shared_character(reading, position),
            active=active_on(coder, reading, position),
        )
