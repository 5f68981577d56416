"""Records of local files and Hub datasets, read one after the other, with the place of each for messages."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from crossdiff.config import DatasetConfig
from crossdiff.errors import UserError
from crossdiff.files import matching_files
from crossdiff.text.formats import check_columns, known_columns

Record = tuple[str, Any]
"""Where something was read ("a.jsonl, record 3 (line 4)"), and the record, or a `UserError` that says what is wrong with it."""

Reader = Callable[[Path, DatasetConfig], Iterator[Record]]

LARGE = 1 << 28
"""Files above this many bytes are not read just to count their records."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def records(config: DatasetConfig) -> Iterator[Record]:
    """The records of a dataset, file by file, read lazily. A `UserError` names a file that cannot be read at all."""
    files = dataset_files(config)
    if files is None:
        return islice(_read_hub(config), config.max_documents)
    return islice(chain.from_iterable(_reader(file)(file, config) for file in files), config.max_documents)


def dataset_files(config: DatasetConfig) -> list[Path] | None:
    """The files of a dataset, those of a pattern by name; None for a Hub dataset.

    Raises:
        UserError: a file does not exist, cannot be read or is given twice, or a pattern matches nothing.
    """
    files: list[Path] = []
    for name in config.paths:
        found = matching_files([name])
        if not found:
            if len(config.paths) == 1 and _is_hub_name(name):
                return None
            _refuse(name)
        files += found
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise UserError(f"{twice} is given twice in one dataset; give each file once")
    for file in files:
        _reader(file)
    if config.subset is not None:
        raise UserError(
            f"{config.title} has the subset {config.subset!r}, but is read from files; only Hub datasets have subsets"
        )
    return files


def count_records(config: DatasetConfig) -> int | None:
    """Number of records up to max_documents, counted without parsing where possible; None if unknown or slow to find out."""
    files = dataset_files(config)
    if files is None or sum(file.stat().st_size for file in files) > LARGE:
        return config.max_documents
    counted = chain.from_iterable(_countable(file, config) for file in files)
    return sum(1 for _ in islice(counted, config.max_documents))


def _countable(file: Path, config: DatasetConfig) -> Iterator[object]:
    if _reader(file) is _read_json and not _is_array(file):
        return (line for _, line in _read_lines(file) if isinstance(line, UserError) or line.strip())
    return _reader(file)(file, config)


def _is_hub_name(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and not _suffix(Path(name)) and not Path(name).is_dir()


def _refuse(name: str) -> None:
    endings = ", ".join(READERS)
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder; give a file in it that ends in {endings}, or a pattern such as {name}/*.jsonl")
    if "*" in name:
        raise UserError(f"no file matches {name}; give a pattern that matches files ending in {endings}")
    raise UserError(f"there is no file {name}; give a file that exists or the name of a Hub dataset (org/name)")


def _suffix(path: Path) -> str:
    """The ending that decides how a file is read; empty if it is unknown."""
    name = path.name.lower()
    return next((ending for ending in READERS if name.endswith(ending) or name.endswith(f"{ending}.gz")), "")


def _reader(path: Path) -> Reader:
    if not (ending := _suffix(path)) or (ending == ".parquet" and path.suffix.lower() == ".gz"):
        raise UserError(
            f"{path} is not a supported kind of file; give one that ends in {', '.join(READERS)} (all but .parquet also as .gz)"
        )
    return READERS[ending]


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


def _decoded_lines(path: Path) -> Iterator[str]:
    """The lines of a file whose records may span lines, so that none of them can be skipped."""
    for line_number, line in _read_lines(path):
        if isinstance(line, UserError):
            raise UserError(f"{path}, line {line_number}: {line}")
        yield line


def _read_json(path: Path, config: DatasetConfig) -> Iterator[Record]:
    """One record per line, or an array of records."""
    if _is_array(path):
        yield from _read_array(path)
        return
    count = 0
    for line_number, line in _read_lines(path):
        if isinstance(line, str) and not line.strip():
            continue
        count += 1
        record = line if isinstance(line, UserError) else _parse(line)
        if count == 1 and isinstance(record, UserError) and _suffix(path) == ".json":
            raise UserError(f"{path} is neither an array of records nor one record per line: line {line_number} is {record}")
        yield f"{path}, record {count} (line {line_number})", record


def _is_array(path: Path) -> bool:
    first = next((line for _, line in _read_lines(path) if isinstance(line, UserError) or line.strip()), "")
    return isinstance(first, str) and first.lstrip().startswith("[")


def _read_array(path: Path) -> Iterator[Record]:
    found = _parse("".join(_decoded_lines(path)))
    if isinstance(found, UserError):
        raise UserError(f"{path} starts like an array of records, but is {found}")
    for count, record in enumerate(found, 1):
        yield f"{path}, record {count}", record


def _parse(text: str) -> Any:
    """The JSON value of a text, or what is wrong with it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return UserError(f"not valid JSON: {error}")


def _read_csv(path: Path, config: DatasetConfig) -> Iterator[Record]:
    """One record per row after the header. An empty cell counts as null."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(_decoded_lines(path), strict=True)
    count = 0
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path} has two columns of one name: {header}; rename one")
        for row in rows:
            if not row:
                continue
            count += 1
            record: Any = dict(zip(header, (cell or None for cell in row), strict=False))
            if len(row) != len(header):
                record = UserError(f"{len(row)} cells, but the header has {len(header)}")
            yield f"{path}, record {count} (line {rows.line_num})", record
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV at line {rows.line_num}: {error}") from error


def _read_paragraphs(path: Path, config: DatasetConfig) -> Iterator[Record]:
    count = 0
    lines = (line for _, line in _read_lines(path))
    for is_text, paragraph in groupby(lines, key=lambda line: isinstance(line, UserError) or bool(line.strip())):
        if is_text:
            count += 1
            parts = list(paragraph)
            wrong = next((part for part in parts if isinstance(part, UserError)), None)
            text = "".join(part for part in parts if isinstance(part, str))
            yield f"{path}, record {count}", wrong or {config.text_column: text.replace("\r\n", "\n").rstrip("\n")}


def _read_parquet(path: Path, config: DatasetConfig) -> Iterator[Record]:
    import polars as pl

    count = 0
    try:
        table = pl.scan_parquet(path, glob=False)
        columns = table.collect_schema().names()
        check_columns(columns, config)
        wanted = known_columns(config) | {config.label_column, config.sub_label_column}
        table = table.select([column for column in columns if column in wanted])
        if config.max_documents is not None:
            table = table.head(config.max_documents)
        for batch in table.collect_batches():
            for record in batch.iter_rows(named=True):
                count += 1
                yield f"{path}, record {count}", record
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet after record {count}: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read_hub(config: DatasetConfig) -> Iterator[Record]:
    (name,) = config.paths
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"{name} is not a local file, and Hub datasets need a package that cannot be imported "
            f"({error}): pip install 'crossdiff[datasets]'"
        ) from error
    subset = {} if config.subset is None else {"name": config.subset}
    count = 0
    try:
        for record in library.load_dataset(name, **subset, split=config.split, streaming=True):
            count += 1
            yield f"{name}, record {count}", record
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} (split {config.split!r}) is not a local file and cannot be read from the Hub after record {count}: "
            f"{error}; check the name, the subset, the split and the connection, or download its files elsewhere and give the "
            "path of a .jsonl or .parquet file"
        ) from error


READERS: dict[str, Reader] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
}
