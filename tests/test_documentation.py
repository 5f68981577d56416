"""References from the code to the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import crossdiff

SOURCE = Path(crossdiff.__file__).parent
ROOT = Path(__file__).parent.parent
REFERENCE = re.compile(r"\b(docs/[\w/-]+\.md)(?:#([\w-]+))?")


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as GitHub and MkDocs make them from the text."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\(.*?\)|`", "", heading)).strip().lower().replace(" ", "-") for heading in headings
    }


def test_references_to_the_documentation_lead_somewhere() -> None:
    found = [(file, *match) for file in SOURCE.rglob("*.py") for match in REFERENCE.findall(file.read_text(encoding="utf-8"))]
    assert found
    for file, page, anchor in found:
        assert (ROOT / page).is_file(), f"{file.name} refers to {page}"
        assert not anchor or anchor in anchors(ROOT / page), f"{file.name} refers to {page}#{anchor}"
