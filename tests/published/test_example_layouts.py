"""The layouts of maximum-activation files, written by hand, and how many imported examples are shown."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossdiff.cli import run_command
from crossdiff.dashboard.catalogue import PER_QUANTILE, TOP
from crossdiff.errors import UserError
from crossdiff.published.examples_db import SCHEMA, import_examples
from crossdiff.report.examples import ExampleDatabase, read_examples


class Words:
    """A tokenizer of ten words, w0 to w9, whose BOS is 1 and whose unknown token is 0."""

    bos_token_id, unk_token_id, unk_token = 1, 0, "w0"

    def __len__(self) -> int:
        return 10

    def decode(self, ids: list[int]) -> str:
        return f"w{ids[0]}"

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return [int(token[1:]) if token[1:].isdecimal() and token[0] == "w" else 0 for token in tokens]


def blob(values: list[float], dtype: str) -> bytes:
    return np.array(values, dtype=dtype).tobytes()


EXAMPLES: dict[int, list[tuple[float, list[int], list[float]]]] = {
    0: [(1.0, [1, 5, 6], [0.0, 0.25, 1.0]), (4.0, [1, 7, 8, 9], [0.0, 4.0, 0.0, 0.5])],
    3: [(2.0, [1, 5, 6], [0.0, 2.0, 0.0])],
}
"""Value, tokens and values by latent; the sequence 1, 5, 6 is an example of two latents."""


def write_json(path: Path) -> None:
    path.write_text(json.dumps({str(latent): examples for latent, examples in EXAMPLES.items()}))


def write_json_of_words(path: Path) -> None:
    words = {n: [(v, [f"w{i}" for i in ids], values) for v, ids, values in found] for n, found in EXAMPLES.items()}
    path.write_text(json.dumps(words))


def write_notebook(path: Path) -> None:
    """A list whose places are the latents, with tensors."""
    latents = [[(v, torch.tensor(i), torch.tensor(a)) for v, i, a in EXAMPLES.get(n, [])] for n in range(4)]
    torch.save(latents, path)


def write_notebook_mapping(path: Path) -> None:
    torch.save(EXAMPLES, path)


def write_toolkit(path: Path, storage: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT)")
        database.execute(
            "CREATE TABLE sequences (sequence_uid INTEGER PRIMARY KEY, token_ids BLOB, text TEXT, sequence_length INTEGER, "
            "dataset_id INTEGER, dataset_name TEXT)"
        )
        database.execute(
            "CREATE TABLE examples (example_id INTEGER PRIMARY KEY, sequence_uid INTEGER, score REAL, latent_idx INTEGER, "
            "quantile_idx INTEGER, metadata TEXT)"
        )
        positions = "positions BLOB, " if storage == "sparse" else ""
        database.execute(f"CREATE TABLE activation_details (example_id INTEGER PRIMARY KEY, {positions}activation_values BLOB)")
        database.execute("INSERT INTO config VALUES ('storage_format', ?)", (storage,))
        number = 0
        for latent, examples in EXAMPLES.items():
            for value, ids, values in examples:
                uid = -(2**62) - len(ids)  # a hash, which may be negative
                row = (uid, blob(ids, "<i4"), None, len(ids), 0, "web")
                database.execute("INSERT OR REPLACE INTO sequences VALUES (?, ?, ?, ?, ?, ?)", row)
                row = (number, uid, value, latent, None, None)
                database.execute("INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?)", row)
                at = [i for i, a in enumerate(values) if a > 0]
                details = (
                    [blob(at, "<i4"), blob([values[i] for i in at], "<f4")] if storage == "sparse" else [blob(values, "<f4")]
                )
                database.execute(
                    f"INSERT INTO activation_details VALUES ({', '.join('?' * (1 + len(details)))})", (number, *details)
                )
                number += 1


WRITERS: dict[str, Any] = {
    "json": write_json,
    "json of words": write_json_of_words,
    "notebook": write_notebook,
    "notebook, mapping": write_notebook_mapping,
    "toolkit": lambda path: write_toolkit(path, "sparse"),
    "toolkit, dense": lambda path: write_toolkit(path, "dense"),
}


@pytest.mark.parametrize("case", WRITERS)
def test_every_layout_gives_the_same_examples(tmp_path: Path, case: str) -> None:
    WRITERS[case](tmp_path / "file")
    layout = case.split(",")[0].split(" ")[0]
    assert import_examples(tmp_path / "file", tmp_path / "ours.sqlite", Words(), layout) == 3
    examples = read_examples(tmp_path / "ours.sqlite", [0, 1, 3])
    # 4 / 4 is in the last band, 1 / 4 in the first
    assert [(e.kind, e.quantile, e.activation, e.position) for e in examples[0]] == [
        ("band", 1.0, 4.0, 1), ("band", 0.25, 1.0, 2),
    ]  # fmt: skip
    assert [[(token.text, token.activation) for token in e.tokens] for e in examples[0]] == [
        [("w1", 0.0), ("w7", 4.0), ("w8", 0.0), ("w9", 0.5)],
        [("w1", 0.0), ("w5", 0.25), ("w6", 1.0)],
    ]
    assert [token.flags for token in examples[0][0].tokens] == [1, 0, 0, 0]
    assert examples[1] == () and [e.activation for e in examples[3]] == [2.0]
    assert examples[3][0].dataset == ("web" if layout == "toolkit" else None)


@pytest.mark.parametrize(
    ("layout", "content", "message"),
    [
        ("json", [1], r"holds a list, expected examples by latent; if it has another layout, name it with --layout"),
        ("json", {"a": []}, "has 'a': .*; expected a latent's number and a list"),
        ("json", {"0": 3}, "expected a latent's number and a list"),
        ("json", {"0": [[1.0, [1]]]}, r"latent 0 has \[1.0, \[1\]\], expected \(value, tokens, values\)"),
        ("json", {"0": [[1.0, [1, 2], [1.0]]]}, "expected one finite value per token"),
        ("json", {"0": [[1.0, [1.5], [1.0]]]}, "expected tokens as numbers of at least 0, or as text"),
        ("json", {"0": [[1.0, [[1]], [[1.0]]]]}, "expected tokens as numbers"),
        ("json", {"0": [[1.0, ["x"], [1.0]]]}, "the tokenizer has no token 'x'"),
        ("json", {"0": [[1.0, [99], [1.0]]]}, "has the token id 99, but the tokenizer has only 10 tokens"),
        ("json", {"0": [[0.0, [1], [0.0]]]}, "has 0 positions and 0 activations in 1 tokens"),
        ("json", {}, "has no examples"),
        ("parquet", {}, "there is no layout 'parquet' of examples; expected one of examples.db, json, notebook, toolkit"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, layout: str, content: object, message: str) -> None:
    (tmp_path / "file").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        import_examples(tmp_path / "file", tmp_path / "ours.sqlite", Words(), layout)
    assert not list(tmp_path.glob("ours.sqlite*"))


def test_another_layout_and_pickled_objects_are_refused(tmp_path: Path) -> None:
    torch.save({0: Path("x")}, tmp_path / "notebook.pt")
    with pytest.raises(UserError, match="holds more than numbers, text and tensors, which is unsafe to read; save it as JSON"):
        import_examples(tmp_path / "notebook.pt", tmp_path / "ours.sqlite", Words(), "notebook")
    write_toolkit(tmp_path / "toolkit.db", "sparse")
    with pytest.raises(UserError, match=r"does not have the layout examples\.db: no such column"):
        import_examples(tmp_path / "toolkit.db", tmp_path / "ours.sqlite", Words())
    with closing(sqlite3.connect(tmp_path / "toolkit.db")) as database:
        database.execute("UPDATE examples SET latent_idx = NULL WHERE example_id = 1")
        database.commit()
    with pytest.raises(UserError, match="holds examples without a latent_idx"):
        import_examples(tmp_path / "toolkit.db", tmp_path / "ours.sqlite", Words(), "toolkit")
    with closing(sqlite3.connect(tmp_path / "toolkit.db")) as database:
        database.execute("UPDATE config SET value = 'odd'")
        database.commit()
    with pytest.raises(UserError, match="its storage_format is 'odd', expected 'sparse' or 'dense'"):
        import_examples(tmp_path / "toolkit.db", tmp_path / "ours.sqlite", Words(), "toolkit")


def test_the_command_names_the_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "examples.json")
    command = ["examples", "import", str(tmp_path / "examples.json"), str(tmp_path / "b.sqlite"), "--tokenizer", "demo:chat"]
    run_command([*command, "--layout", "json"])
    assert "3 examples written to" in capsys.readouterr().out


def test_all_examples_of_a_band_are_shown(tmp_path: Path) -> None:
    """25 sequences in each of the five bands: 20 of each in `Diff.examples` and the dashboard, 5 in the report."""
    rows = [(band, 25 * band + i, (0.2, 0.4, 0.6, 0.8, 1.0)[band] - i / 1000) for band in range(5) for i in range(25)]
    with closing(sqlite3.connect(tmp_path / "examples.db")) as database, database:
        database.executescript(SCHEMA)
        for band, number, value in rows:
            database.execute("INSERT INTO sequences VALUES (?, ?)", (number, blob([1, 5], "<i4")))
            database.execute("INSERT INTO quantile_examples VALUES (0, ?, ?, ?)", (band, value, number))
            details = (number, blob([1], "<i4"), blob([value], "<f4"))
            database.execute("INSERT INTO activation_details VALUES (0, ?, ?, ?)", details)
    import_examples(tmp_path / "examples.db", tmp_path / "ours.sqlite", Words())
    strongest = [value for band in reversed(range(5)) for _, _, value in rows[25 * band : 25 * band + 20]]
    assert [e.activation for e in read_examples(tmp_path / "ours.sqlite", [0])[0]] == pytest.approx(strongest)
    assert len(read_examples(tmp_path / "ours.sqlite", [0], per_band=5)[0]) == 25
    with closing(ExampleDatabase(tmp_path / "ours.sqlite")) as database:
        assert len(database.examples(0, TOP, PER_QUANTILE)) == 100
