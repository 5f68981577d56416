"""The user's notes on latents and concepts, in one SQLite file that belongs to the user and not to a run.

Every value that a field ever had stays in the file with its time; the newest is the present one. So an edit is one more row,
merging two files is the union of their rows, and neither loses anything. A field that was emptied has the value "".
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from crossdiff.errors import UserError

VERSION = 1
"""Version of the file, in SQLite's `user_version`."""
PATIENCE = 10.0
"""Seconds that a writer waits for another one."""
FRESH = 50_000_000
"""Nanoseconds after a change in which another change may not be seen from the time of the file."""
LABEL, STAR, COMMENT, LIST = "label", "star", "comment", "list/"
"""Fields; that of a list is followed by its name. The value of a star or a list is "yes" or ""."""
LONGEST = {LABEL: 200, COMMENT: 20_000}
LONGEST_LIST = 60
KINDS = ("latent", "concept")
_TABLES = """
    CREATE TABLE IF NOT EXISTS value(
        subject TEXT NOT NULL, field TEXT NOT NULL, time INTEGER NOT NULL, value TEXT NOT NULL,
        PRIMARY KEY(subject, field, time, value)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS place(subject TEXT PRIMARY KEY, run TEXT NOT NULL, results TEXT NOT NULL) WITHOUT ROWID;
"""
_HISTORY = "SELECT field, time, value FROM value WHERE subject = ?"


def notes_path() -> Path:
    """The file of the user's notes."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "crossdiff" / "notes.sqlite"


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

    def _with(self, at: Value) -> Note:
        times = {**self.times, at.field: at.time}
        if at.field.startswith(LIST):
            rest = {each for each in self.lists if each != at.field.removeprefix(LIST)}
            own = {at.field.removeprefix(LIST)} if at.value else set()
            return replace(self, lists=tuple(sorted(rest | own)), times=times)
        if at.field == STAR:
            return replace(self, star=bool(at.value), times=times)
        is_label = at.field == LABEL
        return replace(
            self, label=at.value if is_label else self.label, comment=self.comment if is_label else at.value, times=times
        )


class Stale(UserError):
    """A text was changed by somebody else since it was read, so it was not written. The other fields were.

    Attributes:
        mine: the texts that were not written, by field.
    """

    def __init__(self, mine: Mapping[str, str]) -> None:
        names = " and the ".join(mine)
        super().__init__(f"the {names} was changed elsewhere since you read it, and is not replaced; read it and write again")
        self.mine = dict(mine)


class Notes:
    """The notes in one file, which is made when the first one is written.

    Attributes:
        problem: why the file could not be read at the last attempt; "" if it could.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or notes_path()
        self.problem = ""
        self._read: tuple[object, dict[Subject, Note], dict[Subject, Place]] = (None, {}, {})

    def all(self) -> Mapping[Subject, Note]:
        """Every note, also one that was emptied. If the file cannot be read there is none, and `problem` says why."""
        return self._current()[1]

    def places(self) -> Mapping[Subject, Place]:
        """Where each note was made."""
        return self._current()[2]

    def history(self, subject: Subject) -> list[Value]:
        """Every value that the fields of a note had, the newest first."""
        with self._reading() as database:
            found = database.execute(_HISTORY, [str(subject)]).fetchall()
        return sorted((Value(*row) for row in found), key=lambda value: (value.time, value.value), reverse=True)

    def edit(self, subject: Subject, values: Mapping[str, str], place: Place, seen: Mapping[str, int] | None = None) -> None:
        """Write fields of a note. A value that the field already has is not written again.

        Args:
            values: the new values by field.
            seen: for texts that were edited, the time of the value that the user saw (0 if there was none). If it was changed
                since, and the user changed it too, it is not written.

        Raises:
            Stale: somebody else changed a text that this changes.
            UserError: a value is too long, or the file cannot be written.
        """
        checked = {name: check_value(name, value) for name, value in values.items()}
        with self._writing() as database:
            past: dict[str, list[Value]] = {}
            for row in database.execute(f"{_HISTORY} ORDER BY 1, 2, 3", [str(subject)]):
                past.setdefault(row[0], []).append(Value(*row))
            new, stale = [], {}
            for name, value in checked.items():
                now = past[name][-1] if name in past else Value(name, 0, "")
                read = (seen or {}).get(name, now.time)
                was = [each.value for each in past.get(name, ()) if each.time == read] if read else [""]
                if value == now.value or (read != now.time and value in was):
                    continue
                if read != now.time:
                    stale[name] = value
                    continue
                new.append(Value(name, max(time.time_ns() // 1000, now.time + 1), value))
            _insert(database, subject, new)
            if new:
                database.execute("REPLACE INTO place VALUES (?, ?, ?)", [str(subject), *place])
        if stale:
            raise Stale(stale)

    def merge(self, found: Mapping[Subject, Sequence[Value]], places: Mapping[Subject, Place]) -> int:
        """Add the values of other notes; returns how many were new. The newest value of each field is the present one."""
        with self._writing() as database:
            before = database.total_changes
            for subject, values in found.items():
                _insert(database, subject, values)
            added = database.total_changes - before
            for subject, place in places.items():
                database.execute("INSERT OR IGNORE INTO place VALUES (?, ?, ?)", [str(subject), *place])
        return added

    def every_value(self) -> dict[Subject, list[Value]]:
        """All values of all notes, the oldest first."""
        found: dict[Subject, list[Value]] = {}
        with self._reading() as database:
            for subject, *row in database.execute("SELECT subject, field, time, value FROM value ORDER BY 1, 2, 3, 4"):
                found.setdefault(Subject.read(subject), []).append(Value(*row))
        return found

    def _current(self) -> tuple[object, dict[Subject, Note], dict[Subject, Place]]:
        state = _state(self.path)  # before the rows, which are never older than it
        if state != self._read[0]:
            try:
                newest = {subject: _newest(values) for subject, values in self.every_value().items()}
                with self._reading() as database:
                    rows = database.execute("SELECT subject, run, results FROM place").fetchall()
            except UserError as error:
                self.problem, self._read = f"{error}", (object(), {}, {})  # the next page tries again
                return self._read
            notes = {subject: _note(values) for subject, values in newest.items()}
            self.problem = ""
            self._read = state, notes, {Subject.read(row[0]): Place(*row[1:]) for row in rows}
        return self._read

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._explained(), closing(self._open()) as database:
            yield database

    def _open(self) -> sqlite3.Connection:
        """A connection for reading, which undoes what a killed writer left; to an empty database if there is no file."""
        is_there = self.path.is_file() and self.path.stat().st_size > 0
        name = f"{self.path.resolve().as_uri()}?mode=rw" if is_there else ":memory:"
        database = sqlite3.connect(name, uri=is_there, timeout=PATIENCE)
        if not is_there:
            database.executescript(_TABLES)
        else:
            self._check_version(database)
        return database

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction. No other writer is between its reading and its writing."""
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with closing(sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                os.chmod(self.path, 0o600)
                try:
                    self._check_version(database)
                    for statement in _TABLES.split(";"):
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {VERSION}")
                    yield database
                    database.execute("COMMIT")
                finally:
                    if database.in_transaction:
                        database.execute("ROLLBACK")

    def _check_version(self, database: sqlite3.Connection) -> None:
        found = database.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise UserError(f"{self.path} is of version {found}, this crossdiff reads {VERSION}; install the newer crossdiff")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise UserError(f"the notes in {self.path} cannot be used ({error}); try again, or choose a folder where you may "
                            "write with XDG_DATA_HOME") from error  # fmt: skip
        except (sqlite3.DatabaseError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.path} is damaged ({error}); move it away, and import notes that you exported") from error
        except OSError as error:
            raise UserError(f"the notes in {self.path} cannot be used: {error.strerror}; choose a folder where you may write "
                            "with XDG_DATA_HOME") from error  # fmt: skip


@dataclass(frozen=True)
class Notebook:
    """The notes about the latents of one crosscoder, or about the concepts of one run, by number.

    Attributes:
        of: digest of the results.
        place: where they are now.
    """

    notes: Notes
    kind: str
    of: str
    place: Place

    def by_number(self) -> dict[int, Note]:
        """Every note that is not empty."""
        every = self.notes.all()
        own = (self.kind, self.of)
        return {subject.number: note for subject, note in every.items() if note and (subject.kind, subject.of) == own}

    def note(self, number: int) -> Note:
        """The note about one of them; an empty one if there is none."""
        return self.notes.all().get(Subject(self.kind, self.of, number), Note())

    def earlier(self, number: int) -> list[Value]:
        """The labels and comments that were replaced by others, the newest first."""
        note, seen, found = self.note(number), {"": True}, []
        seen |= {note.label: True, note.comment: True}
        for value in self.notes.history(Subject(self.kind, self.of, number)):
            if value.field in (LABEL, COMMENT) and value.value not in seen:
                seen[value.value] = True
                found.append(value)
        return found

    def edit(self, number: int, values: Mapping[str, str], seen: Mapping[str, int] | None = None) -> None:
        """Write fields of a note; see `Notes.edit`."""
        self.notes.edit(Subject(self.kind, self.of, number), values, self.place, seen)

    def numbers(self, which: str) -> set[int]:
        """Those that are starred, noted in any way, or on a list: `starred`, `any` or `list:NAME`."""
        chosen = which.removeprefix("list:")
        return {
            number
            for number, note in self.by_number().items()
            if which == "any" or (which == "starred" and note.star) or (which.startswith("list:") and chosen in note.lists)
        }

    def lists(self) -> dict[str, int]:
        """The lists that any of them is on, with how many there are on each."""
        found: dict[str, int] = {}
        for note in self.by_number().values():
            for name in note.lists:
                found[name] = found.get(name, 0) + 1
        return dict(sorted(found.items()))

    def replaced(self) -> int:
        """The number of notes that were made here about results that are not here any more."""
        places, every = self.notes.places(), self.notes.all()
        return sum(
            bool(note) and subject.of != self.of and subject.kind == self.kind and places.get(subject) == self.place
            for subject, note in every.items()
        )


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


def _insert(database: sqlite3.Connection, subject: Subject, values: Sequence[Value]) -> None:
    rows = [(str(subject), *value) for value in values]
    database.executemany("INSERT OR IGNORE INTO value(subject, field, time, value) VALUES (?, ?, ?, ?)", rows)


def _newest(values: Sequence[Value]) -> list[Value]:
    """The last value of each field; `values` come in the order of time."""
    return list({value.field: value for value in values}.values())


def _note(values: Iterator[Value] | Sequence[Value]) -> Note:
    note = Note()
    for value in values:
        note = note._with(value)
    return note


def _state(path: Path) -> object:
    """What changes with every transaction. Nothing here may open the file: closing it would end the locks that SQLite holds."""
    try:
        found = path.stat()
    except OSError as error:
        return error.errno
    if time.time_ns() - found.st_mtime_ns < FRESH:  # the next change may get the same time
        return object()
    return found.st_ino, found.st_size, found.st_mtime_ns
