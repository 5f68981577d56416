"""The texts of a run: where they are, and what identifies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crossdiff.config import DatasetConfig, RunConfig
from crossdiff.errors import UserError
from crossdiff.files import sha256


def check_texts(config: RunConfig) -> None:
    """Raises `UserError` when the settings name no texts."""
    if not config.dataset:
        raise UserError("no texts: name at least one --dataset (a .jsonl, .jsonl.gz, .parquet or .txt file, or a Hub dataset)")


def resolve(dataset: DatasetConfig) -> DatasetConfig:
    """The dataset with a `demo:` name replaced by the file that it stands for; the title stays."""
    if not dataset.path.startswith("demo:"):
        return dataset
    from crossdiff.pairs import demo_path

    return dataset.model_copy(update={"path": str(demo_path(dataset.path)), "name": dataset.title})


def identify_dataset(dataset: DatasetConfig) -> dict[str, Any]:
    """What identifies a dataset: its settings and, for a local file, a digest of the content."""
    path = Path(resolve(dataset).path)
    if not path.is_file():
        return dataset.model_dump()
    return dataset.model_dump(exclude={"path"}) | {"title": dataset.title, "sha256": sha256(path)}
