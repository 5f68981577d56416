"""Jinja2 templates of the report, and its cards as fragments for a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from crossdiff.latents.ranking import RANKED, title
from crossdiff.report.cards import LEVELS, Card, ExampleView
from crossdiff.report.concept_cards import ConceptCard
from crossdiff.report.records import SAME

if TYPE_CHECKING:
    from crossdiff.notes.note import Note
    from crossdiff.report.look import LookSection

OPEN_EXAMPLES = 3
"""Examples of a card that are visible without unfolding."""


def environment() -> jinja2.Environment:
    """The templates: values are escaped, and a name without a value is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("crossdiff.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters["script_json"] = _script_json
    made.globals |= {"levels": range(1, LEVELS + 1), "open_examples": OPEN_EXAMPLES, "ranked": tuple(map(title, RANKED))}
    made.globals["same"] = f"{SAME:g}"
    return made


def _script_json(text: str) -> Markup:
    """JSON inside a script element: no character in it can end the element or open a comment."""
    escaped = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(escaped)


def fragment(
    cards: Sequence[Card] = (),
    views: Sequence[ExampleView] = (),
    title: str = "",
    concepts: Sequence[ConceptCard] = (),
    look: LookSection | None = None,
    notes: Mapping[int, Note] | None = None,
) -> str:
    """HTML of cards of latents or concepts, of texts under a title, or of a first look. It needs no script, no other file and
    no network. `notes` are the user's on the cards, by number."""
    templates = environment()
    assert templates.loader is not None
    sheet, _, _ = templates.loader.get_source(templates, "report.css")
    # Inside @scope the fragment itself takes the place of the page's root and body.
    style = sheet.replace(":root", ":scope").replace("\nbody {", "\n:scope {")
    page = templates.get_template("inline.html.j2").render(
        cards=cards, concepts=concepts, views=views, title=title, look=look, notes=notes or {}, style=Markup(style)
    )
    # A blank line would end the fragment where Markdown is read around it.
    return "\n".join(line for line in page.splitlines() if line.strip())
