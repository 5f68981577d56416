"""The record of a run, `manifest.json`: the finished stages, what each has left, and the moves that are still to be made.

A run directory may come from somebody else, so nothing in it is trusted: the manifest is checked as a whole before anything is
moved, every path in it must lie inside the run, and no link may lead out of the run.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from crossdiff.errors import UserError
from crossdiff.files import read_json, short_repr, write_json

FORMAT = 1
MANIFEST = "manifest.json"
OLD, WORK = "old", "work"
OWN = (MANIFEST, "config.yaml", ".lock")
"""Files that no stage writes and no move touches."""
MAY_LEAD_OUT = "activations"
"""The only thing in a run that may be a link to another disk."""


def _check_inside(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError("expected a relative path inside the run")
    return name


def _check_move(move: tuple[str, str]) -> tuple[str, str]:
    """A move replaces a result: the old one goes to `old/`, the new one comes from a folder in `work/`."""
    source, target = (PurePosixPath(path) for path in move)
    retires = source.parts[0] not in (OLD, WORK) and target.parts[0] == OLD and len(target.parts) > 2
    arrives = source.parts[0] == WORK and len(source.parts) > 2 and target.parts[0] not in (OLD, WORK)
    if not (retires or arrives) or str(source) in OWN or str(target) in OWN:
        raise ValueError("expected a move of a result to old/, or from work/ to its place")
    return move


Inside = Annotated[str, AfterValidator(_check_inside)]
Move = Annotated[tuple[Inside, Inside], AfterValidator(_check_move)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StageRecord(_Record):
    """A finished stage.

    Attributes:
        outputs: its files and folders, relative to the run.
        settings: those of its settings that are in the fingerprint, as JSON; None in records of earlier versions.
        needs: names of the stages whose outputs it is made from.
        files: SHA-256 of each of its files; records of earlier versions have none.
        seconds: how long it took.
        finished: local time with the offset from UTC.
    """

    fingerprint: str
    outputs: list[Inside] = []
    settings: dict[str, Any] | None = None
    needs: list[str] = []
    files: dict[Inside, str] = {}
    seconds: float = 0.0
    finished: str = ""


class RunManifest(_Record):
    """`manifest.json`.

    Attributes:
        swap: moves of results that are still to be made, from and to.
        template_date: the date that the chat template writes in this run (YYYY-MM-DD).
    """

    format: int = FORMAT
    stages: dict[str, StageRecord] = {}
    swap: list[Annotated[Move, Field(strict=False)]] = []
    template_date: str | None = None

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file of a finished stage."""
        return {name: digest for record in self.stages.values() for name, digest in record.files.items()}

    @classmethod
    def read(cls, folder: Path) -> RunManifest:
        """Read the manifest of a run and check every value in it.

        Raises:
            UserError: names what is missing, damaged, of another version, or leads out of the run.
        """
        path = folder / MANIFEST
        values = read_json(path)
        found = values.get("format") if isinstance(values, dict) else values
        if found != FORMAT or isinstance(found, bool):
            raise UserError(
                f"{path} is not a run manifest of format {FORMAT} (found {short_repr(found)}); choose another run directory"
            )
        try:
            return cls.model_validate(values)
        except (ValidationError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged, or crossdiff did not write it: {_first_problem(error)}; do not use this run"
            ) from None

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, self.model_dump(mode="json"))


def _first_problem(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    first = error.errors(include_url=False)[0]
    return (
        f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')} (found {short_repr(first['input'])})"
    )


def check_links(folder: Path) -> None:
    """Check that no link in a run leads out of it, except for `activations`, which may lie on another disk.

    Otherwise a run from somebody else could have other files read, published, or overwritten.

    Raises:
        UserError: names the first such link.
    """
    inside = folder.resolve()
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found = Path(path, name)
            if not found.is_symlink() or found == folder / MAY_LEAD_OUT:
                continue
            target = found.resolve() if not _is_circular(found) else None
            if target is None or not target.is_relative_to(inside):
                raise UserError(
                    f"{found} is a link to {os.readlink(found)}, outside of the run; only {MAY_LEAD_OUT} may be one. Remove "
                    "the link, or put the file itself there"
                )


def _is_circular(link: Path) -> bool:
    try:
        link.stat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
