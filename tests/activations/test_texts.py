"""Limits in tokens, and the omission of damaged records, few or too many, while a harvest reads its texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import make_tokenizer
from crossdiff.activations.texts import Texts
from crossdiff.activations.writer import DOCUMENT_COLUMNS
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def texts(path: Path, records: list[Any], max_damaged: float = 0.01, tokenizer: Any = None, **options: Any) -> Texts:
    """Make a dataset of these records (strings stay as they are). The tokenizer has a BOS and one token per byte."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (path / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    config = HarvestConfig(max_length=16, max_damaged=max_damaged)
    datasets = (DatasetConfig(path=str(path / "a.jsonl"), **options),)
    return Texts(datasets, tokenizer or make_tokenizer(), config, lambda: None)


def test_reading_ends_with_the_document_that_reaches_max_tokens(tmp_path: Path) -> None:
    # BOS and 4 letters are 5 tokens: two documents have 10, three 15.
    for limit, n_documents in ((10, 2), (11, 3), (15, 3)):
        found = texts(tmp_path, [{"text": "abcd"}] * 200, max_tokens=limit)
        assert [sequence.document for sequence in found.sequences()] == list(range(n_documents))
        assert (found.records[0].n_documents, found.records[0].n_tokens) == (n_documents, 5 * n_documents)
        assert found.records[0].shortfall() is None
    short = texts(tmp_path, [{"text": "abcd"}] * 3, max_tokens=100)
    list(short.sequences())
    assert short.records[0].shortfall() == "a is shorter than requested: 15 of max_tokens 100"
    enough = texts(tmp_path, [{"text": "abcd"}] * 3, max_tokens=100, max_documents=2)
    list(enough.sequences())
    assert enough.records[0].shortfall() is None, "the requested number of documents was read"


def test_a_conversation_without_exact_masks_is_omitted_but_keeps_its_row(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | replace('x', '') }}{% endfor %}"
    records = [{"messages": CHAT}, {"messages": [{"role": "user", "content": "x"}]}, {"text": "abc"}]
    found = texts(tmp_path, records, tokenizer=tokenizer)
    assert [sequence.document for sequence in found.sequences()] == [0, 2]
    table = found.table()
    assert dict(table.schema) == DOCUMENT_COLUMNS
    assert table["n_tokens"].to_list() == [4, 0, 4]  # H i Y o; BOS a b c
    assert table["prompt"].to_list() == ["Hi", "x", None]
    assert found.report()[0]["damaged"] == 1
    assert "document 1 (of dataset 0): the chat template drops" in found.report()[0]["reasons"][0]


def test_too_many_damaged_records_are_an_error_with_the_first_reason(tmp_path: Path) -> None:
    good, bad = [{"text": "abcd"}], ["{"]
    assert len(list(texts(tmp_path, bad * 10 + good).sequences())) == 1  # up to ten are omitted whatever the share
    with pytest.raises(UserError, match=r"11 of the first 11 records of a are damaged, a larger .* 0\.01; .*\(line 1\): not"):
        list(texts(tmp_path, bad * 11 + good * 5000).sequences())
    mixed = texts(tmp_path, good * 1200 + bad * 11)
    assert len(list(mixed.sequences())) == 1200
    assert mixed.records[0].damaged == 11
    assert len(mixed.records[0].reasons) == 10
    assert len(list(texts(tmp_path, good * 20 + bad * 20, max_damaged=0.5).sequences())) == 20
    with pytest.raises(UserError, match=r"has no readable record: .*\(line 1\): not valid JSON"):
        list(texts(tmp_path, bad * 3).sequences())
    with pytest.raises(UserError, match="has no readable text"):
        list(texts(tmp_path, [{"text": ""}]).sequences())
