"""Which results a run holds: other results are another edition, and what is read from one is never mixed with another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from crossdiff.errors import UserError
from crossdiff.files import fingerprint
from crossdiff.run_manifest import MANIFEST, RunManifest

NOT_SHOWN = ("report", "steer")
"""Stages whose results the dashboard does not show."""


class BeingReplaced(UserError):
    """A run's results are being replaced, or were while they were read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"results of {directory} are being replaced; try again in a moment, or repeat the command if it was killed"
        )


@dataclass(frozen=True)
class Edition:
    """The results of a run: a digest of its stages' records, and when the manifest was written (seconds since 1970)."""

    digest: str
    written: float = field(compare=False)


def edition_of(directory: Path) -> Edition:
    """The results that a run holds now. A folder from `crossdiff pull` without a manifest holds one edition for ever."""
    path = directory / MANIFEST
    if not path.is_file():
        return Edition("", 0.0)
    manifest = RunManifest.read(directory)
    if manifest.swap:
        raise BeingReplaced(directory)
    records = {
        name: [record.fingerprint, record.finished]
        for name, record in manifest.stages.items()
        if name.partition("/")[0] not in NOT_SHOWN
    }
    return Edition(fingerprint(records), path.stat().st_mtime)


@contextmanager
def one_edition(directories: Sequence[Path]) -> Iterator[tuple[Edition, ...]]:
    """The editions that are read in the block.

    Raises:
        BeingReplaced: they are being replaced, or were within the block. A file that was missing may have moved away.
    """
    before = tuple(map(edition_of, directories))
    try:
        yield before
    except UserError:
        _check_unchanged(directories, before)
        raise
    _check_unchanged(directories, before)


def _check_unchanged(directories: Sequence[Path], before: tuple[Edition, ...]) -> None:
    for directory, edition in zip(directories, before, strict=True):
        if edition_of(directory) != edition:
            raise BeingReplaced(directory)
