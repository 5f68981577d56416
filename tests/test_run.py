"""The run directory: swaps that survive a kill, and work that outlives an error."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from crossdiff.errors import UserError
from crossdiff.run import Run, Stage


def finish(run: Run, stage: Stage, content: str) -> None:
    with run.working(stage) as folder:
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / "result").write_text(content)


def test_a_new_result_replaces_the_old_one_and_keeps_it(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", create=True)
    first, second = Stage("s", "1", ("out/result",)), Stage("s", "2", ("out/result",))
    finish(run, first, "one")
    assert run.is_done(first)
    assert not run.is_done(second)
    finish(run, second, "two")
    assert (run.path / "out" / "result").read_text() == "two"
    old = list((run.path / "old").rglob("result"))
    assert [path.read_text() for path in old] == ["one"]
    assert not run.is_done(first)
    (leftover,) = run.leftovers()
    assert leftover.n_bytes == 3 and leftover.is_replaced
    run.clean([leftover])
    assert not (run.path / "old").exists()
    assert (run.path / "out" / "result").read_text() == "two"


def test_an_error_keeps_the_work_and_the_old_result(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", create=True)
    finish(run, Stage("s", "1", ("out/result",)), "one")
    with pytest.raises(RuntimeError), run.working(Stage("s", "2", ("out/result",))) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert (run.path / "out" / "result").read_text() == "one"
    with run.working(Stage("s", "2", ())) as folder:
        assert (folder / "half").read_text() == "half"


@pytest.mark.parametrize("moves_made", [0, 1, 2])
def test_a_kill_between_two_moves_is_repaired_at_the_next_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves_made: int
) -> None:
    run = Run.open(tmp_path / "run", create=True)
    finish(run, Stage("s", "1", ("out/result",)), "one")
    second, made = Stage("s", "2", ("out/result",)), 0
    rename = Path.rename

    def dying_rename(self: Path, target: Path) -> Path:
        nonlocal made
        if made == moves_made:
            raise KeyboardInterrupt
        made += 1
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying_rename)
    with contextlib.suppress(KeyboardInterrupt):
        finish(run, second, "two")
    monkeypatch.undo()
    run.close()
    again = Run.open(tmp_path / "run")
    assert again.is_done(second)
    assert (again.path / "out" / "result").read_text() == "two"
    assert [path.read_text() for path in (again.path / "old").rglob("result")] == ["one"]


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", create=True)
    finish(run, Stage("s", "1", ("out/result",)), "one")
    run.close()
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Run.open(tmp_path / "run")
