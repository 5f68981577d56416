"""The settings files that published weights come with: JSON of others, whose shape is checked before it is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from crossdiff.errors import UserError
from crossdiff.files import read_json


def read_settings(path: Path) -> dict[str, Any]:
    """Read settings by name.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold settings by name, found {type(found).__name__}; download it again")
    return found


def group(settings: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """A group of settings within others; empty if it is missing or null."""
    found = settings.get(key)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"the settings beside {path} have {key} {found!r}, expected settings by name; download them again")
    return found or {}


def number(settings: dict[str, Any], key: str, default: float, path: Path) -> float:
    """A finite number; the default if it is missing or null."""
    found = settings.get(key)
    if found is None:
        return default
    if not isinstance(found, int | float) or isinstance(found, bool) or not math.isfinite(found):
        raise UserError(f"the settings beside {path} have {key} {found!r}, expected a number; download them again")
    return float(found)


def layer_of(settings: dict[str, Any]) -> int | None:
    """The number of a layer; None if there is none."""
    found = settings.get("layer")
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None
