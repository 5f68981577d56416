"""The largest side table of a crosscoder or of the concepts, which stays on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from crossdiff.errors import UserError


def activity_of(path: Path, unit: str, number: int, command: str) -> list[dict[str, Any]]:
    """The groups of tokens on which a latent or concept is active: rows of activity.parquet, the largest share first.

    Args:
        unit: column with its number, `latent` or `concept`.
        command: the command that writes the file.
    """
    if not path.is_file():
        return []
    try:
        found = pl.scan_parquet(path).filter(pl.col(unit) == number).collect()
        return found.sort("share", descending=True, nulls_last=True, maintain_order=True).to_dicts()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}); run `{command}` again") from error
