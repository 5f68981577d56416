"""The pages of the user's notes: the form on the pages of latents and concepts, the list of all notes, export and import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic import BaseModel, Field

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.concept_pages import ROOT as CONCEPTS
from crossdiff.dashboard.concept_pages import concept_page, concepts_with
from crossdiff.dashboard.concepts import Concepts
from crossdiff.dashboard.live_prompts import Pairs, posted
from crossdiff.dashboard.note_views import my_note, read_posted
from crossdiff.dashboard.pages import latent_page
from crossdiff.dashboard.records import NoteRecord, note_record
from crossdiff.dashboard.site import DATA, ROOT, Site, is_partial, json_body
from crossdiff.errors import UserError
from crossdiff.notes.exchange import NotesFile, export_notes, import_notes
from crossdiff.notes.note import LABEL, Note
from crossdiff.notes.store import Notebook, Stale
from crossdiff.report.cards import Display

CHOOSE = "Both texts are below: make one of them, and save."
FORM = "application/x-www-form-urlencoded"
OTHER_RESULTS = "The results were replaced since this page was opened, so the note may be about something else."


class NoteForm(BaseModel):
    """The form of a note."""

    star: Literal["yes", "no"] | None = None
    label: str | None = None
    comment: str | None = None
    list: str | None = Field(None, description="a list to be on; may be repeated")
    was: str | None = Field(
        None, description="a list that it was on; it is taken off unless `list` names it too; may be repeated"
    )


class MergedRecord(BaseModel):
    """On how many latents and concepts there were notes, and how many values were new."""

    subjects: int
    new: int


class Page(NamedTuple):
    """The page that a note was posted from: its template, its path, and what makes the values of the template."""

    template: str
    path: str
    values: Callable[[], dict[str, Any]]


class Row(NamedTuple):
    """A note in the list of all notes."""

    number: int
    address: str
    label: str | None
    note: Note


class Group(NamedTuple):
    """The notes on the latents of a crosscoder, or on the concepts of a run."""

    title: str
    path: str
    unit: str
    rows: list[Row]
    n_replaced: int
    lists: dict[str, int]


def add(app: FastAPI, site: Site) -> None:
    """Add the pages of notes."""

    form: dict[str, Any] = {"tags": [DATA], "response_model": NoteRecord, "openapi_extra": json_body(NoteForm, FORM)}

    @app.post(ROOT + "/latent/{latent}/notes", summary="Note on a latent", **form)
    async def note_latent(request: Request, run: str, name: str, latent: int) -> Response:
        """Write fields of a note; a field that is absent stays. With `Accept: application/json` the answer is the note."""
        return await write_latent(request=request, run=run, name=name, latent=latent, pairs=await posted(request))

    @site.in_turn
    def write_latent(request: Request, run: str, name: str, latent: int, pairs: Pairs) -> Response:
        coder = site.coder(run, name)
        row = site.row(coder, latent)
        page = Page("latent.html.j2", f"{coder.path}/latent/{latent}", lambda: latent_page(coder, row, Display(), None))
        return _written(site, request, coder.notes, latent, pairs, page)

    @app.post(CONCEPTS + "/{concept}/notes", summary="Note on a concept", **form)
    async def note_concept(request: Request, run: str, concept: int) -> Response:
        """As for a latent."""
        return await write_concept(request=request, run=run, concept=concept, pairs=await posted(request))

    @site.in_turn
    def write_concept(request: Request, run: str, concept: int, pairs: Pairs) -> Response:
        found = concepts_with(site, run, concept)
        page = Page("concept.html.j2", f"{found.path}/{concept}", lambda: concept_page(found, concept, Display(), None))
        return _written(site, request, found.notes, concept, pairs, page)

    @app.get("/notes")
    @site.in_turn
    def notes(merged: str = "") -> Response:
        return _notes_page(site, merged=merged)

    @app.get("/notes.json", tags=[DATA], response_model=NotesFile, summary="Your notes")
    @site.in_turn
    def notes_json(run: str = "") -> Response:
        """All notes with every value that they had; with `run`, those about the present results of one run."""
        if run and run not in site.catalogue.reports:
            raise HTTPException(404, "This dashboard has no such run.")
        own = {book.of for owner in _owners(site) if owner.run == run for book in [owner.notes]} if run else None
        name = f"notes-{run}.json" if run else "notes.json"
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(export_notes(site.catalogue.notes, own).model_dump_json(indent=1), 200, headers, "application/json")

    @app.post(
        "/notes/import", tags=[DATA], response_model=MergedRecord, summary="Merge notes", openapi_extra=json_body(NotesFile)
    )
    async def import_posted(request: Request) -> Response:
        """Merge notes that were exported: the newest value of each field counts, and all others are kept."""
        if request.headers.get("content-type", "").startswith("application/json"):
            return await merge(text=await request.body(), for_program=True)
        return await merge(text=dict(await posted(request)).get("notes", "").encode(), for_program=False)

    @site.in_turn
    def merge(text: bytes, for_program: bool) -> Response:
        try:
            merged = import_notes(site.catalogue.notes, text, "the text" if not for_program else "the request")
        except UserError as error:
            if for_program:
                return JSONResponse({"error": f"{error}."}, 422)
            return _notes_page(site, 422, problem=f"{error}.", typed=text.decode(errors="replace"))
        if for_program:
            return JSONResponse(MergedRecord(subjects=merged.n_subjects, new=merged.n_new).model_dump())
        return RedirectResponse(f"/notes?merged={merged.n_new}", 303)


def _written(site: Site, request: Request, book: Notebook, number: int, pairs: Pairs, page: Page) -> Response:
    """Write what was posted. What could not be written stays in the form, beside what is there now."""
    status, typed, problem, back = 200, {}, "", ""
    try:
        sent = read_posted(pairs)
        back = sent.back
        if sent.of and sent.of != book.of:
            raise UserError(OTHER_RESULTS)
        book.edit(number, sent.values, sent.seen)
    except Stale as stale:
        status, typed = 409, stale.mine
        problem = f"The {' and the '.join(typed)} was changed elsewhere since you opened the page. {CHOOSE}"
    except UserError as error:
        status, problem = (409 if str(error) == OTHER_RESULTS else 422), f"{error}".removesuffix(".") + "."
        typed = {key: value for key, value in pairs if key in (LABEL, "comment")}
    if "application/json" in request.headers.get("accept", ""):
        return _as_json(book.note(number), status, problem)
    shown = my_note(book, page.path, number, back, typed, problem)
    if is_partial(request):
        return site.page("my_note.html.j2", status, my=shown)
    if status != 200:
        return site.page(page.template, status, **page.values() | {"my": shown})
    return RedirectResponse(page.path + quote(back, safe="?=&%:+") + "#notes", 303)


def _as_json(note: Note, status: int, problem: str) -> JSONResponse:
    return JSONResponse(note_record(note).model_dump() | ({"error": problem} if problem else {}), status)


def _owners(site: Site) -> list[Coder | Concepts]:
    return [*site.catalogue.concepts.values(), *site.catalogue]


def _notes_page(site: Site, status: int = 200, merged: str = "", problem: str = "", typed: str = "") -> Response:
    groups = [group for owner in _owners(site) if (group := _group(owner)).rows or group.n_replaced]
    here = sum(len(group.rows) for group in groups)
    rest = sum(map(bool, site.catalogue.notes.all().values())) - here
    return site.page(
        "notes.html.j2", status, groups=groups, n_elsewhere=rest, file=str(site.catalogue.notes.path),
        n_merged=int(merged) if merged.isdecimal() else None, problem=problem or site.catalogue.notes.problem, typed=typed,
        runs=list(site.catalogue.reports),
    )  # fmt: skip


def _group(owner: Coder | Concepts) -> Group:
    is_coder = isinstance(owner, Coder)
    base = f"{owner.path}/latent" if is_coder else owner.path
    title = f"{owner.run} \N{MIDDLE DOT} {owner.title}" if isinstance(owner, Coder) else f"{owner.run} \N{MIDDLE DOT} Concepts"
    notes: Sequence[tuple[int, Note]] = sorted(owner.notes.by_number().items())
    rows = [Row(number, f"{base}/{number}", owner.label(number), note) for number, note in notes]
    return Group(title, owner.path, "latent" if is_coder else "concept", rows, owner.notes.replaced(), owner.notes.lists())
