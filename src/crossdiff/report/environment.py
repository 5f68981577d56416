"""The templates, as every page and fragment of the report loads them."""

import jinja2
from markupsafe import Markup


def environment() -> jinja2.Environment:
    """What is written into a template is escaped, and a name that nobody gave is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("crossdiff.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters["script_json"] = _script_json
    return made


def _script_json(text: str) -> Markup:
    """JSON as it may stand inside a script element: no character in it can end the element or open a comment."""
    escaped = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(escaped)
