"""Notes as JSON: exported to a file, and merged from one."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from crossdiff.errors import UserError
from crossdiff.notes.note import Place, Subject, Value, check_value
from crossdiff.notes.store import Notes

EPOCH, LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
FORMAT = "crossdiff notes 1"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FieldValue(_Part):
    """A value that a field had, and when it was written."""

    value: str = Field(description='a text; of a star or a list "yes", or "" once it was taken away')
    time: AwareDatetime


class SubjectNotes(_Part):
    """The notes about one latent or concept."""

    kind: Literal["latent", "concept"]
    of: Annotated[str, Field(pattern=r"^[0-9a-f]{16,32}$")] = Field(description="digest of the results that it belongs to")
    number: int = Field(ge=0, lt=2**31)
    run: str = Field("", description="name of the run where the note was made")
    results: str = Field("", description="name of the crosscoder, or `concepts`")
    fields: dict[str, list[FieldValue]] = Field(
        description="`label`, `star`, `comment` and `list/NAME` with all values that each had; the newest counts"
    )


class NotesFile(_Part):
    """All notes of a file."""

    format: Literal["crossdiff notes 1"]
    notes: list[SubjectNotes]


class Merged(NamedTuple):
    """How many latents and concepts a file has notes about, and how many values were new."""

    n_subjects: int
    n_new: int


def export_notes(notes: Notes, of: Collection[str] | None = None) -> NotesFile:
    """All notes with the values that they had; `of`: only those about these results."""
    every, places = notes.every_value(), notes.places()
    if notes.problem:
        raise UserError(notes.problem)
    found = []
    for subject, values in every.items():
        if of is not None and subject.of not in of:
            continue
        place = places.get(subject, Place("", ""))
        fields: dict[str, list[FieldValue]] = {}
        for value in values:
            when = EPOCH + timedelta(microseconds=value.time)
            fields.setdefault(value.field, []).append(FieldValue(value=value.value, time=when))
        name = Path(place.run).name  # not the whole path, which says where the user keeps things
        found.append(SubjectNotes(**subject._asdict(), run=name, results=place.results, fields=fields))
    return NotesFile(format=FORMAT, notes=found)


def import_notes(notes: Notes, text: str | bytes, where: str) -> Merged:
    """Merge exported notes: the newest value of each field is the present one, all others are kept as earlier ones.

    Args:
        where: the name of the file, for the message.

    Raises:
        UserError: it is not a file of notes; nothing was merged.
    """
    try:
        found = NotesFile.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{where} has no notes of crossdiff: {key}: {first['msg']}; export them again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); export the notes again") from None
    values: dict[Subject, list[Value]] = {}
    places: dict[Subject, Place] = {}
    for each in found.notes:
        subject = Subject(each.kind, each.of, each.number)
        for name, had in each.fields.items():
            for value in had:
                if not EPOCH < value.time < LAST:
                    raise UserError(f"{where} has a note of the time {value.time}; expected one after 1970 and before 2200")
                when = (value.time - EPOCH) // timedelta(microseconds=1)
                values.setdefault(subject, []).append(Value(name, when, check_value(name, value.value)))
        places[subject] = Place(each.run, each.results)
    return Merged(len(values), notes.merge(values, places))
