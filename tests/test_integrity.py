"""Run directories from others: forged manifests, links out of the run, changed files, and what a YAML file may take."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import save_file

import crossdiff
from crossdiff.cli import run_command
from crossdiff.errors import UserError
from crossdiff.files import explain_disk_error, replacing, short_repr
from crossdiff.integrity import intact, verify
from crossdiff.run import Run, Stage
from crossdiff.run_manifest import RunManifest
from crossdiff.yaml_files import MAX_VALUES, parse_yaml, read_yaml


def run_with(folder: Path, content: str = "result") -> Path:
    """A run with one finished stage, whose output is `a/result`."""
    run = Run.open(folder, create=True)
    with run.working(Stage("train/a", "1", ("a/result",))) as work:
        (work / "a").mkdir()
        (work / "a" / "result").write_text(content)
    run.close()
    return folder


def forge(run: Path, **changes: Any) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    "move",
    [
        ["a/result", "/outside"],
        ["a/result", "../outside"],
        ["a/result", "old/../../outside"],
        ["../canary", "a/result"],
        ["/canary", "a/result"],
        ["work/x/../../../canary", "a/result"],
        ["a/result", "b/result"],
        ["work/x", "a"],
        ["work/x/config.yaml", "config.yaml"],
        ["work/x/manifest.json", "manifest.json"],
        ["old/x/a", "a"],
        ["", ""],
        ["a"],
        "a",
        [1, 2],
    ],
)
def test_a_move_that_no_stage_makes_is_refused_before_anything_moves(tmp_path: Path, move: Any) -> None:
    run = run_with(tmp_path / "run")
    (tmp_path / "canary").write_text("canary")
    first = ["a/result", "old/1/a/result"]  # a good one before it
    forge(run, swap=[first, move])
    with pytest.raises(UserError, match=r"manifest\.json is damaged, or crossdiff did not write it: swap"):
        Run.open(run)
    assert (run / "a" / "result").read_text() == "result"
    assert (tmp_path / "canary").read_text() == "canary"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary", "run"]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ([1], r"not a run manifest of format 1 \(found \[1\]\)"),
        (7, "not a run manifest"),
        ({"format": True}, "not a run manifest"),
        ({"format": 1, "stages": []}, "stages"),
        ({"format": 1, "stages": {"a": {"fingerprint": 1}}}, "fingerprint"),
        ({"format": 1, "stages": {"a": {"fingerprint": "1", "outputs": ["../x"]}}}, "relative path inside the run"),
        ({"format": 1, "stages": {"a": {"fingerprint": "1", "files": {"/x": ""}}}}, "relative path inside the run"),
        ({"format": 1, "more": 1}, "more"),
        ({"format": 1, "stages": {"a": {"fingerprint": "1", "settings": "x" * 10**6}}}, "settings"),
    ],
)
def test_a_manifest_of_another_shape_is_named_in_few_words(tmp_path: Path, manifest: Any, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message) as refused:
        RunManifest.read(tmp_path)
    assert len(str(refused.value)) < 500 + len(str(tmp_path))


def test_a_manifest_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 1, "stages": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError, match="damaged"):
        RunManifest.read(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "a/link", "work", "old", "report.html.partial"])
def test_a_link_out_of_the_run_is_refused(tmp_path: Path, name: str) -> None:
    run = run_with(tmp_path / "run")
    (tmp_path / "canary").mkdir()
    (run / name).symlink_to(tmp_path / "canary")
    with pytest.raises(UserError, match=r"outside of the run; only activations may be one"):
        Run.open(run)


def test_links_within_the_run_and_a_store_elsewhere_are_fine(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run")
    (tmp_path / "big").mkdir()
    (run / "activations").symlink_to(tmp_path / "big")
    (run / "same").symlink_to("a")
    Run.open(run).close()
    (run / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop is a link"):
        Run.open(run)


def test_a_partial_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("canary")
    (tmp_path / "file.partial").symlink_to(canary)
    with replacing(tmp_path / "file") as partial:
        partial.write_text("new")
    assert canary.read_text() == "canary"
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()


def test_a_lock_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "made")
    with pytest.raises(UserError, match="cannot write to the run directory"):
        Run.open(run)
    assert not (tmp_path / "made").exists()


def test_a_refused_directory_keeps_the_lock_of_others(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("somebody's")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not empty and not a run directory \(found thesis.tex\)"):
        Run.open(tmp_path, create=True)
    assert (tmp_path / ".lock").read_text() == "somebody's"
    (tmp_path / ".lock").unlink()
    with pytest.raises(UserError, match="not empty"):
        Run.open(tmp_path, create=True)
    assert not (tmp_path / ".lock").exists()  # this one was ours


def test_a_new_run_that_was_killed_while_it_wrote_its_manifest_can_be_started(tmp_path: Path) -> None:
    (tmp_path / "manifest.json.partial").write_text("{")
    (tmp_path / ".lock").write_text("")
    run = Run.open(tmp_path, create=True)
    run.write_config({"layer": 1})
    run.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml", "manifest.json"]


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_was_renamed_while_a_stage_worked_is_not_made_again(tmp_path: Path, again: bool) -> None:
    run = Run.open(run_with(tmp_path / "run"))
    with pytest.raises(UserError, match="deleted or renamed while this command worked on it"), run.working(Stage("b", "1", ())):
        run.path.rename(tmp_path / "elsewhere")
        if again:
            run.path.mkdir()
    run.close()
    assert run.path.exists() == again and not (again and list(run.path.iterdir()))


def test_work_that_a_kill_left_behind_after_the_last_move_is_removed(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run")
    left, unfinished = run / "work" / "train-a-1", run / "work" / "train-a-2"
    for folder in (left / "parts", unfinished):
        folder.mkdir(parents=True)
    Run.open(run).close()
    assert not left.exists() and unfinished.exists()


def test_the_duration_of_a_stage_does_not_depend_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(tmp_path, create=True)
    with run.working(Stage("a", "1", ())):
        monkeypatch.setattr(time, "time", lambda: 0.0)
    record = run.record("a")
    assert record is not None and 0 <= record.seconds < 5


def test_every_changed_byte_of_a_small_result_is_noticed_when_it_is_opened(analysed_run: Path, tmp_path: Path) -> None:
    shutil.copytree(analysed_run, tmp_path / "run")
    folder = tmp_path / "run" / "batchtopk"
    opened = {
        "latents.parquet": lambda run: run.latents,
        "examples.sqlite": lambda run: run.examples(0),
        "model.safetensors": lambda run: run.crosscoder,
    }
    for name, read in opened.items():
        path = folder / name
        content = path.read_bytes()
        for at in (len(content) // 3, len(content) - 1):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(UserError, match=rf"{name} is damaged: its content is not what its stage wrote"):
                read(crossdiff.open(tmp_path / "run"))
            with pytest.raises(UserError, match=rf"batchtopk/{name}: the content has changed"):
                run_command(["verify", str(tmp_path / "run")])
        path.write_bytes(content)
        read(crossdiff.open(tmp_path / "run"))


@pytest.mark.parametrize("name", ["documents.parquet", "statistics.safetensors", "manifest.json"])
def test_a_changed_file_of_the_store_is_noticed(analysed_run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(analysed_run, tmp_path / "run")
    path = tmp_path / "run" / "activations" / name
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        store = crossdiff.Store(path.parent)
        _ = store.documents, store.normalisation


def test_verify_names_what_is_missing_and_what_has_no_digest(
    analysed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(analysed_run, tmp_path / "run")
    run_command(["verify", str(tmp_path / "run")])
    assert "is intact" in capsys.readouterr().out
    assert verify(tmp_path / "run").n_files > 10
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["stages"]["analyze/batchtopk"]["files"] = {}
    forge(tmp_path / "run", stages=manifest["stages"])
    run_command(["verify", str(tmp_path / "run")])
    assert "without digests: analyze/batchtopk" in capsys.readouterr().out
    (tmp_path / "run" / "batchtopk" / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"batchtopk/train\.jsonl: missing"):
        run_command(["verify", str(tmp_path / "run")])


def test_a_stage_whose_file_was_deleted_is_run_again(tmp_path: Path) -> None:
    run = Run.open(tmp_path, create=True)
    stage = Stage("concepts", "1", ("concepts",))
    with run.working(stage) as work:
        (work / "concepts").mkdir()
        (work / "concepts" / "table").write_text("x")
    assert run.is_done(stage)
    (tmp_path / "concepts" / "table").unlink()
    assert not run.is_done(stage)


def test_a_table_is_not_checked_while_results_are_replaced(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run")
    (run / "a" / "result").write_text("changed")
    with pytest.raises(UserError, match="damaged"):
        intact(run / "a" / "result")
    forge(run, swap=[["work/train-a-2/a/result", "a/result"]])
    assert intact(run / "a" / "result") == run / "a" / "result"


def bomb(levels: int) -> str:
    """YAML whose last key stands for 10 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize("levels", [7, 9, 60])
def test_yaml_that_stands_for_too_much_is_refused_at_once(tmp_path: Path, levels: int) -> None:
    (tmp_path / "config.yaml").write_text(bomb(levels))
    started = time.monotonic()
    with pytest.raises(UserError, match="more than 100,000 values") as refused:
        read_yaml(tmp_path / "config.yaml")
    assert time.monotonic() - started < 5 and len(str(refused.value)) < 1000
    assert len(parse_yaml(bomb(3))["a2"]) == 10  # aliases as such are fine


@pytest.mark.parametrize("text", ["&a [*a]", "[" * 5000 + "]" * 5000, "day: 2026-13-45"])
def test_yaml_that_contains_itself_or_is_too_deep_or_has_no_such_date_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_the_largest_yaml_is_read() -> None:
    assert len(parse_yaml("[" + ",".join(["1"] * (MAX_VALUES - 1)) + "]")) == MAX_VALUES - 1
    with pytest.raises(yaml.YAMLError, match="more than"):
        parse_yaml("[" + ",".join(["1"] * MAX_VALUES) + "]")


def test_a_config_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 \(byte 9\)"):
        read_yaml(tmp_path / "config.yaml")


def test_a_value_in_a_message_is_short() -> None:
    assert short_repr("x" * 10**6) == "'" + "x" * 97 + "..." + "x" * 98 + "'"
    assert len(short_repr([["y" * 1000] * 1000] * 1000)) <= 200
    assert short_repr({"layer": 3}) == "{'layer': 3}"


def sqlite_error(code: int, text: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk of .* is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk of .* is full"),
        (pl.exceptions.ComputeError("No space left on device (os error 28)"), "the disk of .* is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk of .* is full"),
        (RuntimeError("[enforce fail] write failed: No space left on device"), "the disk of .* is full"),
        (sqlite_error(sqlite3.SQLITE_FULL, "database or disk is full"), "the disk of .* is full"),
        (sqlite_error(sqlite3.SQLITE_IOERR_WRITE, "disk I/O error"), "fails to read or write"),
        (OSError(errno.EIO, "Input/output error", "/x/file"), "fails to read or write /x/file"),
        (OSError(errno.EROFS, "Read-only file system", "/x/file"), "cannot read or write /x/file: Read-only"),
        (sqlite_error(sqlite3.SQLITE_READONLY, "attempt to write a readonly database"), "cannot read or write"),
    ],
)
def test_disk_errors_of_every_library_become_one_sentence(tmp_path: Path, error: Exception, message: str) -> None:
    for seen in (error, wrapped(error)):
        explained = explain_disk_error(seen, tmp_path)
        assert explained is not None and re.search(message, str(explained))


def wrapped(error: Exception) -> Exception:
    try:
        raise RuntimeError("a library failed") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error", [ValueError("28"), OSError(errno.ENOENT, os.strerror(errno.ENOENT)), sqlite_error(sqlite3.SQLITE_LOCKED, "locked")]
)
def test_other_errors_are_not_of_the_disk(tmp_path: Path, error: Exception) -> None:
    assert explain_disk_error(error, tmp_path) is None


def test_a_file_may_be_read_by_whom_the_system_says(tmp_path: Path) -> None:
    """safetensors writes files that only their owner may read; on a shared disk a run must be like any other folder."""
    plain = tmp_path / "plain"
    plain.write_text("")
    with replacing(tmp_path / "weights") as partial:
        save_file({"a": torch.ones(1)}, partial)
    assert (tmp_path / "weights").stat().st_mode == plain.stat().st_mode
