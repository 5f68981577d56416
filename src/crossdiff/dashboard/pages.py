"""The values that each page passes to its template."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jinja2

from crossdiff.dashboard import charts
from crossdiff.dashboard.briefs import briefs, with_words
from crossdiff.dashboard.catalogue import Catalogue, Coder
from crossdiff.dashboard.concepts import ConceptRow, Concepts
from crossdiff.dashboard.lists import Lists, Place, kept
from crossdiff.dashboard.note_views import my_note
from crossdiff.dashboard.queries import MINOR, SHOWN, Query, page_numbers
from crossdiff.dashboard.search import Found, Search
from crossdiff.latents.ranking import RANKS, title
from crossdiff.report import concept_wording, figures, overview, wording
from crossdiff.report.cards import Display, example_views
from crossdiff.report.chain import MEANINGS, RATIOS
from crossdiff.report.examples import visible
from crossdiff.report.figures import AGAINST, NU_RANGE, NUS, scaling_note
from crossdiff.report.marks import Sign, sign_of, verdict_mark
from crossdiff.report.plotly_figures import for_page
from crossdiff.report.templating import environment

MAX_ACTIVITY_ROWS, HOME_CONCEPTS, SIDE_EXAMPLES = 14, 12, 5


def templates() -> jinja2.Environment:
    """The dashboard's templates, which use those of the report and are escaped like them."""
    made = environment()
    assert made.loader is not None
    made.loader = jinja2.ChoiceLoader([jinja2.PackageLoader("crossdiff.dashboard"), made.loader])
    made.auto_reload = False
    made.filters |= {"number": wording.number, "share": wording.share, "cell": cell, "visible": visible, "title_of": title}
    made.globals["sign_of_verdict"] = sign_of_verdict
    return made


def sign_of_verdict(verdict: str) -> Sign:
    """The name of a verdict with its coloured glyph."""
    return sign_of(wording.words(verdict), verdict_mark(verdict))


def cell(value: Any, column: str) -> str:
    """A value of the latent table as text."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if column == "latent" else f"{value:,}"
    if isinstance(value, float):
        if value != value:
            return "\N{EN DASH}"
        if column.startswith(("frequency", "share_")):
            return wording.share(value)
        return f"{value:,.0f}" if column in RANKS else wording.number(value)
    return wording.words(value) if column in ("verdict", "delta_norm_class") else str(value)


def home(catalogue: Catalogue) -> dict[str, Any]:
    """The overview: each run's answer and health, and delta_norm and KL of all crosscoders in one figure each."""
    coders = list(catalogue)
    runs = [
        {
            "slug": slug,
            "title": overview.title(report),
            "facts": overview.facts(report),
            "headline": concept_wording.lead(report),
            "concepts": catalogue.concepts.get(slug),
            "look": catalogue.looks.get(slug),
            "rows": partial(_first_concepts, catalogue.concepts.get(slug)),  # whose labels may change
            "one_decoder": wording.one_decoder(report),
            "answer": wording.answer(report),
            "names": [coder.title for coder in report.crosscoders],
            "health": overview.health_rows(report),
            "coders": [coder for coder in coders if coder.run == slug],
            "caveats": overview.caveats(report),
            "has_null": bool(report.null),
        }
        for slug, report in catalogue.reports.items()
    ]
    comparing = [coder for coder in coders if coder.compares]
    return {
        "runs": runs,
        "untrained": [look for slug, look in catalogue.looks.items() if slug not in catalogue.reports],
        "overlay": charts.norm_overlay(comparing) if comparing else None,
        "kl": charts.kl_bars(coders),
        "kl_replaced": any(concept_wording.set_aside(coder.directory, f"causal-{coder.name}") for coder in coders),
    }


def _first_concepts(concepts: Concepts | None) -> list[ConceptRow]:
    """The first concepts of the list: those that only the chat model has, or all if there are none."""
    if concepts is None:
        return []
    specific = concepts.chosen("chat_specific", every=False)
    return concepts.rows((specific or concepts.chosen(None, every=False))[:HOME_CONCEPTS])


def table(coder: Coder, query: Query, search: Search, lists: Lists) -> dict[str, Any]:
    """A page of the latent table."""
    page, found = lists.page(coder, query), lists.of(coder, query).found
    columns = [*SHOWN, *(column for column in query.show if column not in SHOWN)]
    return {
        "coder": coder,
        "query": query,
        "page": page,
        "page_numbers": page_numbers(page.number, page.n_pages),
        "briefs": briefs(coder, [row["latent"] for row in page.rows], query.search),
        "matches": None if found is None else match_words(found, page.n_rows),
        "n_adjacent": 0 if found is None else found.n_adjacent,
        "columns": columns,
        "minor": [column for column in MINOR if column not in (query.column, *query.show)],
        "schema": coder.table.schema,
        "verdicts": [verdict for verdict in wording.VERDICTS if verdict in set(coder.table["verdict"].unique())],
        "search_state": search.state,
        "notes": coder.notes.by_number(),
    }


def match_words(found: Found, n_shown: int) -> str:
    """Where the latents of a search have its words."""
    rest = len(found.latents) - found.n_explained - found.n_active
    counted = (
        (found.n_explained, "in their explanation"), (found.n_active, "on tokens on which they are active"),
        (rest, "only elsewhere in the text of their examples"),
    )  # fmt: skip
    parts = [f"{n:,} {where}" for n, where in counted if n]
    filtered = "" if n_shown == len(found.latents) else f", of which the filters leave {n_shown:,}"
    first = f". {found.n_adjacent:,} {'has' if found.n_adjacent == 1 else 'have'} them side by side" if found.n_adjacent else ""
    return f"{wording.latents(len(found.latents))} with these words: {', '.join(parts)}{filtered}{first}" if parts else ""


def coder_page(coder: Coder) -> dict[str, Any]:
    """The page of a crosscoder: its health, and the figures that filter the table."""
    report_coder = coder.coder
    place = coder.report.crosscoders.index(report_coder)
    histogram = None
    if coder.compares:
        histogram = for_page(figures.delta_norm_histogram(report_coder, figures.highest_bar([report_coder])))
    return {
        "no_concepts": concept_wording.missing(coder.report),
        "health": [(row.name, row.values[place], row.meaning) for row in overview.health_rows(coder.report)],
        "histogram": histogram,
        "frequencies": for_page(figures.frequency_histogram(report_coder)),
        "kl": charts.kl_bars([coder]),
        "note": scaling_note(coder.table) if coder.compares else f"One decoder: {wording.ONE_DECODER}",
        "nus": NUS,
        "against": AGAINST,
        "nu_range": NU_RANGE,
    }


def latent_page(coder: Coder, row: dict[str, Any], display: Display, place: Place | None, search: str = "") -> dict[str, Any]:
    """The page of a latent; `place` is its place in the list that it was opened from, `search` what that list looked for."""
    latent = coder.latent(row)
    norms = row["norm_base"] + row["norm_chat"] if coder.compares else 0.0
    back = "" if place is None else place.carried
    previous, following = coder.beside(row["latent"]) if place is None else (place.previous, place.following)
    activity = coder.activity(row["latent"])
    concepts = coder.concepts
    concept = None if concepts is None else concepts.of_latent(coder.name, row["latent"])
    return {
        "coder": coder,
        "concept": concept,
        "concept_title": None if concepts is None or concept is None else concepts.title(concept),
        "no_concepts": concept_wording.missing(coder.report),
        "row": row,
        "card": coder.card(replace(latent, examples=())),
        "percentiles": coder.percentiles(row),
        "base_share": row["norm_base"] / norms if norms else None,
        "views": with_words(example_views(latent.examples, latent.max_activation, display), search),
        "search": search,
        "has_strengths": coder.database.has_strengths,
        "correlated": coder.database.correlated(row["latent"]),
        "activity": activity[:MAX_ACTIVITY_ROWS],
        "n_activity": len(activity),
        "steps": coder.steps(row["latent"]),
        "ratios": RATIOS,
        "changes": MEANINGS,
        "neighbours": coder.neighbours(row["latent"]),
        "twins": coder.twins(row["latent"]),
        "promoted": coder.promoted(row["latent"]),
        "my": my_note(coder.notes, f"{coder.path}/latent/{row['latent']}", row["latent"], back),
        "place": place,
        "previous": previous,
        "following": following,
        "display": display,
        "kept": partial(kept, place, display),
        "shown": kept(None, display),
        "scores": _scores(row),
    }


def beside_page(coder: Coder, row: dict[str, Any]) -> dict[str, Any]:
    """One of two latents that are shown side by side."""
    latent = coder.latent(row, SIDE_EXAMPLES, 0)
    concepts = coder.concepts
    concept = None if concepts is None else concepts.of_latent(coder.name, row["latent"])
    return {
        "coder": coder,
        "row": row,
        "card": coder.card(replace(latent, examples=())),
        "concept": concept,
        "concept_title": None if concepts is None or concept is None else concepts.title(concept),
        "views": example_views(latent.examples, latent.max_activation, Display()),
    }


def _scores(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The defined scores of the latent's explanation."""
    names = ("detection", "fuzzing", "embedding_explanation", "embedding_examples", "bag_of_words")
    found = [(wording.words(name), row.get(name)) for name in names]
    return [(name, wording.number(value)) for name, value in found if isinstance(value, float) and value == value]
