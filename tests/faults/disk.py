"""Run each command on a disk that is full, or nearly so, and again after space was made."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kills import describe, difference
from tiny import STEPS, Tally, Tiny, command, digests, forked

KILOBYTES = (0, 4, 16, 64, 128, 256, 1024, 4096)
"""What is left on the disk when a command starts."""
SIZE = 256 * 2**20
NEW_NAMESPACE = 0x20000
FULL = re.compile(r"^crossdiff: the disk of \S+ (is full|has \d+ MB left)")
CHANGED = ("config.yaml", "manifest.json", ".lock", "tensorboard/")
"""What a command that stops may have changed: its settings and the curves of its training."""


def mount(folder: Path) -> None:
    """Give this process, and those that it starts, a small disk of their own at a folder. Raises `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_NAMESPACE):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]):
        if subprocess.run(["mount", *words], capture_output=True).returncode:
            raise OSError(f"mount {' '.join(words)} was refused")


def fill(disk: Path, kilobytes: int) -> Path:
    """Write a file that leaves so much room on a disk."""
    ballast, room = disk / "ballast", os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - kilobytes * 1024)
    return ballast


def on_full_disk(tiny: Tiny, step: str, kilobytes: int) -> str | None:
    """Run a command with so much room left, and again with enough. Returns what was lost."""
    before = tiny.before(step)
    tiny.restore(before)
    ballast = fill(tiny.run.parent, kilobytes)
    stopped = command(tiny.words(step), tiny.folder)
    ballast.unlink()
    if stopped.status and not FULL.match(stopped.last_line):
        return f"it does not say that the disk is full, but {describe(stopped)}"
    if stopped.status and before is not None:
        harmed = [name for name, digest in _kept(before).items() if _kept(tiny.run).get(name) != digest]
        if harmed:
            return f"{harmed[0]} was harmed ({len(harmed)} files)"
    again = command(tiny.words(step), tiny.folder)
    return f"with enough room: {describe(again)}" if again.status else difference(tiny, step)


def _kept(run: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(run).items() if not name.startswith((*CHANGED, "old/"))}


def disk(tiny: Tiny, every: int = 1, steps: tuple[str, ...] = tuple(STEPS)) -> Iterator[Tally]:
    """Every command with each amount of room. Says so, and tries nothing, where a disk cannot be mounted."""
    place = tiny.run.parent / "disk"
    place.mkdir(exist_ok=True)
    probe = forked(lambda: mount(place), tiny.folder / "mounted.txt")
    if probe.status:
        print(f"disk: skipped, since this user may not mount a disk ({probe.last_line})", file=sys.stderr)
        return
    for step in steps:
        results = tiny.folder / "losses.txt"

        def work(step: str = step, results: Path = results) -> None:
            mount(place)
            inside = Tiny(tiny.folder, tiny.changing, place / "run")
            with results.open("w") as file:
                for kilobytes in KILOBYTES[::every]:
                    problem = on_full_disk(inside, step, kilobytes)
                    file.write(f"{kilobytes} KB left\t{' '.join((problem or '').split())}\n")

        outcome = forked(work, tiny.folder / "disk.txt", 60 * len(KILOBYTES))
        tally = Tally("disk", step)
        if outcome.status:
            tally.add("the disk", describe(outcome))
        for line in results.read_text().splitlines():
            tally.add(*line.split("\t"))
        yield tally
    shutil.rmtree(place)
