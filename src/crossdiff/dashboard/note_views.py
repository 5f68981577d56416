"""What pages show of a note, and the form that edits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from crossdiff.notes.note import COMMENT, LABEL, LIST, STAR, Note, check_value
from crossdiff.notes.store import Notebook


class Earlier(NamedTuple):
    """A label or comment that was replaced."""

    field: str
    text: str
    when: str


@dataclass(frozen=True)
class MyNote:
    """The note on a page, and its form.

    Attributes:
        action: the address that the form is posted to.
        back: query part of the page's address.
        typed: texts that were typed and not written, because they were changed elsewhere meanwhile, by field.
        problem: why nothing was written; "" if all is well.
    """

    book: Notebook
    number: int
    note: Note
    action: str
    back: str
    earlier: Sequence[Earlier]
    typed: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    def value(self, name: str) -> str:
        """What the field of the form holds."""
        return self.typed.get(name, getattr(self.note, name))

    def seen(self, name: str) -> int:
        """The time of the text that the form shows."""
        return self.note.times.get(name, 0)


def my_note(
    book: Notebook, path: str, number: int, back: str, typed: Mapping[str, str] | None = None, problem: str = ""
) -> MyNote:
    """The note on the page `path`."""
    note = book.note(number)
    earlier = [
        Earlier(value.field, value.value, f"{datetime.fromtimestamp(value.time / 1e6):%-d %B %Y, %H:%M}")
        for value in (book.earlier(number) if note.times else ())
    ]
    return MyNote(book, number, note, f"{path}/notes", back, earlier, typed or {}, problem or book.notes.problem)


class Posted(NamedTuple):
    """What a form of a note says.

    Attributes:
        values: new values by field.
        seen: the times of the texts that were edited.
        of: the results that the page was about.
        back: query part of the page's address.
    """

    values: dict[str, str]
    seen: dict[str, int]
    of: str
    back: str


def read_posted(pairs: Sequence[tuple[str, str]]) -> Posted:
    """Read a form. A field that is absent stays as it is; `list` are the lists that are ticked, `was` those that were.

    Raises:
        UserError: a value is not one that a note can have.
    """
    last = dict(pairs)
    values = {name: last[name] for name in (LABEL, COMMENT) if name in last}
    if STAR in last:
        values[STAR] = "" if last[STAR] == "no" else last[STAR]
    ticked, were = ({" ".join(value.split()) for key, value in pairs if key == name} for name in ("list", "was"))
    new = " ".join(last.get("new_list", "").split())
    for name in (ticked | ({new} if new else set())) - were:
        values[LIST + name] = "yes"
    values |= {LIST + name: "" for name in were - ticked if name != new}
    for name, value in values.items():
        check_value(name, value)
    seen = {name: int(at) for name in (LABEL, COMMENT) if (at := last.get(f"seen_{name}", "")).isdecimal() and len(at) < 18}
    back = last.get("back", "")
    return Posted(values, seen, last.get("of", ""), back if back.startswith("?") else "")
