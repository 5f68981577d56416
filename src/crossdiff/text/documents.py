"""Corpora as a stream of documents: texts and conversations, each on one side of the split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from crossdiff.config import DatasetConfig
from crossdiff.errors import UserError
from crossdiff.text.formats import check_columns, content_of
from crossdiff.text.messages import ROLES
from crossdiff.text.readers import dataset_files, records

MAX_DATASETS = 256
"""The index of a token's dataset is stored in a byte."""


@dataclass(frozen=True)
class Document:
    """A plain text or a conversation: exactly one of `text` and `messages` is given.

    number: counts from 0 over all datasets. dataset: index of its dataset among those read together.
    messages: mappings with only `role` and `content`. format, renamed, also: as in `Content`.
    """

    number: int
    dataset: int
    text: str | None
    messages: list[dict[str, str]] | None
    split: Literal["train", "heldout"]
    label: str | None
    sub_label: str | None
    format: str = field(default="", compare=False)
    renamed: Mapping[str, str] = field(default_factory=dict, compare=False)
    also: str | None = field(default=None, compare=False)


def read_documents(configs: Sequence[DatasetConfig]) -> Iterator[Document]:
    """All documents of the datasets, in order, read lazily. The same call gives the same documents."""
    check_datasets(configs)
    return _read_all(configs)


def check_datasets(configs: Sequence[DatasetConfig]) -> None:
    """Check what can be checked without reading: number, titles, files, weights and roles of the datasets."""
    if not 1 <= len(configs) <= MAX_DATASETS:
        raise UserError(f"found {len(configs)} datasets; give 1 to {MAX_DATASETS}")
    titles = [config.title for config in configs]
    if twice := next((title for title in titles if titles.count(title) > 1), None):
        raise UserError(f"two datasets are called {twice!r}; give one of them another `name`")
    unweighted = [config.title for config in configs if config.weight is None]
    if 0 < len(unweighted) < len(configs):
        raise UserError(f"{unweighted[0]} has no weight, but other datasets have; give every dataset a weight, or none")
    for config in configs:
        dataset_files(config)
        for name, role in config.roles.items():
            if role not in ROLES:
                raise UserError(f"{config.title} maps the role {name!r} to {role!r}; expected one of {', '.join(ROLES)}")


def _read_all(configs: Sequence[DatasetConfig]) -> Iterator[Document]:
    number = 0
    for dataset, config in enumerate(configs):
        for document in read_dataset(config, dataset, number):
            yield document
            number = document.number + 1


def _raise(error: UserError) -> None:
    raise error


def read_dataset(
    config: DatasetConfig, dataset: int, first: int, damaged: Callable[[UserError], None] = _raise
) -> Iterator[Document]:
    """The documents of one dataset, read lazily; the first has the number `first`.

    What becomes of a record is in `formats`. A text file has one document per paragraph (paragraphs are separated by blank
    lines). A hash of the dataset's title and the content decides which records are held out, so equal records are on the same
    side and the order does not matter.

    Args:
        damaged: called for each record that is not JSON or UTF-8, lacks a column or does not contain text; such a record gets
            no number. By default the first one is raised.
    """
    number, wrong = first, ""
    for place, record in records(config):
        try:
            if isinstance(record, UserError):
                raise record
            document = _document(number, dataset, config, record)
        except UserError as error:
            located = UserError(f"{place}: {error}")
            located.__cause__ = error
            wrong = wrong or f": {located}"
            damaged(located)
        else:
            yield document
            number += 1
    if number == first:
        raise UserError(f"{', '.join(config.paths)} has no readable record{wrong}; give a file with text, or remove it")


def _document(number: int, dataset: int, config: DatasetConfig, record: Any) -> Document:
    if not isinstance(record, Mapping):
        raise UserError(f"a record must be an object with columns, found {type(record).__name__}")
    check_columns(record, config)
    found = content_of(record, config)
    content = found.text if found.messages is None else [[message["role"], message["content"]] for message in found.messages]
    split: Literal["train", "heldout"] = "heldout" if _share(config.title, content) < config.heldout_share else "train"
    label = _label(record, config.label_column)
    sub_label = _label(record, config.sub_label_column)
    read_as = (found.format, found.renamed, found.also)
    return Document(number, dataset, found.text, found.messages, split, label, sub_label, *read_as)


def _share(title: str, content: object) -> float:
    """A uniformly distributed number in [0, 1) that depends only on the arguments."""
    digest = hashlib.sha256(json.dumps([title, content]).encode("ascii")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _label(record: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else record[column]
    if value is not None and not isinstance(value, str | int):
        raise UserError(f"the column {column!r} must contain labels as strings, found {type(value).__name__}")
    return None if value is None else str(value)
