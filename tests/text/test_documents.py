"""Reading corpora: what becomes of a record, the split, and every way a file can be wrong."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossdiff.config import DatasetConfig
from crossdiff.errors import UserError
from crossdiff.text.documents import Document, read_dataset, read_documents
from crossdiff.text.readers import count_records

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def write(path: Path, *records: Any) -> Path:
    """Records as JSON lines, compressed if the name says so."""
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def read(path: Path | str, **options: Any) -> list[Document]:
    return list(read_documents([DatasetConfig(path=str(path), **options)]))


def test_plain_text_and_conversations_are_numbered_over_all_datasets(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.jsonl", {"text": "a"}, {"text": "b"})
    chat = write(tmp_path / "chat.jsonl.gz", {"messages": CHAT, "kind": "smalltalk", "sub": None})
    configs = [
        DatasetConfig(path=str(plain), heldout_share=0),
        DatasetConfig(path=str(chat), heldout_share=1, label_column="kind", sub_label_column="sub"),
    ]
    assert list(read_documents(configs)) == [
        Document(0, 0, "a", None, "train", None, None),
        Document(1, 0, "b", None, "train", None, None),
        Document(2, 1, None, CHAT, "heldout", "smalltalk", None),
    ]


def test_columns_can_have_other_names_and_labels_become_strings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"body": "x", "talk": None, "class": 3}, {"talk": CHAT, "class": None})
    first, second = read(path, text_column="body", messages_column="talk", label_column="class")
    assert (first.text, first.messages, first.label) == ("x", None, "3")
    assert (second.text, second.messages, second.label) == (None, CHAT, None)


def test_messages_win_over_text_and_keep_role_and_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "<s>Hi", "messages": [{"role": "user", "content": "Hi", "id": 7}]})
    (document,) = read(path)
    assert (document.text, document.messages) == (None, [{"role": "user", "content": "Hi"}])


def test_documents_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    path.write_text(path.read_text() + "{broken\n")
    documents = read_documents([DatasetConfig(path=str(path))])
    assert next(documents).text == "a"
    with pytest.raises(UserError, match=r"a\.jsonl, record 2 \(line 2\): not valid JSON"):
        next(documents)


def test_max_documents_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {})
    assert [document.text for document in read(path, max_documents=2)] == ["a", "b"]
    pl.DataFrame({"text": ["a", "b", None]}).write_parquet(tmp_path / "a.parquet")
    assert [document.text for document in read(tmp_path / "a.parquet", max_documents=2)] == ["a", "b"]


def test_paragraphs_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\r\nOne\r\n  two\r\n \r\n\r\nthree é\n\n\n".encode())
    assert [document.text for document in read(path)] == ["One\n  two", "three é"]
    assert [document.text for document in read(path, text_column="body")] == ["One\n  two", "three é"]


def test_parquet(tmp_path: Path) -> None:
    table = pl.DataFrame({"text": ["a", None], "messages": [None, CHAT], "kind": [None, "x"], "other": [1, 2]})
    table.write_parquet(tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet", label_column="kind")
    assert (first.text, first.messages, first.label) == ("a", None, None)
    assert (second.text, second.messages, second.label) == (None, CHAT, "x")


def test_order_of_a_large_parquet_file(tmp_path: Path) -> None:
    texts = [str(number) for number in range(5_000)]
    pl.DataFrame({"text": texts}).write_parquet(tmp_path / "a.parquet", row_group_size=500)
    assert [document.text for document in read(tmp_path / "a.parquet")] == texts


def test_equal_records_fall_on_the_same_side_whatever_the_order(tmp_path: Path) -> None:
    texts = [str(number) for number in range(400)]
    forth = write(tmp_path / "forth.jsonl", *({"text": text, "n": text} for text in texts))
    back = write(tmp_path / "back.jsonl", *({"text": text, "n": "-"} for text in reversed(texts * 2)))
    sides = {d.text: d.split for d in read(forth, name="a", heldout_share=0.25)}
    assert [d.split for d in read(back, name="a", heldout_share=0.25)] == [sides[text] for text in reversed(texts * 2)]
    # 400 draws with p = 1/4: 100, standard deviation 8.7
    heldout = {text for text, split in sides.items() if split == "heldout"}
    assert 65 < len(heldout) < 135
    # A larger share holds out more of the same; another name holds out others.
    assert heldout < {d.text for d in read(forth, name="a", heldout_share=0.5) if d.split == "heldout"}
    assert heldout != {d.text for d in read(forth, name="b", heldout_share=0.25) if d.split == "heldout"}


def test_the_split_never_changes_between_versions(tmp_path: Path) -> None:
    # The first 8 bytes of sha256('["a", "x"]') and of sha256('["a", [["user", "Hi"], ["assistant", "Yo"]]]'), as
    # shares of 2^64, are what `sha256sum` gives: 0.8968 and 0.6804.
    path = write(tmp_path / "a.jsonl", {"text": "x"}, {"messages": CHAT})
    assert [d.split for d in read(path, heldout_share=0.6803)] == ["train", "train"]
    assert [d.split for d in read(path, heldout_share=0.6804)] == ["train", "heldout"]
    assert [d.split for d in read(path, heldout_share=0.8968)] == ["heldout", "heldout"]


RECORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECORDS, st.sampled_from([0.0, 0.5, 1.0]))
def test_every_record_comes_out_once_and_in_order(tmp_path: Path, texts: list[str], share: float) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    documents = read(path, heldout_share=share)
    assert [(document.number, document.text) for document in documents] == list(enumerate(texts))
    assert documents == read(path, heldout_share=share)
    if share in (0.0, 1.0):
        assert {document.split for document in documents} == {"heldout" if share else "train"}


@pytest.mark.parametrize(
    ("record", "options", "reason"),
    [
        ({"body": "x", "id": 1}, {}, r"record 2 \(line 3\): .*'messages' .*'text'.*columns are \['body', 'id'\]"),
        ({"text": None}, {}, "'messages' and 'text' are both null or missing"),
        ({"text": 3}, {}, "'text' must contain a string, found int"),
        ({"text": "\ud800"}, {}, "'text' is not valid Unicode at character 0"),
        ({"text": "x"}, {"label_column": "kind"}, r"no column 'kind' with labels; the columns are \['text'\]"),
        ({"text": "x", "kind": ["a"]}, {"label_column": "kind"}, "'kind' must contain labels as strings, found list"),
        ({"messages": []}, {}, "conversation is empty"),
        ({"messages": "Hi"}, {}, "must be a list of messages, found str"),
        ({"messages": [{"role": "user"}]}, {}, "message 0 has no 'content'"),
        (["x"], {}, r"record 2 \(line 3\): a record must be an object with columns, found list"),
    ],
)
def test_a_record_that_is_none(tmp_path: Path, record: Any, options: dict[str, str], reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine", "kind": "a"}) + "\n\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError, match=reason) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    pl.DataFrame({"body": ["a"], "id": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: .*'messages'.*'text'.*columns are \['body', 'id'\]"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'kind' with labels"):
        read(tmp_path / "a.parquet", text_column="body", label_column="kind")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
def test_a_file_without_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pl.DataFrame({"text": []}, schema={"text": pl.String}).write_parquet(path)
    else:
        path.write_bytes(gzip.compress(b"\n \n") if name.endswith(".gz") else b"\n \n")
    with pytest.raises(UserError, match=f"{name} has no readable record"):
        read(path)


def test_a_second_dataset_without_records(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    paths = (write(tmp_path / "a.jsonl", {"text": "a"}), tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"empty\.jsonl has no readable record"):
        list(read_documents([DatasetConfig(path=str(path)) for path in paths]))


def test_damaged_files(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": str(n) * 50}) + "\n" for n in range(5000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz cannot be read after line \d+"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "no.jsonl.gz").write_bytes(b"not compressed")
    with pytest.raises(UserError, match=r"no\.jsonl\.gz cannot be read after line 0"):
        read(tmp_path / "no.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl, record 2 \(line 2\): not UTF-8"):
        read(tmp_path / "latin.jsonl")
    for damaged in (b"", b"PAR1 and nothing else"):
        (tmp_path / "no.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"no\.parquet cannot be read as Parquet"):
            read(tmp_path / "no.parquet")


def test_damaged_records_are_told_and_have_no_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n\n{"text": "\xe9"}\n{"text": 3}\n{"text": "b"}\n')
    told: list[str] = []
    found = list(read_dataset(DatasetConfig(path=str(path)), 4, 10, lambda error: told.append(str(error))))
    assert [(document.number, document.dataset, document.text) for document in found] == [(10, 4, "a"), (11, 4, "b")]
    places = [reason.removeprefix(str(path)).partition(":")[0] for reason in told]
    assert places == [", record 2 (line 2)", ", record 3 (line 4)", ", record 4 (line 5)"]
    (tmp_path / "a.txt").write_bytes(b"one\n\nt\xe9o\n\nthree\n")
    found = list(read_dataset(DatasetConfig(path=str(tmp_path / "a.txt")), 0, 0, lambda error: told.append(str(error))))
    assert [document.text for document in found] == ["one", "three"]
    assert "record 2: not UTF-8" in told[-1]


def test_records_are_counted_without_parsing(tmp_path: Path) -> None:
    lines, zipped = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    lines.write_text('{"text": "a"}\n\n{broken\n{"text": "b"}\n')
    write(zipped, *[{"text": "a"}] * 7)
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree")
    pl.DataFrame({"text": ["a"] * 5}).write_parquet(tmp_path / "a.parquet")

    def count(path: Path | str, **options: Any) -> int | None:
        return count_records(DatasetConfig(path=str(path), **options))

    assert [count(path) for path in (lines, zipped, tmp_path / "a.txt", tmp_path / "a.parquet")] == [3, 7, 2, 5]
    assert [count(zipped, max_documents=number) for number in (3, 100)] == [3, 7]
    assert count("org/name") is None
    assert count("org/name", max_documents=8) == 8


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.jsonl", "there is no file .*missing.jsonl; give a file that exists"),
        ("", "is a folder; give a file in it that ends in .jsonl"),
        (
            "a.tsv",
            r"a.tsv is not a supported kind of file; give one that ends in .jsonl, .json, .csv, .parquet, .txt \(all but",
        ),
    ],
)
def test_paths_are_checked_before_anything_is_read(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "a.tsv").write_text("text\na\n")
    good = DatasetConfig(path=str(write(tmp_path / "good.jsonl", {"text": "a"})))
    with pytest.raises(UserError, match=reason):
        read_documents([good, DatasetConfig(path=str(tmp_path / name))])


def test_a_missing_file_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(UserError, match=r"there is no file texts/corpus\.jsonl"):
        read_documents([DatasetConfig(path="texts/corpus.jsonl")])


def test_number_of_datasets(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", {"text": "a"}))
    configs = [DatasetConfig(path=path, name=str(number)) for number in range(257)]
    assert len(list(read_documents(configs[:256]))) == 256
    for count in (0, 257):
        with pytest.raises(UserError, match=f"^found {count} datasets; give 1 to 256"):
            read_documents(configs[:count])


def test_datasets_that_do_not_go_together(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", {"text": "a"}))
    with pytest.raises(UserError, match="two datasets are called 'a'"):
        read_documents([DatasetConfig(path=path)] * 2)
    with pytest.raises(UserError, match="b has no weight, but other datasets have"):
        read_documents([DatasetConfig(path=path, weight=1), DatasetConfig(path=path, name="b")])
    with pytest.raises(UserError, match=r"a maps the role 'pupil' to 'boy'; expected one of user, assistant"):
        read_documents([DatasetConfig(path=path, roles={"pupil": "boy"})])


def hub(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    """Put a module `datasets` in place whose `load_dataset` is `load`."""
    module = ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def load(path: str, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        assert (path, split, streaming) == ("org/name", "test", True)
        for number in range(1000):
            served.append(number)
            yield {"text": str(number)}

    hub(monkeypatch, load)
    documents = read("org/name", split="test", max_documents=3)
    assert [document.text for document in documents] == ["0", "1", "2"]
    assert served == [0, 1, 2]


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'crossdiff\[datasets\]'"):
        read("org/name")


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach the Hub"), ValueError("Bad split: train")])
def test_hub_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(path: str, **options: Any) -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise error

    hub(monkeypatch, load)
    with pytest.raises(UserError, match=rf"'train'.*after record 1: {error}.*download its files"):
        read("org/name")
