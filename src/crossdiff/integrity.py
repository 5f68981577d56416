"""Whether the results of a run are what its stages wrote: each file has a SHA-256 in the run's manifest.

Files up to `SMALL` bytes are checked whenever they are opened; `crossdiff verify` and publishing check all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from crossdiff.errors import UserError
from crossdiff.files import read_json, sha256
from crossdiff.run_manifest import MANIFEST, RunManifest, check_links

if TYPE_CHECKING:
    import polars as pl

SMALL = 64 * 2**20
DEPTH = 3
"""How far above a result file the folder of its run may be."""


def files_of(folder: Path, output: str) -> Iterator[str]:
    """The files of a stage's output whose digests the manifest keeps, relative to `folder`.

    An activation store has a manifest of its own with the digests of all its files, so its manifest stands for it.
    """
    path = folder / output
    if path.is_file():
        yield output
    elif (path / MANIFEST).is_file():
        yield f"{output}/{MANIFEST}"
    else:
        for parent, _, names in os.walk(path):
            yield from (str(Path(parent, name).relative_to(folder)) for name in sorted(names))


def intact(path: Path) -> Path:
    """The path of a result file, checked if it is small and its run has a digest of it.

    Raises:
        UserError: the content has changed since its stage wrote it; or the run's manifest is damaged.
    """
    for folder in path.parents[:DEPTH]:
        digests = _digests(folder)
        if digests is None:
            continue
        expected = digests.get(path.relative_to(folder).as_posix())
        if expected is not None and path.is_file() and (found := path.stat()).st_size <= SMALL:
            _check(path, expected, (found.st_mtime_ns, found.st_size, found.st_ino))
        break
    return path


def _digests(folder: Path) -> dict[str, str] | None:
    """The digests in the manifest of a run; None if the folder is not one."""
    path = folder / MANIFEST
    try:
        found = path.stat()
    except OSError:
        return None
    return _read_digests(folder, (found.st_mtime_ns, found.st_size, found.st_ino))


@lru_cache(maxsize=64)
def _read_digests(folder: Path, state: tuple[int, ...]) -> dict[str, str] | None:
    values = read_json(folder / MANIFEST)
    if not isinstance(values, dict) or "stages" not in values:
        return None  # the manifest of an activation store has the same name
    manifest = RunManifest.read(folder)
    return {} if manifest.swap else manifest.digests  # while results are replaced, the files are not yet those of the manifest


@lru_cache(maxsize=4096)
def _check(path: Path, expected: str, state: tuple[int, ...]) -> None:
    """Compare a file's digest; a file that has not changed since (`state`) is not read again. Errors are not cached."""
    if sha256(path) != expected:
        raise UserError(
            f"{path} is damaged: its content is not what its stage wrote (its SHA-256 differs). Restore it from a copy, or "
            "delete it and run the same command again; `crossdiff verify` checks all files of the run"
        )


def read_parquet(path: Path, command: str | None = None) -> pl.DataFrame:
    """Read a table of a run, checked as by `intact`.

    Args:
        command: the command that writes it, for the message.

    Raises:
        UserError: the file has changed since its stage wrote it, or cannot be read.
    """
    import polars as pl

    try:
        return pl.read_parquet(intact(path), glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        remedy = f"run `{command}` again" if command else "delete it and run the command that wrote it again"
        raise UserError(f"{path} cannot be read as Parquet ({error}); {remedy}") from error


class Verified(NamedTuple):
    """What `verify` has found: what is wrong with which file, the number of files and bytes read, and the stages without
    digests, which an earlier version wrote."""

    problems: list[str]
    n_files: int
    n_bytes: int
    without_digests: list[str]


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file that `verify` reads; 0 for a missing one."""
    names = RunManifest.read(folder).digests
    return {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in names}


def verify(
    folder: Path, advance: Callable[[int], None] = lambda n_bytes: None, only: Collection[str] | None = None
) -> Verified:
    """Read every result file of a run and compare it with its digest, several files at a time.

    The files inside of an activation store are left to `crossdiff.activations.store.verify`.

    Args:
        advance: called with the bytes of each file that was read.
        only: the files to check, relative to the run; all of them by default.

    Raises:
        UserError: the manifest is damaged, or a link leads out of the run.
    """
    check_links(folder)
    manifest = RunManifest.read(folder)
    digests = manifest.digests
    if manifest.swap:
        raise UserError(
            f"results of {folder} are being replaced; try again in a moment, or repeat the command if it was killed"
        )

    def check(name: str) -> tuple[str | None, int]:
        path = folder / name
        if not path.is_file():
            return f"{name}: missing", 0
        n_bytes = path.stat().st_size
        changed = sha256(path) != digests[name]
        advance(n_bytes)
        return (f"{name}: the content has changed (its SHA-256 differs)" if changed else None), n_bytes

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(check, sorted(name for name in digests if only is None or name in only)))
    return Verified(
        [problem for problem, _ in found if problem is not None],
        len(found),
        sum(n_bytes for _, n_bytes in found),
        sorted(name for name, record in manifest.stages.items() if not record.files),
    )
