"""The web application: the address of each page. Every page works without JavaScript; with it, htmx swaps parts of a page."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp

from crossdiff.dashboard import (
    comparisons,
    concept_pages,
    live_pages,
    live_prompts,
    look_pages,
    note_pages,
    pages,
    program_pages,
)
from crossdiff.dashboard.briefs import briefs
from crossdiff.dashboard.catalogue import Catalogue
from crossdiff.dashboard.current import Current
from crossdiff.dashboard.live import Busy, Live
from crossdiff.dashboard.queries import LIST, parse
from crossdiff.dashboard.security import Guard
from crossdiff.dashboard.site import ROOT, Site, is_partial
from crossdiff.errors import UserError
from crossdiff.report.cards import Display

HERE = Path(__file__).parent
PLAIN = {"int_parsing": "expected a whole number", "bool_parsing": "expected true or false", "missing": "it is missing"}
"""What is wrong with a field of an address, by the name of pydantic's error."""


def create_app(
    catalogue: Catalogue,
    live: Live,
    cache: Path,
    host: str = "127.0.0.1",
    token: str | None = None,
    names: tuple[str, ...] = (),
    embed_in: tuple[str, ...] = (),
) -> ASGIApp:
    """The application behind its guard.

    Args:
        cache: folder of the search indexes, which are built in the background, and of live prompts.
        host: the address that the server listens on.
        token: secret that readers must present; None on loopback.
        names: further host names of the server.
        embed_in: origins whose pages may show cards in a frame.
    """
    return Guard(Current(Site(catalogue, live, cache), _application), host, token, names, embed_in)


def _application(site: Site) -> FastAPI:
    """The application that shows one set of results."""
    app = FastAPI(title="crossdiff", docs_url=None, redoc_url=None, openapi_url=None, responses=program_pages.ERRORS)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    program_pages.add(app, site)
    concept_pages.add(app, site)  # before those of a crosscoder, whose name is never `concepts` or `look`
    look_pages.add(app, site)
    _add_pages(app, site)
    live_pages.add(app, site)
    live_prompts.add(app, site)
    comparisons.add(app, site)
    note_pages.add(app, site)
    _add_errors(app, site)
    for search in site.search.values():
        search.start()
    return app


def _add_pages(app: FastAPI, site: Site) -> None:
    shared = HERE.parent / "report" / "templates"
    sheet, script = ((shared / name).read_text(encoding="utf-8") for name in ("report.css", "popover.js"))

    @app.get("/report.css")
    def report_css() -> Response:
        return Response(sheet, media_type="text/css", headers={"cache-control": "max-age=3600"})

    @app.get("/popover.js")
    def popover_js() -> Response:
        return Response(script, media_type="text/javascript", headers={"cache-control": "max-age=3600"})

    @app.get("/")
    @site.in_turn
    def home() -> HTMLResponse:
        return site.page("home.html.j2", **site.home())

    @app.get(ROOT)
    @site.in_turn
    def coder(request: Request, run: str, name: str) -> HTMLResponse:
        found = site.coder(run, name)
        query = parse(request.query_params.multi_items(), found.table.schema)
        values = pages.table(found, query, site.search[run, name], site.lists)
        status = 422 if query.entry.problem else 200  # the table stays, and the field is marked
        if is_partial(request):
            return site.page("table.html.j2", status, {"HX-Push-Url": found.path + query.address()}, **values)
        return site.page("coder.html.j2", status, **values, **site.coder_page(found))

    @app.get(ROOT + "/points.json")
    @site.in_turn
    def points(run: str, name: str, colour: str = "verdict") -> Response:
        if colour not in ("verdict", "template"):
            raise HTTPException(422, "colour must be verdict or template.")
        site.coder(run, name)
        headers = {"content-encoding": "gzip", "cache-control": "private, max-age=60"}
        return Response(site.points((run, name), colour), media_type="application/json", headers=headers)

    @app.get(ROOT + "/latents.{kind}")
    @site.in_turn
    def download(request: Request, run: str, name: str, kind: str) -> Response:
        found = site.coder(run, name)
        if kind not in ("csv", "parquet"):
            raise HTTPException(404, "The table can be downloaded as latents.csv or latents.parquet.")
        query = parse(request.query_params.multi_items(), found.table.schema)
        if query.entry.problem:
            raise UserError(query.entry.problem)
        rows = found.rows(site.lists.of(found, query).latents)
        file = f"{run}-{_file_part(name)}-latents.{kind}"
        return Response(
            _written(rows, kind),
            media_type="text/csv" if kind == "csv" else "application/vnd.apache.parquet",
            headers={"content-disposition": f'attachment; filename="{file}"'},
        )

    @app.get(ROOT + "/latent")
    @site.in_turn
    def go_to(run: str, name: str, number: int) -> Response:
        found = site.coder(run, name)
        site.row(found, number)
        return RedirectResponse(f"{found.path}/latent/{number}", 303)

    @app.get(ROOT + "/latent/{latent}")
    @site.in_turn
    def latent(
        request: Request, run: str, name: str, latent: int, context: str = "", whitespace: str = "", tint: str = ""
    ) -> HTMLResponse:
        found = site.coder(run, name)
        row, asked = site.row(found, latent), request.query_params.multi_items()
        listed = parse(asked, found.table.schema) if LIST in dict(asked) else None
        place = None if listed is None else site.lists.place(found, listed, latent)
        values = pages.latent_page(
            found, row, Display.of(context, whitespace, tint), place, "" if listed is None else listed.search
        )
        return site.page("latent.html.j2", **values)

    @app.get(ROOT + "/latent/{latent}/brief")
    @site.in_turn
    def brief(run: str, name: str, latent: int) -> HTMLResponse:
        found = site.coder(run, name)
        row = site.row(found, latent)
        return site.page("brief.html.j2", coder=found, row=row, brief=briefs(found, [latent])[latent])


def _file_part(name: str) -> str:
    return "".join(character if character.isascii() and character.isalnum() else "-" for character in name)


def _written(rows: pl.DataFrame, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "csv":
        # Spreadsheets would read a text that begins with one of these characters as a formula.
        texts = [name for name, kind in rows.schema.items() if kind == pl.String]
        rows.with_columns(pl.col(texts).str.replace(r"^([=+\-@\t\r])", "'$1")).write_csv(buffer)
    else:
        rows.write_parquet(buffer)
    return buffer.getvalue()


def _add_errors(app: FastAPI, site: Site) -> None:
    @app.exception_handler(UserError)
    def user_error(request: Request, error: UserError) -> Response:
        return site.problem(request, 422, f"{error}.")

    @app.exception_handler(Busy)
    def busy(request: Request, error: Busy) -> Response:
        return site.problem(request, 503, "Too many requests are waiting for the models. Try again in a moment.")

    @app.exception_handler(StarletteHTTPException)
    def http_error(request: Request, error: StarletteHTTPException) -> Response:
        message = "There is no such page." if error.detail == "Not Found" else str(error.detail)
        return site.problem(request, error.status_code, message)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        found = f"{first['loc'][-1]} is {str(first.get('input'))[:40]!r}"
        return site.problem(request, 422, f"{found}: {PLAIN.get(first['type'], first['msg'])}.")
