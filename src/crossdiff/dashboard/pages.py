"""What each page shows, as values for its template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jinja2

from crossdiff.dashboard import charts
from crossdiff.dashboard.catalogue import Catalogue, Coder
from crossdiff.dashboard.queries import SHOWN, Query, page_of, select
from crossdiff.dashboard.search import Search
from crossdiff.report import figures as report_figures
from crossdiff.report import html, wording
from crossdiff.report.cards import LEVELS, example_view, sign_of
from crossdiff.report.environment import environment
from crossdiff.report.examples import visible
from crossdiff.report.figures import NU_RANGE, VERDICT_MARKS

OPEN_EXAMPLES = 4
MAX_ACTIVITY_ROWS = 14


def templates() -> jinja2.Environment:
    """The dashboard's templates over the report's, escaped like them."""
    made = environment()
    assert made.loader is not None
    made.loader = jinja2.ChoiceLoader([jinja2.PackageLoader("crossdiff.dashboard"), made.loader])
    made.auto_reload = False
    made.filters["words"] = wording.words
    made.filters["number"] = wording.number
    made.filters["share"] = wording.share
    made.filters |= {"cell": cell, "visible": visible}
    made.globals |= {"sign_of_verdict": sign_of_verdict, "levels": range(1, LEVELS + 1), "open_examples": OPEN_EXAMPLES}
    return made


def sign_of_verdict(verdict: str) -> Any:
    """The coloured sign of a verdict with its name."""
    return sign_of(wording.words(verdict), VERDICT_MARKS.get(verdict, VERDICT_MARKS["undecided"]))


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
        return f"{value:,.0f}" if column == "rank_sum" else wording.number(value)
    return wording.words(value) if column in ("verdict", "delta_norm_class") else str(value)


def home(catalogue: Catalogue) -> dict[str, Any]:
    """All runs: their health side by side, their norms laid over one another, and KL."""
    coders = list(catalogue)
    runs = [
        {
            "slug": slug,
            "title": html.title(report),
            "facts": html.facts(report),
            "answer": wording.answer(report),
            "names": [coder.title for coder in report.crosscoders],
            "health": html.health_rows(report),
            "coders": [coder for coder in coders if coder.run == slug],
            "caveats": html.caveats(report),
            "has_null": bool(report.null),
        }
        for slug, report in catalogue.reports.items()
    ]
    comparing = [coder for coder in coders if coder.compares]
    return {"runs": runs, "overlay": charts.norm_overlay(comparing) if comparing else None, "kl": charts.kl_bars(coders)}


def table(coder: Coder, query: Query, search: Search) -> dict[str, Any]:
    """A page of the latent table."""
    found = search.latents(query.search) if query.search else None
    columns = [*SHOWN, *(["explanation"] if coder.has_explanations else [])]
    columns += [column for column in query.show if column not in columns]
    return {
        "coder": coder,
        "query": query,
        "page": page_of(select(coder.table, query, found), query),
        "columns": columns,
        "schema": coder.table.schema,
        "verdicts": [verdict for verdict in wording.VERDICTS if verdict in set(coder.table["verdict"].unique())],
        "search_state": search.state,
    }


def coder_page(coder: Coder) -> dict[str, Any]:
    """One crosscoder: its answer in numbers and the figures that filter the table."""
    report_coder = coder.coder
    rows = [(name, values[coder.report.crosscoders.index(report_coder)]) for name, values in html.health_rows(coder.report)]
    histogram = None
    if coder.compares:
        histogram = report_figures.delta_norm_histogram(report_coder, report_figures.highest_bar([report_coder]))
    return {
        "health": rows,
        "histogram": histogram,
        "frequencies": report_figures.frequency_histogram(report_coder),
        "kl": charts.kl_bars([coder]),
        "note": charts.points_note(coder) if coder.compares else f"One decoder: {wording.ONE_DECODER}",
        "nu_range": NU_RANGE,
    }


def latent_page(coder: Coder, row: dict[str, Any], whole: bool, raw: bool) -> dict[str, Any]:
    """One latent."""
    latent = coder.latent(row)
    norms = row["norm_base"] + row["norm_chat"] if coder.compares else 0.0
    previous, following = coder.beside(row["latent"])
    activity = coder.activity(row["latent"])
    return {
        "coder": coder,
        "row": row,
        "card": coder.card(replace(latent, examples=())),
        "percentiles": coder.percentiles(row),
        "base_share": row["norm_base"] / norms if norms else None,
        "views": [example_view(example, latent, whole, raw) for example in latent.examples],
        "activity": activity[:MAX_ACTIVITY_ROWS],
        "n_activity": len(activity),
        "neighbours": coder.neighbours(row["latent"]),
        "twins": coder.twins(row["latent"]),
        "previous": previous,
        "following": following,
        "whole": whole,
        "raw": raw,
        "scores": _scores(row),
    }


def _scores(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Scores of the explanation, where there are any."""
    names = ("detection", "fuzzing", "embedding_explanation", "embedding_examples", "bag_of_words")
    found = [(wording.words(name), row.get(name)) for name in names]
    return [(name, wording.number(value)) for name, value in found if isinstance(value, float) and value == value]
