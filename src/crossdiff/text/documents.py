"""Corpora as a stream of documents, from local JSON lines, Parquet and text files and from Hub datasets."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

from crossdiff.config import DatasetConfig
from crossdiff.errors import UserError
from crossdiff.text.chat import check_messages, check_unicode

Record = tuple[str, Any]
"""Where something was read ("record 3 (line 4)"), and the record, or a `UserError` that says what is wrong with it."""

Reader = Callable[[DatasetConfig], Iterator[Record]]

MAX_DATASETS = 256
"""The index of a token's dataset is stored in a byte."""

LARGE = 1 << 28
"""Files above this many bytes are not read just to count their records."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Document:
    """A plain text or a conversation: exactly one of `text` and `messages` is given.

    number: counts from 0 over all datasets. dataset: index of its dataset among those read together.
    messages: mappings with only `role` and `content`.
    """

    number: int
    dataset: int
    text: str | None
    messages: list[dict[str, str]] | None
    split: Literal["train", "heldout"]
    label: str | None
    sub_label: str | None


def read_documents(configs: Sequence[DatasetConfig]) -> Iterator[Document]:
    """All documents of the datasets, in order, read lazily. The same call gives the same documents."""
    check_datasets(configs)
    return _read_all(configs)


def check_datasets(configs: Sequence[DatasetConfig]) -> None:
    """Check what can be checked without reading."""
    if not 1 <= len(configs) <= MAX_DATASETS:
        raise UserError(f"found {len(configs)} datasets; give 1 to {MAX_DATASETS}")
    for config in configs:
        _reader(config)


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

    A record is a conversation if it has a messages column that is not null, else a plain text if it has a text column that is
    not. A text file has one document per paragraph (paragraphs are separated by blank lines). A hash of the dataset's title and
    the content decides which records are held out, so equal records are on the same side and the order does not matter.

    Args:
        damaged: called for each record that is not JSON or UTF-8, lacks a column or does not contain text; such a record gets
            no number. By default the first one is raised.
    """
    number, wrong = first, ""
    for place, record in islice(_reader(config)(config), config.max_documents):
        try:
            if isinstance(record, UserError):
                raise record
            document = _document(number, dataset, config, record)
        except UserError as error:
            located = UserError(f"{config.path}, {place}: {error}")
            located.__cause__ = error
            wrong = wrong or f": {located}"
            damaged(located)
        else:
            yield document
            number += 1
    if number == first:
        raise UserError(f"{config.path} has no readable record{wrong}; give a file with text, or remove it")


def count_records(config: DatasetConfig) -> int | None:
    """Number of records that will be read, counted without parsing; None if unknown or slow to find out."""
    path, read = Path(config.path), _reader(config)
    if config.max_tokens is not None:
        return None
    if read is _read_hub or path.stat().st_size > LARGE:
        return config.max_documents
    records: Iterator[object] = read(config)
    if read is _read_json_lines:
        records = (line for _, line in _read_lines(path) if isinstance(line, UserError) or line.strip())
    return sum(1 for _ in islice(records, config.max_documents))


def _document(number: int, dataset: int, config: DatasetConfig, record: Any) -> Document:
    if not isinstance(record, Mapping):
        raise UserError(f"a record must be an object with columns, found {type(record).__name__}")
    _check_columns(record, config)
    text, messages = None, None
    if record.get(config.messages_column) is not None:
        messages = check_messages(record[config.messages_column])
    elif record.get(config.text_column) is not None:
        text = record[config.text_column]
        if not isinstance(text, str):
            raise UserError(f"the column {config.text_column!r} must contain a string, found {type(text).__name__}")
        check_unicode(text, f"the column {config.text_column!r}")
    else:
        raise UserError(f"{config.messages_column!r} and {config.text_column!r} are both null or missing; fill one")
    content = text if messages is None else [[message["role"], message["content"]] for message in messages]
    split: Literal["train", "heldout"] = "heldout" if _share(config.title, content) < config.heldout_share else "train"
    label = _label(record, config.label_column)
    sub_label = _label(record, config.sub_label_column)
    return Document(number, dataset, text, messages, split, label, sub_label)


def _share(title: str, content: object) -> float:
    """A uniformly distributed number in [0, 1) that depends only on the arguments."""
    digest = hashlib.sha256(json.dumps([title, content]).encode("ascii")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _check_columns(columns: Collection[str], config: DatasetConfig) -> None:
    found = f"the columns are {sorted(map(str, columns))}"
    if config.messages_column not in columns and config.text_column not in columns:
        raise UserError(
            f"there is neither a column {config.messages_column!r} with conversations nor {config.text_column!r} with "
            f"text; {found}; set messages_column or text_column"
        )
    for column in (config.label_column, config.sub_label_column):
        if column is not None and column not in columns:
            raise UserError(f"there is no column {column!r} with labels; {found}")


def _label(record: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else record[column]
    if value is not None and not isinstance(value, str | int):
        raise UserError(f"the column {column!r} must contain labels as strings, found {type(value).__name__}")
    return None if value is None else str(value)


def _reader(config: DatasetConfig) -> Reader:
    """The reader of a dataset's records, chosen by its path."""
    path = Path(config.path)
    if path.is_file():
        for suffix, read in READERS.items():
            if path.name.lower().endswith(suffix):
                return read
        raise UserError(f"{path} is not a supported kind of file; give one that ends in {', '.join(READERS)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in it that ends in {', '.join(READERS)}")
    if HUB_NAME.fullmatch(config.path) and not path.name.lower().endswith(tuple(READERS)):
        return _read_hub
    raise UserError(f"there is no file {config.path}; give a file that exists or the name of a Hub dataset (org/name)")


def _read_lines(path: Path) -> Iterator[tuple[int, str | UserError]]:
    """Lines of a text file, counted from 1, or what is wrong with a line. Raises `UserError` where the file breaks off."""
    line_number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as lines:
            for line in lines:
                line_number += 1
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    yield line_number, UserError(f"not UTF-8: {error}; convert the file")
                else:
                    yield line_number, text.removeprefix("\ufeff") if line_number == 1 else text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after line {line_number}: {error}; is the file complete?") from error


def _read_json_lines(config: DatasetConfig) -> Iterator[Record]:
    count = 0
    for line_number, line in _read_lines(Path(config.path)):
        if isinstance(line, str) and not line.strip():
            continue
        count += 1
        yield f"record {count} (line {line_number})", line if isinstance(line, UserError) else _parse(line)


def _parse(line: str) -> Any:
    """The record of a line, or what is wrong with it."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"not valid JSON: {error}")


def _read_paragraphs(config: DatasetConfig) -> Iterator[Record]:
    count = 0
    lines = (line for _, line in _read_lines(Path(config.path)))
    for is_text, paragraph in groupby(lines, key=lambda line: isinstance(line, UserError) or bool(line.strip())):
        if is_text:
            count += 1
            parts = list(paragraph)
            wrong = next((part for part in parts if isinstance(part, UserError)), None)
            text = "".join(part for part in parts if isinstance(part, str))
            yield f"record {count}", wrong or {config.text_column: text.replace("\r\n", "\n").rstrip("\n")}


def _read_parquet(config: DatasetConfig) -> Iterator[Record]:
    import polars as pl

    count = 0
    try:
        table = pl.scan_parquet(config.path, glob=False)
        columns = table.collect_schema().names()
        _check_columns(columns, config)
        wanted = {config.text_column, config.messages_column, config.label_column, config.sub_label_column}
        table = table.select([column for column in columns if column in wanted])
        if config.max_documents is not None:
            table = table.head(config.max_documents)
        for batch in table.collect_batches():
            for record in batch.iter_rows(named=True):
                count += 1
                yield f"record {count}", record
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{config.path} cannot be read as Parquet after record {count}: {error}") from error
    except UserError as error:
        raise UserError(f"{config.path}: {error}") from error


def _read_hub(config: DatasetConfig) -> Iterator[Record]:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"{config.path} is not a local file, and Hub datasets need a package that cannot be imported "
            f"({error}): pip install 'crossdiff[datasets]'"
        ) from error
    count = 0
    try:
        for record in library.load_dataset(config.path, split=config.split, streaming=True):
            count += 1
            yield f"record {count}", record
    except (OSError, ValueError) as error:
        raise UserError(
            f"{config.path} (split {config.split!r}) is not a local file and cannot be read from the Hub after record {count}: "
            f"{error}; check the name, the split and the connection, or download its files elsewhere and give the path of a "
            ".jsonl or .parquet file"
        ) from error


READERS: dict[str, Reader] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
}
