"""The texts of a run: where they are, and what identifies them."""

from __future__ import annotations

from typing import Any

from crossdiff.config import DatasetConfig, RunConfig
from crossdiff.errors import UserError
from crossdiff.files import matching_files, sha256


def check_texts(config: RunConfig) -> None:
    """Raises `UserError` when the settings name no texts."""
    if not config.dataset:
        raise UserError("no texts: name at least one --dataset (a .jsonl, .json, .csv, .parquet or .txt file or a Hub dataset)")


def resolve(dataset: DatasetConfig) -> DatasetConfig:
    """The dataset with a `demo:` name replaced by the file that it stands for; the title stays."""
    if not any(path.startswith("demo:") for path in dataset.paths):
        return dataset
    from crossdiff.pairs import demo_path

    paths = tuple(str(demo_path(path)) if path.startswith("demo:") else path for path in dataset.paths)
    return dataset.model_copy(update={"path": paths[0] if len(paths) == 1 else paths, "name": dataset.title})


def identify_dataset(dataset: DatasetConfig) -> dict[str, Any]:
    """What identifies a dataset: its settings and, for local files, a digest of the content of each."""
    digests = [sha256(path) for path in matching_files(resolve(dataset).paths)]
    if not digests:
        return dataset.model_dump()
    found = digests[0] if len(digests) == 1 else digests
    return dataset.model_dump(exclude={"path"}) | {"title": dataset.title, "sha256": found}
