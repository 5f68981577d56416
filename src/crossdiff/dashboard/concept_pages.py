"""The pages of the concepts: the list of a run's concepts, and one page per concept."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from crossdiff.dashboard.concepts import LIST_PAGE, TRAINING_NUS, Concepts
from crossdiff.dashboard.site import Site
from crossdiff.report import concept_wording, wording
from crossdiff.report.cards import Display
from crossdiff.report.records import RunReport
from crossdiff.report.tables import estimate

ROOT = "/run/{run}/concepts"
MAX_ACTIVITY_ROWS = 14


def add(app: FastAPI, site: Site) -> None:
    """Add the pages to the application."""

    @app.get(ROOT)
    @site.in_turn
    def concepts(run: str, verdict: str = "", every: bool = False, page: int = 1) -> Response:
        found = _concepts_of(site, run)
        if found is None:
            return RedirectResponse("/", 303)
        if verdict and verdict not in wording.VERDICTS:
            raise HTTPException(422, f"verdict must be one of {', '.join(wording.VERDICTS)}.")
        return site.page("concept_list.html.j2", **_list(found, site.catalogue.reports[run], verdict, every, page))

    @app.get(ROOT + "/{concept}")
    @site.in_turn
    def concept(run: str, concept: int, context: str = "around", whitespace: str = "signs", tint: str = "all") -> HTMLResponse:
        found = _concepts_of(site, run)
        if found is None or not 0 <= concept < found.found.table.height:
            n = 0 if found is None else found.found.table.height
            raise HTTPException(404, f"There is no concept {concept}: this run has {n}.")
        values = _page(found, concept, Display(context == "whole", whitespace == "raw", tint == "each"))
        return site.page("concept.html.j2", **values)


def _concepts_of(site: Site, run: str) -> Concepts | None:
    if run not in site.catalogue.reports:
        raise HTTPException(404, "This dashboard has no such run.")
    return site.catalogue.concepts.get(run)


def _list(concepts: Concepts, report: RunReport, verdict: str, every: bool, page: int) -> dict[str, Any]:
    """A page of the list of concepts."""
    numbers = concepts.chosen(verdict or None, every)
    n_pages = max(1, -(-len(numbers) // LIST_PAGE))
    at = min(max(1, page), n_pages)
    return {
        "concepts": concepts,
        "headline": concept_wording.lead(report),
        "introduction": [*concept_wording.introduction(concepts.found), *concept_wording.controls(concepts.found)],
        "rows": concepts.rows(numbers[(at - 1) * LIST_PAGE : at * LIST_PAGE]),
        "n_rows": len(numbers),
        "counts": concepts.counts(every),
        "verdict": verdict,
        "every": every,
        "can_choose": concepts.found.summary.needed is not None,
        "page": at,
        "n_pages": n_pages,
    }


def _page(concepts: Concepts, number: int, display: Display) -> dict[str, Any]:
    """The page of one concept."""
    activity = concepts.activity(number)
    trainings = [row | {nu: wording.interval(estimate(row, nu)) for nu in TRAINING_NUS} for row in concepts.trainings(number)]
    return {
        "concepts": concepts,
        "number": number,
        "card": concepts.card(number),
        "key": concept_wording.RUNGS,
        "views": concepts.views(number, display),
        "histogram_of": concepts.histogram(number),
        "has_strengths": concepts.database.has_strengths,
        "members": concepts.members(number),
        "trainings": trainings,
        "nus": TRAINING_NUS,
        "promoted": concepts.promoted(number),
        "activity": activity[:MAX_ACTIVITY_ROWS],
        "n_activity": len(activity),
        "previous": number - 1 if number else None,
        "following": number + 1 if number + 1 < concepts.found.table.height else None,
        "display": display,
    }
