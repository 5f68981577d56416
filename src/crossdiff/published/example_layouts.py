"""The layouts of maximum-activation files that can be imported, each by its name.

    examples.db   the SQLite database of the paper's authors, see `examples_db`
    json          {latent: [[value, tokens, values], ...]}
    notebook      the same in a .pt file: a mapping, or a list whose places are the latents
    toolkit       the SQLite database of the diffing toolkit: sequences, examples, activation_details, config

In `json` and `notebook`, `values` holds one number per token, and tokens are numbers or the tokenizer's own strings. Readers
give positions and values as the blobs that our database holds, whose content `examples_db` checks.
"""

from __future__ import annotations

import math
import pickle
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.errors import UserError
from crossdiff.files import open_sqlite, read_json, short_repr


class Row(NamedTuple):
    """An example; `band` is None where the layout has none."""

    latent: int
    band: int | None
    activation: float
    sequence: int
    positions: object
    values: object


@dataclass
class Found:
    """The content of a file: token ids and data sets of its sequences by number, and its examples."""

    sequences: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    datasets: dict[int, str | None] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def read_layout(source: Path, layout: str, tokenizer: Any) -> Found:
    """Read a file in the layout of this name."""
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout {layout!r} of examples; expected one of {', '.join(LAYOUTS)}")
    try:
        return LAYOUTS[layout](source, tokenizer)
    except sqlite3.DatabaseError as error:
        raise UserError(f"{source} does not have the layout {layout}: {error}; {_remedy(layout)}") from error


def array(source: Path, what: str, blob: object, dtype: str) -> npt.NDArray[Any]:
    """An array of 4-byte numbers from a blob."""
    if not isinstance(blob, bytes) or len(blob) % 4:
        found = f"{len(blob)} bytes" if isinstance(blob, bytes) else type(blob).__name__
        raise UserError(f"{source}: {what} are {found}; expected an array of 4-byte numbers")
    return np.frombuffer(blob, dtype=dtype)


def _remedy(layout: str) -> str:
    others = ", ".join(name for name in LAYOUTS if name != layout)
    return f"if it has another layout, name it with --layout ({others})"


def _read_examples_db(source: Path, tokenizer: Any) -> Found:
    with closing(open_sqlite(source)) as published:
        sequences = dict(published.execute("SELECT sequence_idx, token_ids FROM sequences ORDER BY sequence_idx"))
        rows = published.execute(
            "SELECT feature_idx, quantile_idx, activation, sequence_idx, positions, activation_values "
            "FROM quantile_examples LEFT JOIN activation_details USING (feature_idx, sequence_idx)"
        ).fetchall()
    return Found(_arrays(source, sequences), {}, [Row(*row) for row in rows])


def _read_toolkit(source: Path, tokenizer: Any) -> Found:
    with closing(open_sqlite(source)) as toolkit:
        storage = dict(toolkit.execute("SELECT key, value FROM config")).get("storage_format")
        if storage not in ("sparse", "dense"):
            raise UserError(f"{source}: its storage_format is {storage!r}, expected 'sparse' or 'dense'; download it again")
        sequences = toolkit.execute("SELECT sequence_uid, token_ids, dataset_name FROM sequences").fetchall()
        rows = toolkit.execute(
            f"SELECT latent_idx, quantile_idx, score, sequence_uid, {'positions' if storage == 'sparse' else 'NULL'}, "
            "activation_values FROM examples LEFT JOIN activation_details USING (example_id)"
        ).fetchall()
    if any(row[0] is None for row in rows):
        raise UserError(f"{source} holds examples without a latent_idx, which are not examples of latents; name another file")
    arrays = _arrays(source, {number: ids for number, ids, _ in sequences})
    found = Found(arrays, {number: dataset for number, _, dataset in sequences})
    for row in map(Row._make, rows):
        found.rows.append(row if storage == "sparse" else _from_dense(source, row))
    return found


def _from_dense(source: Path, row: Row) -> Row:
    values = array(source, f"the activations of latent {row.latent} on sequence {row.sequence}", row.values, "<f4")
    return row._replace(positions=_active(values), values=values[values > 0].tobytes())


def _active(values: npt.NDArray[np.float32]) -> bytes:
    return np.flatnonzero(values > 0).astype("<i4").tobytes()


def _arrays(source: Path, blobs: dict[int, object]) -> dict[int, npt.NDArray[np.int32]]:
    return {number: array(source, f"the tokens of sequence {number}", blob, "<i4") for number, blob in blobs.items()}


def _read_json(source: Path, tokenizer: Any) -> Found:
    return _of_mapping(source, read_json(source), tokenizer, "json")


def _read_notebook(source: Path, tokenizer: Any) -> Found:
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"cannot read {source}: it is damaged or holds more than numbers, text and tensors, which is unsafe to read; "
            "save it as JSON"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"cannot read {source}: {error}; if it is damaged, download it again") from None
    return _of_mapping(source, content, tokenizer, "notebook")


def _of_mapping(source: Path, content: object, tokenizer: Any, layout: str) -> Found:
    pairs: Iterable[tuple[object, object]]
    if isinstance(content, dict):
        pairs = content.items()
    elif isinstance(content, list) and layout == "notebook":
        pairs = enumerate(content)
    else:
        raise UserError(f"{source} holds a {type(content).__name__}, expected examples by latent; {_remedy(layout)}")
    found, numbers = Found(), dict[bytes, int]()
    for key, examples in pairs:
        for value, ids, values in _examples_of(source, key, examples, tokenizer):
            number = numbers.setdefault(ids.tobytes(), len(numbers))
            found.sequences[number] = ids
            found.rows.append(Row(int(str(key)), None, value, number, _active(values), values[values > 0].tobytes()))
    return found


def _examples_of(
    source: Path, key: object, examples: object, tokenizer: Any
) -> Iterator[tuple[float, npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    """Value, token ids and values of each example of a latent."""
    if not str(key).isdecimal() or not isinstance(examples, list | tuple):
        raise UserError(f"{source} has {short_repr(key)}: {short_repr(examples)}; expected a latent's number and a list")
    for example in examples:
        if not isinstance(example, list | tuple) or len(example) != 3:
            raise UserError(f"{source}: latent {key} has {short_repr(example)}, expected (value, tokens, values)")
        value, tokens, values = (part.tolist() if isinstance(part, torch.Tensor) else part for part in example)
        try:
            ids = np.array(_ids(tokens, tokenizer), dtype="<i4")
            numbers, largest = np.array(values, dtype="<f4"), float(value)  # type: ignore[arg-type]
            if numbers.shape != ids.shape or not np.isfinite(numbers).all() or not math.isfinite(largest):
                raise ValueError("expected one finite value per token")
        except (TypeError, ValueError, OverflowError) as error:
            found = short_repr(example)
            raise UserError(f"{source}: latent {key} has {found}: {error}; expected (value, tokens, values)") from None
        yield largest, ids, numbers


def _ids(tokens: Any, tokenizer: Any) -> list[int]:
    """The numbers of tokens, which may be the tokenizer's own strings."""
    if all(isinstance(token, int) and token >= 0 for token in tokens):
        return list(tokens)
    if not all(isinstance(token, str) for token in tokens):
        raise ValueError("expected tokens as numbers of at least 0, or as text")
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    for token, number in zip(tokens, ids, strict=True):
        if number is None or (number == tokenizer.unk_token_id and token != tokenizer.unk_token):
            raise ValueError(f"the tokenizer has no token {token!r}")
    return list(ids)


LAYOUTS: dict[str, Callable[[Path, Any], Found]] = {
    "examples.db": _read_examples_db,
    "json": _read_json,
    "notebook": _read_notebook,
    "toolkit": _read_toolkit,
}
