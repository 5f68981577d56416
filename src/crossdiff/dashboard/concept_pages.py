"""The pages of the concepts: the list of a run's concepts, and one page per concept."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlencode

from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from crossdiff.dashboard.concepts import LIST_PAGE, TRAINING_NUS, Concepts
from crossdiff.dashboard.lists import Place, kept
from crossdiff.dashboard.note_views import my_note
from crossdiff.dashboard.queries import page_numbers, parse_noted
from crossdiff.dashboard.site import Site
from crossdiff.report import concept_wording, wording
from crossdiff.report.cards import Display
from crossdiff.report.chain import MEANINGS, RATIOS
from crossdiff.report.records import RunReport
from crossdiff.report.tables import estimate

ROOT = "/run/{run}/concepts"
MAX_ACTIVITY_ROWS = 14


def add(app: FastAPI, site: Site) -> None:
    """Add the pages to the application."""

    @app.get(ROOT)
    @site.in_turn
    def concepts(run: str, verdict: str = "", every: bool = False, page: int = 1, noted: str = "") -> Response:
        found = _concepts_of(site, run)
        if found is None:
            return RedirectResponse("/", 303)
        _check_verdict(verdict)
        chosen = Chosen(verdict, every, parse_noted({"noted": noted}))
        return site.page("concept_list.html.j2", **_list(found, site.catalogue.reports[run], chosen, page))

    @app.get(ROOT + "/{concept}")
    @site.in_turn
    def concept(
        run: str,
        concept: int,
        context: str = "",
        whitespace: str = "",
        tint: str = "",
        verdict: str = "",
        every: bool | None = None,
        noted: str = "",
    ) -> HTMLResponse:
        found = concepts_with(site, run, concept)
        _check_verdict(verdict)
        chosen = None if every is None else Chosen(verdict, every, parse_noted({"noted": noted}))
        place = None if chosen is None else _place(found, concept, chosen)
        values = concept_page(found, concept, Display.of(context, whitespace, tint), place)
        return site.page("concept.html.j2", **values)


class Chosen(NamedTuple):
    """Which concepts a list has, see `Concepts.chosen`."""

    verdict: str
    every: bool
    noted: str

    @property
    def carried(self) -> str:
        """The query part of the address of a concept that was opened from the list."""
        noted = {"noted": self.noted} if self.noted else {}
        return "?" + urlencode({"verdict": self.verdict, "every": str(self.every).lower(), **noted})

    def of(self, concepts: Concepts) -> list[int]:
        return concepts.chosen(self.verdict or None, self.every, self.noted)


def concepts_with(site: Site, run: str, concept: int) -> Concepts:
    """The concepts of a run that has this one."""
    found = _concepts_of(site, run)
    if found is None or not 0 <= concept < found.found.table.height:
        n = 0 if found is None else found.found.table.height
        raise HTTPException(404, f"There is no concept {concept}: this run has {n}.")
    return found


def _concepts_of(site: Site, run: str) -> Concepts | None:
    if run not in site.catalogue.reports:
        raise HTTPException(404, "This dashboard has no such run.")
    return site.catalogue.concepts.get(run)


def _check_verdict(verdict: str) -> None:
    if verdict and verdict not in wording.VERDICTS:
        raise HTTPException(422, f"verdict must be one of {', '.join(wording.VERDICTS)}.")


def _place(concepts: Concepts, number: int, chosen: Chosen) -> Place | None:
    """Where a concept is in a list; None if the list does not have it."""
    numbers, carried = chosen.of(concepts), chosen.carried
    if number not in numbers:
        return None
    at = numbers.index(number)
    previous, following = (numbers[i] if 0 <= i < len(numbers) else None for i in (at - 1, at + 1))
    path = f"{concepts.path}{carried}&page={at // LIST_PAGE + 1}#row-{number}"
    return Place(at + 1, len(numbers), previous, following, path, carried)


def _list(concepts: Concepts, report: RunReport, chosen: Chosen, page: int) -> dict[str, Any]:
    """A page of the list of concepts."""
    numbers = chosen.of(concepts)
    n_pages = max(1, -(-len(numbers) // LIST_PAGE))
    at = min(max(1, page), n_pages)
    return {
        "concepts": concepts,
        "headline": concept_wording.lead(report),
        "introduction": [*concept_wording.introduction(concepts.found), *concept_wording.controls(concepts.found)],
        "rows": concepts.rows(numbers[(at - 1) * LIST_PAGE : at * LIST_PAGE]),
        "n_rows": len(numbers),
        "counts": concepts.counts(chosen.every),
        "verdict": chosen.verdict,
        "every": chosen.every,
        "noted": chosen.noted,
        "notes": concepts.notes.by_number(),
        "can_choose": concepts.found.summary.needed is not None,
        "carried": chosen.carried,
        "page_numbers": page_numbers(at, n_pages),
        "page": at,
        "n_pages": n_pages,
    }


def concept_page(concepts: Concepts, number: int, display: Display, place: Place | None) -> dict[str, Any]:
    """The page of one concept; `place` is its place in the list that it was opened from."""
    n = concepts.found.table.height
    beside = (number - 1 if number else None, number + 1 if number + 1 < n else None)
    previous, following = beside if place is None else (place.previous, place.following)
    activity = concepts.activity(number)
    trainings = [row | {nu: wording.interval(estimate(row, nu)) for nu in TRAINING_NUS} for row in concepts.trainings(number)]
    verdict = concepts.found.table["verdict"][number]
    return {
        "concepts": concepts,
        "number": number,
        "card": concepts.card(number),
        "key": concept_wording.RUNGS,
        "views": concepts.views(number, display),
        "histogram_of": concepts.histogram(number),
        "has_strengths": concepts.database.has_strengths,
        "members": concepts.members(number),
        "coders": concepts.coders(number),
        "steps": concepts.steps(number),
        "ratios": RATIOS,
        "changes": MEANINGS,
        "shown": kept(None, display),
        "trainings": trainings,
        "differs": any(row["verdict"] != verdict for row in trainings),
        "nus": TRAINING_NUS,
        "promoted": concepts.promoted(number),
        "activity": activity[:MAX_ACTIVITY_ROWS],
        "n_activity": len(activity),
        "my": my_note(concepts.notes, f"{concepts.path}/{number}", number, "" if place is None else place.carried),
        "place": place,
        "previous": previous,
        "following": following,
        "display": display,
        "kept": partial(kept, place, display),
    }
