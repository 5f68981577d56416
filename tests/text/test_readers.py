"""Files of every kind, several of them, and Hub datasets with subsets."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crossdiff.config import DatasetConfig
from crossdiff.corpus import identify_dataset
from crossdiff.errors import UserError
from crossdiff.text.documents import Document, read_documents
from crossdiff.text.readers import count_records

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def read(path: Any, **options: Any) -> list[Document]:
    return list(read_documents([DatasetConfig(path=path, **options)]))


def texts(path: Any, **options: Any) -> list[str | None]:
    return [document.text for document in read(path, **options)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_an_array_of_records(tmp_path: Path, name: str) -> None:
    content = ("\ufeff\n" + json.dumps([{"text": "a"}, {"messages": CHAT}], indent=1)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    first, second = read(str(tmp_path / name))
    assert (first.text, second.messages) == ("a", CHAT)
    assert count_records(DatasetConfig(path=str(tmp_path / name))) == 2


def test_json_that_is_neither_an_array_nor_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert texts(str(path)) == ["a", "b"]
    path.write_text(json.dumps({"data": [{"text": "a"}]}, indent=1))
    with pytest.raises(UserError, match=r"a\.json is neither an array of records nor one record per line: line 1 is not valid"):
        read(str(path))
    path.write_text('[{"text": "a"}, ')
    with pytest.raises(UserError, match=r"a\.json starts like an array of records, but is not valid JSON"):
        read(str(path))


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    messages = json.dumps(CHAT).replace('"', '""')
    path.write_bytes(f'\ufefftext,messages,kind\r\n"a, ""b""\nc",,x\r\n,"{messages}",\r\n'.encode())
    first, second = read(str(path), label_column="kind")
    assert (first.text, first.messages, first.label) == ('a, "b"\nc', None, "x")
    assert (second.text, second.messages, second.label) == (None, CHAT, None)
    assert count_records(DatasetConfig(path=str(path))) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"text\na\nb,c\n", r"a\.csv, record 2 \(line 3\): 2 cells, but the header has 1"),
        (b"text,text\na,b\n", r"a\.csv has two columns of one name"),
        (b'text\n"a\n', r"a\.csv is not valid CSV at line"),
        (b"text\n\xe9\n", r"a\.csv, line 2: not UTF-8"),
        (b"text\n", r"a\.csv has no readable record"),
    ],
)
def test_damaged_csv(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read(str(tmp_path / "a.csv"))


def numbered(folder: Path) -> list[str]:
    """Three files of two texts each; their names sort in the order 10, 2, 3."""
    paths = []
    for number in (2, 3, 10):
        path = folder / f"part-{number}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{number}{letter}"}) + "\n" for letter in "ab"))
        paths.append(str(path))
    return paths


def test_patterns_are_sorted_and_lists_keep_their_order(tmp_path: Path) -> None:
    two, three, ten = numbered(tmp_path)
    pattern = f"{tmp_path}/part-*.jsonl"
    assert texts(pattern) == ["10a", "10b", "2a", "2b", "3a", "3b"]
    assert texts([three, two]) == ["3a", "3b", "2a", "2b"]
    assert texts([three, f"{tmp_path}/part-1*"], max_documents=3) == ["3a", "3b", "10a"]
    assert count_records(DatasetConfig(path=pattern)) == 6
    assert DatasetConfig(path=pattern).title == tmp_path.name
    assert DatasetConfig(path=(three, two)).title == "part-3"
    with pytest.raises(UserError, match=r"no file matches .*/x\*\.jsonl; give a pattern that matches files ending in \.jsonl"):
        read(f"{tmp_path}/x*.jsonl")
    with pytest.raises(UserError, match=r"part-10\.jsonl is given twice in one dataset"):
        read([ten, pattern])
    with pytest.raises(UserError, match=r"there is no file .*gone\.jsonl"):
        read([ten, str(tmp_path / "gone.jsonl")])
    with pytest.raises(UserError, match=r"is a folder; give a file in it .*, or a pattern such as .*/\*\.jsonl"):
        read(str(tmp_path))


def test_a_name_with_the_signs_of_a_pattern_is_a_name(tmp_path: Path) -> None:
    for name in ("[1] a.jsonl", "a *.jsonl", "1 a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert texts(str(tmp_path / "[1] a.jsonl")) == ["[1] a.jsonl"]
    assert texts(str(tmp_path / "a *.jsonl")) == ["a *.jsonl"]
    assert texts(str(tmp_path / "[1] *")) == ["[1] a.jsonl"]
    for name in ("[12] a.jsonl", "? a.jsonl"):  # not the file "1 a.jsonl"
        with pytest.raises(UserError, match="there is no file"):
            texts(str(tmp_path / name))


def test_every_file_counts_in_the_fingerprint(tmp_path: Path) -> None:
    two, three, _ = numbered(tmp_path)
    one, both = (identify_dataset(DatasetConfig(path=path, name="a")) for path in (two, (two, three)))
    assert both == one | {"sha256": [one["sha256"], identify_dataset(DatasetConfig(path=three))["sha256"]]}
    Path(three).write_text('{"text": "other"}\n')
    assert identify_dataset(DatasetConfig(path=(two, three), name="a")) != both
    # Settings that earlier versions lacked are in the fingerprint only if they are set.
    assert set(one) == {
        "name", "split", "text_column", "messages_column", "label_column", "sub_label_column", "heldout_share", "max_documents",
        "max_tokens", "title", "sha256",
    }  # fmt: skip


def test_a_subset_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(path: str, name: str | None = None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        assert (path, split, streaming) == ("org/name", "train", True)
        yield {"text": f"from {name}"}

    module = ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert texts("org/name", subset="en") == ["from en"]
    assert texts("org/name") == ["from None"]
    (path, *_) = numbered(tmp_path)
    with pytest.raises(UserError, match="part-2 has the subset 'en', but is read from files"):
        read(path, subset="en")
