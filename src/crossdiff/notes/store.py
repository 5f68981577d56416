"""The user's notes on latents and concepts, in one SQLite file that belongs to the user and not to a run.

Every value that a field ever had stays in the file with its time; the newest is the present one. So an edit is one more row,
merging two files is the union of their rows, and neither loses anything. A field that was emptied has the value "".
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from crossdiff.errors import UserError
from crossdiff.notes.note import COMMENT, LABEL, Note, Place, Subject, Value, check_value

VERSION = 1
"""Version of the file, in SQLite's `user_version`."""
PATIENCE = 10.0
"""Seconds that a writer waits for another one."""
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
        self._held: tuple[int, sqlite3.Connection] | None = None
        self._turn = threading.Lock()

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
        with self._reading() as database:
            return _every_value(database)

    def _current(self) -> tuple[object, dict[Subject, Note], dict[Subject, Place]]:
        with self._turn:
            try:
                with self._explained():
                    state = self._state()
                    if state != self._read[0]:
                        self._read = state, *self._everything()
                self.problem = ""
            except UserError as error:
                self.problem, self._read, self._held = f"{error}", (object(), {}, {}), None  # the next page tries again
            return self._read

    def _state(self) -> object:
        """What changes with every transaction of others. The file is never opened but by SQLite: closing it would end the
        locks that SQLite holds in this process."""
        try:
            inode = self.path.stat().st_ino
        except FileNotFoundError:
            self._held = None
            return None
        if self._held is None or self._held[0] != inode:
            self._held = inode, self._open(any_thread=True)
        return inode, self._held[1].execute("PRAGMA data_version").fetchone()[0], id(self._held[1])

    def _everything(self) -> tuple[dict[Subject, Note], dict[Subject, Place]]:
        if self._held is None:
            return {}, {}
        database = self._held[1]
        self._check_version(database)
        notes = {subject: Note.of(_newest(values)) for subject, values in _every_value(database).items()}
        rows = database.execute("SELECT subject, run, results FROM place")
        return notes, {Subject.read(subject): Place(*row) for subject, *row in rows}

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._explained(), closing(self._open()) as database:
            yield database

    def _open(self, any_thread: bool = False) -> sqlite3.Connection:
        """A connection for reading, which undoes what a killed writer left; to an empty database if there is no file."""
        is_there = self.path.is_file() and self.path.stat().st_size > 0
        name = f"{self.path.resolve().as_uri()}?mode=rw" if is_there else ":memory:"
        database = sqlite3.connect(name, uri=is_there, timeout=PATIENCE, check_same_thread=not any_thread)
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


def _insert(database: sqlite3.Connection, subject: Subject, values: Sequence[Value]) -> None:
    rows = [(str(subject), *value) for value in values]
    database.executemany("INSERT OR IGNORE INTO value(subject, field, time, value) VALUES (?, ?, ?, ?)", rows)


def _newest(values: Sequence[Value]) -> list[Value]:
    """The last value of each field; `values` come in the order of time."""
    return list({value.field: value for value in values}.values())


def _every_value(database: sqlite3.Connection) -> dict[Subject, list[Value]]:
    found: dict[str, list[Value]] = {}
    for subject, *row in database.execute("SELECT subject, field, time, value FROM value ORDER BY 1, 2, 3, 4"):
        found.setdefault(subject, []).append(Value(*row))
    return {Subject.read(subject): values for subject, values in found.items()}
