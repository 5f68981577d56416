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


def test_what_was_made_from_a_replaced_result_is_replaced_with_it(tmp_path: Path) -> None:
    """train -> analyze -> causal within the analysis' folder; a second training is independent of the first."""
    run = Run.open(tmp_path / "run", create=True)

    def write(name: str, fingerprint: str, output: str, *needs: str) -> Stage:
        stage = Stage(name, fingerprint, (output,), needs=needs)
        with run.working(stage) as folder:
            (folder / output).parent.mkdir(parents=True, exist_ok=True)
            (folder / output).write_text(f"{name} {fingerprint}")
        return stage

    write("train/a", "1", "a/model")
    other = write("train/b", "1", "b/model")
    write("analyze/a", "1", "a/tables/latents", "train/a")
    causal = write("causal/a", "1", "a/tables/causal", "analyze/a")
    write("analyze/a", "1", "a/tables/latents", "train/a")  # the same result again leaves what was made from it
    assert run.is_done(causal)
    training = write("train/a", "2", "a/model")
    assert (run.path / "a" / "model").read_text() == "train/a 2"
    assert not (run.path / "a" / "tables" / "latents").exists() and not (run.path / "a" / "tables" / "causal").exists()
    assert run.is_done(training) and run.is_done(other) and set(run.manifest.stages) == {"train/a", "train/b"}
    old = {path.read_text() for path in (run.path / "old").rglob("*") if path.is_file()}
    assert old == {"analyze/a 1", "causal/a 1", "train/a 1"}


def test_an_error_before_any_file_leaves_nothing(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", create=True)
    with pytest.raises(RuntimeError), run.working(Stage("s", "1", ("out/result",))) as folder:
        (folder / "out" / "deeper").mkdir(parents=True)
        raise RuntimeError
    assert not (run.path / "work").exists()
