"""The run directory: one manifest, one lock, and results that are only replaced by complete ones.

A stage writes into a folder in `work/` that is named after its fingerprint. Once it is complete, its outputs are swapped in:
the previous ones move to `old/`, where they stay until `crossdiff clean`. The moves are written into the manifest before the
first one is made, so a kill between two of them is repaired when the run is opened next. What was made from a replaced result
moves to `old/` with it, so that a run never shows results of different trainings side by side.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from crossdiff.errors import UserError
from crossdiff.files import sha256, write_text
from crossdiff.integrity import files_of
from crossdiff.ranks import ALONE, Ranks
from crossdiff.run_manifest import MANIFEST, OLD, WORK, RunManifest, StageRecord, check_links

LOCK, CONFIG = ".lock", "config.yaml"
UNFINISHED = MANIFEST + ".partial"
"""What a new run consists of if it was killed while its first file was written."""


@dataclass(frozen=True)
class Stage:
    """A stage: its name, a fingerprint of everything that it depends on, and its outputs (paths relative to the run).

    Attributes:
        settings: those of its settings that are in the fingerprint, as JSON. The manifest keeps them, so that a later command
            can show which of them differ.
        needs: names of the stages whose outputs it is made from.
    """

    name: str
    fingerprint: str
    outputs: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


class Leftover(NamedTuple):
    """A file or folder that `clean` may delete, with its size in bytes."""

    path: Path
    n_bytes: int
    is_harvest: bool
    is_replaced: bool


class Run:
    """A run directory, locked by this process. Of several ranks, the first holds the lock, and only the first changes files."""

    def __init__(self, path: Path, manifest: RunManifest, lock: _Lock | None, ranks: Ranks = ALONE) -> None:
        self.path = path
        self.manifest = manifest
        self.ranks = ranks
        self._lock = lock

    @classmethod
    def open(cls, path: Path, ranks: Ranks = ALONE, create: bool = False) -> Run:
        """Open a run directory and take its lock.

        Args:
            create: start a new run if there is none. It exists once its settings are written or a stage begins; if it is closed
                before that, nothing of it is left.

        Raises:
            UserError: there is no run at the path, another process works on it, or its manifest is damaged or
                names a path outside the run.
        """
        run = cls._hold(path, ranks, create) if ranks.is_first else None
        manifest = ranks.agree(run.manifest if run is not None else RunManifest())
        return run or cls(path, manifest, None, ranks)

    @classmethod
    def _hold(cls, path: Path, ranks: Ranks, create: bool) -> Run:
        if not create and not (path / MANIFEST).exists():
            raise UserError(
                f"there is no run at {path}: it has no {MANIFEST}; check the path, or make a run with `crossdiff run` or "
                "`crossdiff harvest`"
            )
        lock = _Lock(path)
        try:
            if (path / MANIFEST).exists():
                manifest = RunManifest.read(path)
                check_links(path)
            else:
                manifest = RunManifest()
                strangers = sorted(name for each in path.iterdir() if (name := each.name) not in (LOCK, UNFINISHED))
                if strangers:
                    raise UserError(
                        f"{path} is not empty and not a run directory (found {strangers[0]}); choose another folder"
                    )
            run = cls(path, manifest, lock, ranks)
            run._swap_moves()
            run._remove_work_of_finished_stages()
        except BaseException:
            lock.release(undo=not (path / MANIFEST).exists())
            raise
        return run

    @property
    def exists(self) -> bool:
        """Whether there is more of this run than a lock."""
        return (self.path / MANIFEST).exists()

    def close(self) -> None:
        """Release the lock; of a new run that was never begun, remove the lock and the folders that were made for it."""
        if self._lock is not None:
            self._lock.release(undo=not self.exists)

    def save(self) -> None:
        self.check_place()
        self.manifest.write(self.path)

    def check_place(self) -> None:
        """Raises `UserError` if the run directory was deleted or renamed since it was opened."""
        if self._lock is not None and not self._lock.is_in_place():
            raise UserError(
                f"the run directory {self.path} was deleted or renamed while this command worked on it; put it back under its "
                "name and run the same command again"
            )

    def write_config(self, values: dict[str, Any]) -> None:
        """Write the settings of this run to `config.yaml`, unless they are those in it."""
        if not self.ranks.is_first:
            return
        if not self.exists:
            self.save()
        path, text = self.path / CONFIG, yaml.safe_dump(values, sort_keys=False)
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)

    @property
    def template_date(self) -> str | None:
        """The date that the chat template writes in this run (YYYY-MM-DD); None if no harvest has set one."""
        return self.manifest.template_date

    def pin_template_date(self, day: date | None) -> None:
        """Keep the date that the chat template writes in this run, so that a harvest resumes with it on another day."""
        if day is not None and self.template_date != day.isoformat():
            self.manifest.template_date = day.isoformat()
            if self.ranks.is_first:
                self.save()

    def record(self, name: str) -> StageRecord | None:
        """The manifest's record of a finished stage; None if it is not finished."""
        return self.manifest.stages.get(name)

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage's outputs exist and come from exactly these inputs and settings."""
        entry = self.record(stage.name)
        if entry is None or entry.fingerprint != stage.fingerprint:
            return False
        # Another machine may see later what the first one has written.
        return self.ranks.agree(all((self.path / name).exists() for name in (*stage.outputs, *entry.files)))

    @contextmanager
    def working(self, stage: Stage) -> Iterator[Path]:
        """A folder to work in, whose files become the stage's outputs at the end of the block.

        The folder survives a kill or an error, so the stage can resume from what it has written. Several ranks enter and leave
        it together.
        """
        folder = self._work_folder(stage.name, stage.fingerprint)
        self.check_place()
        if self.ranks.is_first and not self.exists:
            self.save()
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        self.ranks.wait()
        try:
            yield folder
        except BaseException:
            if self.ranks.is_first:
                _remove_empty_folders(folder.parent)  # the stage resumes from the files that it has written
            raise
        self.ranks.wait()
        if self.ranks.is_first:
            self._swap_in(stage, folder, time.monotonic() - started)
        self.manifest = self.ranks.agree(self.manifest)

    def _work_folder(self, name: str, fingerprint: str) -> Path:
        return self.path / WORK / f"{name.replace('/', '-')}-{fingerprint}"

    def _swap_in(self, stage: Stage, folder: Path, seconds: float) -> None:
        missing = [output for output in stage.outputs if not (folder / output).exists()]
        assert not missing, f"stage {stage.name} did not write {missing}"
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns()}"  # no two are the same
        retired = {name: f"{OLD}/{stamp}-{name.replace('/', '-')}" for name in (*self._outdated_by(stage), stage.name)}
        moves = []
        for name, target in retired.items():
            outputs = stage.outputs if name == stage.name else self.manifest.stages.pop(name).outputs
            moves += [(output, f"{target}/{output}") for output in outputs if (self.path / output).exists()]
        moves += [(str((folder / output).relative_to(self.path)), output) for output in stage.outputs]
        self.manifest.stages[stage.name] = StageRecord(
            fingerprint=stage.fingerprint,
            outputs=list(stage.outputs),
            settings=stage.settings,
            needs=list(stage.needs),
            files={name: sha256(folder / name) for output in stage.outputs for name in files_of(folder, output)},
            seconds=round(seconds, 1),
            finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        self.manifest.swap = moves
        self.save()
        self._swap_moves()
        self._remove_work(folder)

    def _remove_work(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # other stages are at work, or nothing was
            folder.parent.rmdir()

    def _remove_work_of_finished_stages(self) -> None:
        """Remove the work folders of stages that are done: a kill can leave one between the last move and its removal."""
        for name, record in self.manifest.stages.items():
            if all((self.path / output).exists() for output in record.outputs):
                self._remove_work(self._work_folder(name, record.fingerprint))

    def _outdated_by(self, stage: Stage) -> list[str]:
        """The finished stages that were made from the result that a stage replaces, the latest of them first."""
        old = self.record(stage.name)
        if old is None or old.fingerprint == stage.fingerprint:
            return []
        found = [stage.name]
        for name in found:
            # Results of earlier versions hold no record of what they were made from.
            direct = [key for key, entry in self.manifest.stages.items() if name in entry.needs]
            found += [key for key in direct if key not in found]
        return found[:0:-1]

    def _swap_moves(self) -> None:
        """Make the moves that the manifest lists, each once, however often this is called."""
        for source, target in list(self.manifest.swap):
            if (self.path / source).is_symlink() or (self.path / source).exists():
                (self.path / target).parent.mkdir(parents=True, exist_ok=True)
                (self.path / source).rename(self.path / target)
            self.manifest.swap.pop(0)
            self.save()

    def leftovers(self) -> list[Leftover]:
        """What no result needs: replaced results in `old/`, and unfinished stages in `work/`."""
        found = []
        for name in (OLD, WORK):
            folder = self.path / name
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                files = (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,)
                n_bytes = sum(file.lstat().st_size for file in files if not file.is_dir() or file.is_symlink())
                is_harvest = name == WORK and path.name.startswith("harvest-")
                found.append(Leftover(path, n_bytes, is_harvest, name == OLD))
        return found

    def clean(self, leftovers: Iterable[Leftover]) -> None:
        """Delete some of the `leftovers`."""
        for path, *_ in leftovers:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in (OLD, WORK):
            with suppress(OSError):  # something is left in it, or it does not exist
                (self.path / name).rmdir()


def _remove_empty_folders(folder: Path) -> None:
    """Remove the folders without any file in a folder, and the folder itself if nothing is left in it."""
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(path)


class _Lock:
    """The lock of a run directory, which is made if it does not exist. The system releases it when the process ends.

    Raises:
        UserError: the directory cannot be written to, or another process holds the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made = tuple(folder for folder in (path, *path.parents) if not folder.exists())
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._made_file = not os.path.lexists(path / LOCK)
            # Not through a link, nor from something that would block.
            self._file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            self._remove_made()
            raise UserError(f"cannot write to the run directory {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise UserError(f"another process is working on {path}; wait for it, or choose another run directory") from None
        self._place = _identity(path)

    def is_in_place(self) -> bool:
        """Whether the directory is still the one that was locked."""
        return _identity(self.path) == self._place

    def release(self, undo: bool) -> None:
        """Release the lock.

        Args:
            undo: remove what was made for it.
        """
        if undo and self.is_in_place():
            if self._made_file:
                (self.path / LOCK).unlink(missing_ok=True)
            self._remove_made()
        os.close(self._file)

    def _remove_made(self) -> None:
        for folder in self._made:
            with suppress(OSError):  # not empty, or never made
                folder.rmdir()


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None
