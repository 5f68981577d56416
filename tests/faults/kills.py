"""Kill each command of a run just before each of its file changes, and run it again."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiny import STEPS, Outcome, Tally, Tiny, command, digests, forked

from golden import compare_files, kind_of

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
MADE_TO_LAST = ("tensorboard",)
"""Folders that a resumed command adds files to."""


def counting(folder: Path, act: Callable[[int], None]) -> Callable[[], None]:
    """A function that makes this process call `act` before every change of a file below a folder, with the change's number.

    Libraries that write natively, such as SQLite, are not seen; the changes around them are.
    """

    def start() -> None:
        count = 0

        def change() -> None:
            nonlocal count
            count += 1
            act(count)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, mode, flags = arguments
                writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else mode != "r"
                if writes and is_below(path):
                    change()
            elif event in CHANGES and is_below(arguments[0]):
                change()

        def is_below(path: Any) -> bool:
            # `shutil.rmtree` names files relative to an open folder.
            return isinstance(path, str | os.PathLike) and (os.sep not in str(path) or str(path).startswith(str(folder)))

        sync = os.fsync

        def counted_sync(file: int) -> None:
            change()
            sync(file)

        os.fsync = counted_sync
        sys.addaudithook(audit)

    return start


def kill_at(number: int) -> Callable[[int], None]:
    def act(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def count_changes(tiny: Tiny, step: str) -> int:
    """How many changes the undisturbed command makes."""
    tiny.restore(tiny.before(step))
    log = tiny.folder / "changes.txt"

    def note(count: int) -> None:
        log.write_text(str(count))

    outcome = command(tiny.words(step), tiny.folder, counting(tiny.run, note))
    if outcome.status:
        raise RuntimeError(f"{step} failed: {outcome.output[-2000:]}")
    return int(log.read_text())


def difference(tiny: Tiny, step: str) -> str | None:
    """How the run differs from the undisturbed one after the same step; None if it does not."""
    expected, found = tiny.state(step), tiny.run
    if left := [str(path.relative_to(found)) for path in found.rglob("*") if ".partial" in path.name]:
        return f"{left[0]} is left"
    if (found / "work").exists():
        return f"work/ is left with {sorted(path.name for path in (found / 'work').rglob('*'))}"
    old, new = _results(expected), _results(found)
    if old.keys() != new.keys():
        return f"missing: {sorted(old.keys() - new.keys())}, not expected: {sorted(new.keys() - old.keys())}"
    if Counter(_replaced(expected)) != Counter(_replaced(found)):
        return "old/ holds other files"
    changed = [name for name in old if old[name] != new[name]]
    if strangers := [name for name in changed if name not in tiny.changing]:
        return f"{strangers[0]} has another content ({len(strangers)} files)"

    def look() -> None:
        for name in changed:
            problems = compare_files(kind_of(Path(name)), expected / name, found / name).problems
            # A manifest with digests of files that hold times differs in them, too.
            if problems := [each for each in problems if not any(f"files/{other}:" in each for other in tiny.changing)]:
                sys.exit(f"{name}: {problems[0]}")

    outcome = forked(look, tiny.folder / "compared.txt")
    return outcome.last_line if outcome.status else None


def _results(run: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(run).items() if not name.startswith((*MADE_TO_LAST, "old/"))}


def _replaced(run: Path) -> Iterator[str]:
    """Digests of the files in `old/`, whose folders are named after the time."""
    return (hashlib.sha256(path.read_bytes()).hexdigest() for path in (run / "old").rglob("*") if path.is_file())


def kill(tiny: Tiny, step: str, number: int) -> str | None:
    """Kill a command before its n-th change and run it again. Returns what was lost."""
    tiny.restore(tiny.before(step))
    killed = command(tiny.words(step), tiny.folder, counting(tiny.run, kill_at(number)))
    if killed.status not in (0, -signal.SIGKILL):  # how many checkpoints a training writes depends on the time
        return f"it was not killed: {describe(killed)}"
    again = command(tiny.words(step), tiny.folder)
    return f"the second command failed: {describe(again)}" if again.status else difference(tiny, step)


def describe(outcome: Outcome) -> str:
    return f"status {outcome.status}: {outcome.last_line}"


def kills(tiny: Tiny, every: int = 1, steps: tuple[str, ...] = tuple(STEPS)) -> Iterator[Tally]:
    """Kill each command before every `every`-th change of a file."""
    for step in steps:
        tally, changes = Tally("kills", step), count_changes(tiny, step)
        for number in range(1, changes + 1, every):
            tally.add(f"before change {number} of {changes}", kill(tiny, step, number))
        yield tally
