"""The page's cards as fragments that a notebook shows inside itself, with the page's style kept to them."""

from collections.abc import Sequence

from markupsafe import Markup

from crossdiff.report.cards import Card, ExampleView
from crossdiff.report.environment import environment

OPEN_EXAMPLES = 3
"""Examples of a card that are shown without unfolding it."""


def fragment(cards: Sequence[Card] = (), views: Sequence[ExampleView] = (), title: str = "") -> str:
    """HTML of cards, and of texts under a title; it needs no script, no file and no host."""
    templates = environment()
    assert templates.loader is not None
    sheet, _, _ = templates.loader.get_source(templates, "report.css")
    # Inside @scope the fragment itself stands for what the page's rules call the root and the body.
    style = sheet.replace(":root", ":scope").replace("\nbody {", "\n:scope {")
    page = templates.get_template("inline.html.j2").render(
        cards=cards, views=views, title=title, style=Markup(style), open_examples=OPEN_EXAMPLES
    )
    # A blank line would end the fragment where Markdown is read around it.
    return "\n".join(line for line in page.splitlines() if line.strip())
