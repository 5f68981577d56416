"""A note, what it is about, and which values its fields can have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from crossdiff.errors import UserError

LABEL, STAR, COMMENT, LIST = "label", "star", "comment", "list/"
"""Fields; that of a list is followed by its name. The value of a star or a list is "yes" or ""."""
LONGEST = {LABEL: 200, COMMENT: 20_000}
LONGEST_LIST = 60
KINDS = ("latent", "concept")


class Subject(NamedTuple):
    """What a note is about. `of` is the digest of the results (`notes.identity`), so a run may move, and other results under
    the same name have other subjects."""

    kind: str
    of: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.of}/{self.number}"

    @classmethod
    def read(cls, text: str) -> Subject:
        kind, of, number = text.split("/")
        return cls(kind, of, int(number))


class Place(NamedTuple):
    """Where a note was made: the folder of the run, and the name of the crosscoder, or `concepts`."""

    run: str
    results: str


class Value(NamedTuple):
    """What a field had at a time (microseconds since 1970)."""

    field: str
    time: int
    value: str


@dataclass(frozen=True)
class Note:
    """What the user noted about one latent or concept.

    Attributes:
        lists: names of the lists that it is on, sorted.
        times: when each field was last changed, in microseconds since 1970.
    """

    label: str = ""
    star: bool = False
    comment: str = ""
    lists: tuple[str, ...] = ()
    times: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __bool__(self) -> bool:
        return bool(self.label or self.star or self.comment or self.lists)

    @property
    def lines(self) -> tuple[str, ...]:
        """The note in plain text; without lines if it is empty."""
        first = " ".join(filter(None, ["\N{BLACK STAR}" if self.star else "", self.label]))
        on = f"on your lists: {', '.join(self.lists)}" if self.lists else ""
        return tuple(filter(None, [first, on, *self.comment.splitlines()]))

    @classmethod
    def of(cls, values: Collection[Value]) -> Note:
        """The note whose fields have these values, one per field."""
        now = {value.field: value.value for value in values}
        lists = sorted(name.removeprefix(LIST) for name, value in now.items() if value and name.startswith(LIST))
        times = {value.field: value.time for value in values}
        return cls(now.get(LABEL, ""), bool(now.get(STAR)), now.get(COMMENT, ""), tuple(lists), times)


def check_value(name: str, value: str) -> str:
    """A value that a field can have, without white space around it.

    Raises:
        UserError: it is too long or has characters that no file can hold; or there is no such field.
    """
    if name.startswith(LIST):
        _check_list(name.removeprefix(LIST))
    elif name not in (LABEL, STAR, COMMENT):
        raise UserError(f"a note has no field {name[:60]!r}; it has a label, a star, a comment and lists")
    text = value.replace("\r\n", "\n").strip()
    if name == LABEL:
        text = " ".join(text.split())
    if name not in LONGEST and text not in ("yes", ""):
        raise UserError(f"{name} is {text[:40]!r}; expected yes, or nothing")
    if len(text) > LONGEST.get(name, 3):
        raise UserError(f"the {name} has {len(text):,} characters; at most {LONGEST[name]:,} are kept, so shorten it")
    _check_characters(name, text)
    return text


def _check_list(name: str) -> None:
    if not name or name != " ".join(name.split()) or len(name) > LONGEST_LIST:
        raise UserError(f"{name[:80]!r} is not the name of a list; expected 1 to {LONGEST_LIST} characters on one line")
    _check_characters("name of the list", name)


def _check_characters(name: str, text: str) -> None:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"the {name} has a character that cannot be stored; type it again without that one")
