"""The published layout: what is written there, and round trips both ways."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossdiff.cli import run_command
from crossdiff.errors import UserError
from crossdiff.latents.example_database import write_database
from crossdiff.published.examples_db import SCHEMA, band_of, export_examples, import_examples

IDS = {3: [1, 7, 8, 9], 5: [1, 8, 8], 9: [4, 5, 6]}


class Words:
    """A tokenizer of ten words whose BOS is 1."""

    bos_token_id = 1

    def __len__(self) -> int:
        return 10

    def decode(self, ids: list[int]) -> str:
        return f"word {ids[0]}"


def ints(*values: int) -> bytes:
    return np.array(values, dtype="<i4").tobytes()


def floats(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Latent 0 with its maximum 4 on sequence 3, of which a quantile example is one too; latent 2 on one sequence."""
    sequences: list[tuple[Any, ...]] = [(n, 30 + n, "d", None, ints(*ids), bytes(len(ids))) for n, ids in IDS.items()]
    examples = [
        (0, "top", None, 0, 3, 2, 4.0, ints(1, 2), floats(0.5, 4.0)),
        (0, "top", None, 1, 9, 0, 3.0, ints(0), floats(3.0)),
        (0, "quantile", 1.0, 0, 3, 2, 4.0, ints(1, 2), floats(0.5, 4.0)),
        (0, "quantile", 0.25, 1, 5, 1, 0.75, ints(1), floats(0.75)),
        (2, "top", None, 0, 5, 2, 8.0, ints(2), floats(8.0)),
    ]
    write_database(tmp_path / "examples.sqlite", sequences, iter(examples), Words(), 4)
    return tmp_path / "examples.sqlite"


def table(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()


def published_tables(path: Path) -> list[list[tuple[Any, ...]]]:
    names = ("sequences", "quantile_examples", "activation_details")
    return [table(path, f"SELECT * FROM {name} ORDER BY 1, 2") for name in names]


def test_export_by_hand(tmp_path: Path, ours: Path) -> None:
    assert export_examples(ours, tmp_path / "examples.db") == 4  # sequence 3 of latent 0 once
    sequences, examples, details = published_tables(tmp_path / "examples.db")
    assert sequences == [(n, ints(*ids)) for n, ids in IDS.items()]
    # feature, band, activation, sequence. 4 / 4 = 1 is in the last band, 3 / 4 in that up to 0.75, 0.75 / 4 in the first.
    assert sorted(examples) == [(0, 0, 0.75, 5), (0, 2, 3.0, 9), (0, 4, 4.0, 3), (2, 4, 8.0, 5)]
    assert (0, 3, ints(1, 2), floats(0.5, 4.0)) in details and len(details) == 4


def test_bands_are_open_below_and_closed_above() -> None:
    shares = (0.1, 0.25, 0.26, 0.5, 0.75, 0.9, 0.95, 0.96, 1.0)
    assert [band_of(share, 1.0) for share in shares] == [0, 0, 1, 1, 2, 3, 3, 4, 4]


def test_import_and_export_give_back_the_same_file(tmp_path: Path, ours: Path) -> None:
    export_examples(ours, tmp_path / "a.db")
    assert import_examples(tmp_path / "a.db", tmp_path / "imported.sqlite", Words()) == 4
    export_examples(tmp_path / "imported.sqlite", tmp_path / "b.db")
    assert published_tables(tmp_path / "a.db") == published_tables(tmp_path / "b.db")


def test_what_is_imported(tmp_path: Path, ours: Path) -> None:
    from crossdiff.report.examples import read_examples

    export_examples(ours, tmp_path / "a.db")
    import_examples(tmp_path / "a.db", tmp_path / "imported.sqlite", Words())
    query = "SELECT latent, kind, quantile, rank, sequence, position FROM examples ORDER BY latent, rank"
    rows = table(tmp_path / "imported.sqlite", query)
    assert rows == [
        (0, "band", 1.0, 0, 3, 2), (0, "band", 0.75, 1, 9, 0), (0, "band", 0.25, 2, 5, 1), (2, "band", 1.0, 0, 5, 2),
    ]  # fmt: skip
    examples = read_examples(tmp_path / "imported.sqlite", [0, 1, 2])
    first = examples[0][0]
    assert [(token.text, token.flags, token.activation) for token in first.tokens] == [
        ("word 1", 1, 0.0), ("word 7", 0, 0.5), ("word 8", 0, 4.0), ("word 9", 0, 0.0),
    ]  # fmt: skip
    assert (first.kind, first.quantile, first.document, first.dataset) == ("band", 1.0, None, None)
    assert examples[1] == ()
    with pytest.raises(UserError, match=r"there is no latent 3: the crosscoder of .* has 3, from 0 to 2"):
        read_examples(tmp_path / "imported.sqlite", [3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DELETE FROM quantile_examples", "has no examples"),
        (
            "DROP TABLE activation_details",
            r"does not have the layout examples\.db: no such table: .* --layout",
        ),
        ("UPDATE activation_details SET positions = x'000102'", r"positions of latent 0 on sequence 3 are 3 bytes"),
        ("DELETE FROM activation_details WHERE sequence_idx = 9", r"positions of latent 0 on sequence 9 are NoneType"),
        ("UPDATE activation_details SET positions = x'07000000' WHERE sequence_idx = 9", "1 positions and 1 activations in 3"),
        ("UPDATE quantile_examples SET quantile_idx = 6", "is in band 6"),
        ("DELETE FROM sequences WHERE sequence_idx = 3", "latent 0 on sequence 3 .*expected a sequence of the table"),
        ("UPDATE sequences SET token_ids = x'0A000000'", "token id 10, but the tokenizer has only 10 tokens"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, ours: Path, change: str, message: str) -> None:
    export_examples(ours, tmp_path / "a.db")
    with closing(sqlite3.connect(tmp_path / "a.db")) as database:
        database.execute(change)
        database.commit()
    with pytest.raises(UserError, match=message):
        import_examples(tmp_path / "a.db", tmp_path / "b.sqlite", Words())
    assert not list(tmp_path.glob("b.sqlite*"))


def test_wrong_files_are_named(tmp_path: Path, ours: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.sqlite is missing"):
        export_examples(tmp_path / "absent.sqlite", tmp_path / "a.db")
    with pytest.raises(UserError, match="already exists"):
        export_examples(ours, ours)
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(UserError, match="is not an example database"):
        export_examples(tmp_path / "text", tmp_path / "a.db")
    with closing(sqlite3.connect(tmp_path / "empty.db")) as database:
        database.executescript(SCHEMA)
    with pytest.raises(UserError, match="is not an example database: no such table"):
        export_examples(tmp_path / "empty.db", tmp_path / "a.db")


def test_the_command(tmp_path: Path, ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["examples", "export", str(ours), str(tmp_path / "a.db")])
    assert "4 examples written to" in capsys.readouterr().out
    with pytest.raises(UserError, match="name the model with --tokenizer"):
        run_command(["examples", "import", str(tmp_path / "a.db"), str(tmp_path / "b.sqlite")])
    run_command(["examples", "import", str(tmp_path / "a.db"), str(tmp_path / "b.sqlite"), "--tokenizer", "demo:chat"])
    assert len(table(tmp_path / "b.sqlite", "SELECT * FROM examples")) == 4
