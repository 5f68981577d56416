"""The pages of a run's first look: its section of the report, the texts tinted by KL, and prompts of the reader's own."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse

from crossdiff.dashboard.live_form import Form, edited, read_form
from crossdiff.dashboard.live_prompts import posted
from crossdiff.dashboard.looks import PAGE, RunLook
from crossdiff.dashboard.site import Site, is_partial
from crossdiff.errors import UserError
from crossdiff.report.cards import ExampleView

ROOT = "/run/{run}/look"


def add(app: FastAPI, site: Site) -> None:
    """Add the pages to the application."""

    def look_of(run: str) -> RunLook:
        found = site.catalogue.looks.get(run)
        if found is None:
            raise HTTPException(404, "This dashboard has no first look at such a run; `crossdiff look` makes one.")
        return found

    @app.get(ROOT)
    @site.in_turn
    def look(run: str) -> HTMLResponse:
        found = look_of(run)
        return site.page("look_page.html.j2", look=found, section=found.section)

    @app.get(ROOT + "/texts")
    @site.in_turn
    def texts(run: str, page: int = 1, document: int | None = None) -> HTMLResponse:
        found = look_of(run)
        numbers = found.documents["document"]
        n_pages = max(1, -(-len(numbers) // PAGE))
        at = min(max(1, page), n_pages)
        if document is None:
            shown = numbers[(at - 1) * PAGE : at * PAGE].to_list()
        elif document in numbers:
            shown = [document]
        else:
            raise HTTPException(404, f"The first look did not read document {document}; the list has those that it read.")
        views = [view for number in shown for view in found.text(number)]
        return site.page(
            "look_texts.html.j2", look=found, views=views, page=at, n_pages=n_pages, document=document, n_documents=len(numbers)
        )

    def prompt_page(
        look: RunLook, form: Form, view: ExampleView | None = None, problem: str = "", partial: bool = False
    ) -> HTMLResponse:
        template = "look_form.html.j2" if partial else "look_prompt.html.j2"
        return site.page(template, 422 if problem and not partial else 200, look=look, form=form, view=view, problem=problem)

    @app.get(ROOT + "/prompt")
    @site.in_turn
    def prompt(run: str) -> HTMLResponse:
        return prompt_page(look_of(run), Form())

    @app.post(ROOT + "/prompt")
    @site.waits
    def read(request: Request, run: str, pairs: Annotated[list[tuple[str, str]], Depends(posted)]) -> HTMLResponse:
        found, form, partial = look_of(run), Form(), is_partial(request)
        try:
            form = read_form(pairs)
            changed = edited(form, dict(pairs).get("action", "read"))
            if changed is not None:
                return prompt_page(found, changed, partial=partial)
            view = found.prompt(site.live.predictions(found, form.prompt()))
        except UserError as error:
            return prompt_page(found, form, problem=f"{error}.", partial=partial)
        return prompt_page(found, form, view, partial=partial)
