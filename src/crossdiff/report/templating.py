"""Jinja2 templates of the report, and its cards as fragments for a notebook."""

from __future__ import annotations

import base64
import hashlib
import re
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
    from crossdiff.report.notebook_views import RunView

OPEN_EXAMPLES = 3
"""Examples of a card that are visible without unfolding."""

LIGHT_THEMES = ('[data-jp-theme-light="true"]', ".vscode-light", ".vscode-high-contrast-light", '[data-theme="light"]')
DARK_THEMES = (
    '[data-jp-theme-light="false"]', ".vscode-dark", ".vscode-high-contrast:not(.vscode-high-contrast-light)",
    '[data-theme="dark"]', "html[theme=dark]",
)  # fmt: skip
"""How JupyterLab, VS Code, Colab and documentation sites say which theme a page has, on its root or its body."""
_OVER_JUPYTER = """:scope { padding: 12px 16px; max-width: 1080px; }
th, td { text-align: left !important; }
tr { background: none !important; }"""
"""Jupyter aligns cells to the right and stripes rows, by rules that would win over those of the sheet."""
_LIGHT = re.compile(r":root \{\n  color-scheme: light dark;(.*?)\}", re.DOTALL)
_DARK = re.compile(r"@media \(prefers-color-scheme: dark\) \{\n  :root \{(.*?)\}\n\}", re.DOTALL)


def environment() -> jinja2.Environment:
    """The templates: values are escaped, and a name without a value is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("crossdiff.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    assert made.loader is not None
    made.filters["script_json"] = _script_json
    made.globals |= {"levels": range(1, LEVELS + 1), "open_examples": OPEN_EXAMPLES, "ranked": tuple(map(title, RANKED))}
    made.globals["same"] = f"{SAME:g}"
    script, _, _ = made.loader.get_source(made, "popover.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals |= {"popover": Markup(script), "popover_hash": f"sha256-{digest}"}
    return made


def _script_json(text: str) -> Markup:
    """JSON inside a script element: no character in it can end the element or open a comment."""
    escaped = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(escaped)


def scoped_style() -> str:
    """The style sheet for a notebook: it reaches elements of the class `crossdiff` alone, and follows the notebook's theme.

    Inside @scope the element itself takes the place of the page's root and body. Where nothing says which theme a notebook has,
    the operating system's counts.
    """
    templates = environment()
    assert templates.loader is not None
    sheet, _, _ = templates.loader.get_source(templates, "report.css")
    found = _DARK.search(sheet)
    assert found is not None, "report.css has no block of dark colours"
    colours = found[1]
    themes = (
        f"@media (prefers-color-scheme: dark) {{ :scope {{{colours} color-scheme: dark; }} }}\n"
        f":is({', '.join(LIGHT_THEMES)}) :scope {{{_LIGHT.search(sheet)[1]} color-scheme: light; }}\n"  # type: ignore[index]
        f":is({', '.join(DARK_THEMES)}) :scope {{{colours} color-scheme: dark; }}"
    )
    sheet = sheet.replace(found[0], themes).replace(":root", ":scope").replace("\nbody {", "\n:scope {")
    return f"@scope (.crossdiff) {{\n{sheet}\n{_OVER_JUPYTER}\n}}"


def fragment(
    cards: Sequence[Card] = (),
    views: Sequence[ExampleView] = (),
    title: str = "",
    note: str = "",
    concepts: Sequence[ConceptCard] = (),
    look: LookSection | None = None,
    run: RunView | None = None,
    notes: Mapping[int, Note] | None = None,
) -> str:
    """HTML of cards of latents or concepts, of texts under a title and a note, of a first look, or of a whole run. It needs no
    script, no other file and no network. `notes` are the user's on the cards, by number."""
    page = environment().get_template("inline.html.j2").render(
        cards=cards, concepts=concepts, views=views, title=title, note=note, look=look, run=run, style=Markup(scoped_style()),
        crosscoders=() if run is None else run.crosscoders, notes=notes or {},
    )  # fmt: skip
    # A blank line would end the fragment where Markdown is read around it.
    return "\n".join(line for line in page.splitlines() if line.strip())
