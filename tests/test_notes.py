"""Notes: nothing is lost by editing, merging, or two writers at once; other results never inherit them; `run.notes`."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crossdiff
from crossdiff.cli import run_command
from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.notes.exchange import export_notes, import_notes
from crossdiff.notes.note import LONGEST_LIST, Place, Subject, Value, check_value
from crossdiff.notes.store import Notebook, Notes, Stale, notes_path
from opened import write_run

PLACE = Place("/runs/demo", "batchtopk")
THREE = Subject("latent", "a" * 32, 3)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "data" / "notes.sqlite")


@pytest.fixture
def book(notes: Notes) -> Notebook:
    return Notebook(notes, "latent", THREE.of, PLACE)


def test_reading_writes_nothing_and_a_note_is_private(notes: Notes, book: Notebook) -> None:
    assert not book.note(3) and book.by_number() == {} and book.lists() == {} and notes.history(THREE) == []
    assert not notes.path.parent.exists()
    book.edit(3, {"star": "yes"})
    assert stat.S_IMODE(notes.path.stat().st_mode) == 0o600 and stat.S_IMODE(notes.path.parent.stat().st_mode) == 0o700


def test_every_field_is_read_back_and_earlier_texts_are_kept(book: Notebook) -> None:
    book.edit(3, {"label": "  greets\nthe user ", "star": "yes", "comment": "one\r\ntwo", "list/b": "yes", "list/a": "yes"})
    note = book.note(3)
    assert (note.label, note.star, note.comment, note.lists) == ("greets the user", True, "one\ntwo", ("a", "b"))
    book.edit(3, {"label": "says hello", "list/a": "", "star": ""})
    book.edit(3, {"label": "", "comment": ""})
    note = book.note(3)
    assert (note.label, note.star, note.comment, note.lists) == ("", False, "", ("b",))
    earlier = [each.value for each in book.earlier(3)]  # the newest first
    assert earlier[0] == "says hello" and set(earlier[1:]) == {"one\ntwo", "greets the user"}
    book.edit(3, {"list/b": ""})
    assert not book.note(3) and book.by_number() == {}


def test_which_numbers_a_list_has(book: Notebook) -> None:
    book.edit(1, {"star": "yes", "list/to check": "yes"})
    book.edit(2, {"label": "x"})
    book.edit(4, {"list/to check": "yes"})
    found = {which: book.numbers(which) for which in ("starred", "any", "list:to check", "list:other")}
    assert found == {"starred": {1}, "any": {1, 2, 4}, "list:to check": {1, 4}, "list:other": set()}
    assert book.lists() == {"to check": 2}


def test_a_text_that_was_changed_elsewhere_is_not_replaced(book: Notebook) -> None:
    book.edit(3, {"comment": "first"})
    seen = book.note(3).times
    book.edit(3, {"comment": "theirs", "label": "new"}, seen)  # I saw no label, and there was none
    with pytest.raises(Stale, match="comment was changed elsewhere") as stale:
        book.edit(3, {"comment": "mine", "star": "yes"}, seen)
    assert stale.value.mine == {"comment": "mine"}
    assert book.note(3).comment == "theirs" and book.note(3).star  # what nobody else changed is written
    book.edit(3, {"comment": "first", "label": "newer"}, {**seen, "label": book.note(3).times["label"]})
    assert book.note(3).comment == "theirs" and book.note(3).label == "newer"  # I left the comment as I saw it
    book.edit(3, {"comment": "both"}, book.note(3).times)
    assert book.note(3).comment == "both" and {each.value for each in book.earlier(3)} == {"theirs", "first", "new"}


def test_a_text_that_was_emptied_is_known_to_have_been_seen(book: Notebook) -> None:
    book.edit(3, {"comment": "first"})
    book.edit(3, {"comment": ""})
    book.edit(3, {"comment": "second"}, book.note(3).times)
    assert book.note(3).comment == "second"


def test_a_clock_that_is_behind_does_not_hide_an_edit(notes: Notes, book: Notebook) -> None:
    future = 4_000_000_000_000_000  # in the year 2096
    notes.merge({THREE: [Value("label", future, "from the future")]}, {})
    book.edit(3, {"label": "mine"})
    assert book.note(3).label == "mine" and book.note(3).times["label"] == future + 1


def test_two_processes_and_threads_at_once_lose_nothing(notes: Notes, book: Notebook, tmp_path: Path) -> None:
    """Two processes and four threads write 20 notes each, to one list and one comment; all 120 are there."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom crossdiff.notes.store import Notebook, Notes, Place\n"
        "book = Notebook(Notes(Path(sys.argv[1])), 'latent', sys.argv[2], Place('r', 'c'))\n"
        "for n in range(20): book.edit(n, {f'list/{sys.argv[3]}': 'yes', 'comment': f'{sys.argv[3]} {n}'})\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(notes.path), THREE.of, f"p{i}"]) for i in range(2)]

    def write(name: str) -> None:
        own = Notebook(Notes(notes.path), "latent", THREE.of, PLACE)
        for number in range(20):
            own.edit(number, {f"list/{name}": "yes", "comment": f"{name} {number}"})

    threads = [threading.Thread(target=write, args=[f"t{i}"]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in started] == [0, 0]
    writers = {"p0", "p1", "t0", "t1", "t2", "t3"}
    assert book.lists() == dict.fromkeys(sorted(writers), 20)
    for number in range(20):
        comments = {value.value for value in notes.history(Subject("latent", THREE.of, number)) if value.field == "comment"}
        assert comments == {f"{name} {number}" for name in writers}


VALUES = st.lists(
    st.tuples(
        st.sampled_from(["label", "comment"]),
        st.integers(1, 5),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6).map(lambda text: " ".join(text.split())),
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=40)
@given(mine=VALUES, theirs=VALUES)
def test_merging_is_the_same_in_either_order_and_keeps_every_value(
    tmp_path_factory: pytest.TempPathFactory, mine: list[tuple[str, int, str]], theirs: list[tuple[str, int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    both = []
    for first, second in ((mine, theirs), (theirs, mine)):
        notes = Notes(folder / f"{len(both)}.sqlite")
        other = Notes(folder / f"other{len(both)}.sqlite")
        notes.merge({THREE: [Value(*each) for each in first]}, {})
        other.merge({THREE: [Value(*each) for each in second]}, {})
        text = export_notes(other).model_dump_json()
        import_notes(notes, text, "file")
        assert import_notes(notes, text, "file").n_new == 0
        both.append(notes)
    assert both[0].every_value() == both[1].every_value()
    assert set(both[0].every_value().get(THREE, ())) == {Value(*each) for each in [*mine, *theirs]}
    newest: dict[str, tuple[int, str]] = {}
    for name, time, text in [*mine, *theirs]:
        newest[name] = max(newest.get(name, (0, "")), (time, text))
    note = both[0].all().get(THREE)
    assert (note is not None) == bool(newest)
    assert note is None or (note.label, note.comment) == tuple(newest.get(name, (0, ""))[1] for name in ("label", "comment"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "has no notes of crossdiff"),
        ('{"format": "crossdiff notes 2", "notes": []}', "format: .*crossdiff notes 1"),
        ('{"format": "crossdiff notes 1", "notes": [], "more": 1}', "more: Extra"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_is_not_of_notes_is_refused(notes: Notes, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_notes(notes, text, "notes.json")
    assert not notes.path.exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stars", "yes", "has no field 'stars'"),
        ("label", "x" * 201, "201 characters; at most 200"),
        ("comment", "a\0b", "cannot be stored"),
        ("label", "\ud800", "cannot be stored"),
        ("star", "maybe", "expected yes"),
        ("list/", "yes", "is not the name of a list"),
        ("list/a\nb", "yes", "is not the name of a list"),
        ("list/" + "x" * (LONGEST_LIST + 1), "yes", "is not the name of a list"),
    ],
)
def test_values_that_a_note_cannot_have(book: Notebook, name: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        book.edit(3, {name: value})
    bad = {"format": "crossdiff notes 1", "notes": [{
        "kind": "latent", "of": THREE.of, "number": 3,
        "fields": {name: [{"value": value, "time": "2026-01-01T00:00:00Z"}]}}]}  # fmt: skip
    with pytest.raises(UserError):
        import_notes(book.notes, json.dumps(bad), "file")
    with pytest.raises(UserError):
        check_value(name, value)
    assert not book.notes.path.exists() or not book.note(3)


@pytest.mark.parametrize("time", ["1969-12-31T00:00:00Z", "2300-01-01T00:00:00Z", "2026-01-01T00:00:00", "9" * 30])
def test_a_time_that_cannot_be(notes: Notes, time: str) -> None:
    entry = {"kind": "latent", "of": THREE.of, "number": 3, "fields": {"label": [{"value": "x", "time": time}]}}
    with pytest.raises(UserError):
        import_notes(notes, json.dumps({"format": "crossdiff notes 1", "notes": [entry]}), "file")


def test_a_damaged_file_and_one_of_a_later_version_are_named(notes: Notes, book: Notebook) -> None:
    notes.path.parent.mkdir()
    notes.path.write_bytes(b"not a database, but long enough to be read as one" * 20)
    assert book.by_number() == {} and "is damaged" in notes.problem
    with pytest.raises(UserError, match="damaged"):
        book.edit(3, {"star": "yes"})
    notes.path.unlink()
    book.edit(3, {"star": "yes"})
    assert book.by_number()[3].star and not notes.problem
    with sqlite3.connect(notes.path) as database:
        database.execute("PRAGMA user_version = 99")
    assert book.by_number() == {} and "version 99" in notes.problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(notes: Notes, book: Notebook) -> None:
    notes.path.parent.mkdir(mode=0o500)
    with pytest.raises(UserError, match="XDG_DATA_HOME"):
        book.edit(3, {"star": "yes"})


# Of a run.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", tiny_pair, tiny_texts)


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    yield shutil.copytree(made, tmp_path / "demo")


def test_the_notes_of_a_run(run: Path) -> None:
    opened = crossdiff.open(run)
    assert opened.notes.latents.height == 0 and opened.notes.latents.columns[0] == "latent"
    opened.notes.write(latent=3, label="greets <b>", star=True, add_to=["to check"])
    opened.notes.write(concept=1, comment="unclear")
    assert opened.notes.latents.rows() == [(3, "greets <b>", True, "", ["to check"])]
    assert opened.notes.concepts.rows() == [(1, "", False, "unclear", [])]
    assert crossdiff.open(run, "l1").notes.latents.height == 0  # another crosscoder's latent 3 is another latent
    joined = opened.notes.join(opened.latents)
    assert joined["latent"].to_list() == opened.latents["latent"].to_list()
    assert joined.filter("starred")["latent"].to_list() == [3]
    assert opened.notes.join(opened.concepts).filter(pl.col("comment") == "unclear")["concept"].to_list() == [1]
    view = opened.latent(3)
    assert "greets &lt;b&gt;" in view._repr_html_() and "\N{BLACK STAR} greets <b>" in repr(view)
    assert "unclear" in opened.concept(1)._repr_html_() and "greets" not in opened.latent(4)._repr_html_()
    opened.notes.write(latent=3, remove_from=["to check"], star=False)
    assert opened.notes.latent(3).lists == () and opened.notes.latent(3).label == "greets <b>"
    assert repr(opened.notes) == "<notes on 1 latents and 1 concepts>"


def test_a_python_writer_notices_what_was_changed_since(run: Path) -> None:
    notes = crossdiff.open(run).notes
    seen = notes.latent(3)
    crossdiff.open(run).notes.write(latent=3, comment="theirs")
    with pytest.raises(UserError, match="changed elsewhere"):
        notes.write(latent=3, comment="mine", seen=seen)
    assert notes.latent(3).comment == "theirs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either latent= or concept="),
        ({"latent": 3, "concept": 1}, "either latent= or concept="),
        ({"latent": 60, "star": True}, "there is no latent 60"),
        ({"latent": 3, "add_to": "abc"}, r"\['abc'\]"),
    ],
)
def test_what_cannot_be_noted(run: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        crossdiff.open(run).notes.write(**arguments)  # type: ignore[arg-type]


def test_a_run_that_moved_keeps_its_notes_and_other_results_do_not_get_them(run: Path, tmp_path: Path) -> None:
    notes = crossdiff.open(run).notes
    notes.write(latent=3, label="greets")
    notes.write(concept=1, label="the sea")
    moved = run.rename(tmp_path / "elsewhere")
    assert crossdiff.open(moved).notes.latent(3).label == "greets" and crossdiff.open(moved).notes.concept(1).label == "the sea"
    analysed = moved / "batchtopk" / "latents.parquet"
    pl.read_parquet(analysed).with_columns(frequency=pl.lit(0.5)).write_parquet(analysed)
    assert crossdiff.open(moved).notes.latent(3).label == "greets"  # analysed again: the same latents
    shutil.copy(moved / "l1" / "model.safetensors", moved / "batchtopk" / "model.safetensors")
    assert not crossdiff.open(moved, "batchtopk").notes.latent(3).label  # trained again: others
    members = moved / "concepts" / "members.parquet"
    pl.read_parquet(members).with_columns(pl.col("latent") + 1).write_parquet(members)
    assert not crossdiff.open(moved).notes.concept(1)


def test_the_command_exports_and_merges(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crossdiff.open(run).notes.write(latent=3, label="greets")
    Notebook(Notes(), "latent", "f" * 32, PLACE).edit(9, {"star": "yes"})
    file, part = tmp_path / "all.json", tmp_path / "part.json"
    run_command(["notes", "export", str(file)])
    run_command(["notes", "export", str(part), "--runs", str(run)])
    assert len(read_json(file)["notes"]) == 2
    (entry,) = read_json(part)["notes"]
    assert (entry["number"], entry["run"], entry["results"]) == (3, "demo", "batchtopk")
    notes_path().unlink()
    run_command(["notes", "import", str(file)])
    assert "notes on 2 latents and concepts, 2 new values" in capsys.readouterr().out
    assert crossdiff.open(run).notes.latent(3).label == "greets"
    with pytest.raises(UserError, match="cannot read"):
        run_command(["notes", "import", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match="omit it"):
        run_command(["notes", "import", str(file), "--runs", str(run)])
