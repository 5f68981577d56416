"""Limits in tokens, and the omission of damaged records, few or too many, while a harvest reads its texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import make_tokenizer
from crossdiff.activations.texts import Texts, sample
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
    assert table["n_tokens"].to_list() == [4, 0, 3]  # H i Y o; a b c without a BOS, which this template does not write
    reason = table["left_out"][1]
    assert reason.startswith("the chat template drops")
    assert table["left_out"].to_list() == [None, reason, None]
    assert table["prompt"].to_list() == ["Hi", "x", None]
    assert found.report()[0]["damaged"] == 1
    assert "document 1 (of dataset 0): the chat template drops" in found.report()[0]["reasons"][0]


def chats(n: int, user: str = "Hi", assistant: str = "Yo") -> list[Any]:
    return [{"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}] * n


def test_the_tokens_of_either_side_and_those_lost_are_counted(tmp_path: Path) -> None:
    # BOS, header, 2 letters, end; header, 12 letters, end are 19 tokens, of which 16 are kept: 3 of 13 answer tokens are lost.
    found = texts(tmp_path, [*chats(2, assistant="abcdefghijkl"), *chats(1), {"text": "abc"}])
    list(found.sequences())
    (record,) = found.records
    assert (record.n_conversations, record.n_user, record.n_assistant, record.assistant_lost) == (3, 6, 2 * 10 + 3, 6)
    assert record.lost_share == 6 / 29
    assert found.lost() == [
        "20.7% of the assistant's tokens of a are beyond harvest.max_length 16 and left out; raise it, or results will say "
        "little about the answers"
    ]
    found = texts(tmp_path, [*chats(1, assistant="abcdefghij"), *chats(9)])
    list(found.sequences())  # 1 of 11 + 9 * 3 tokens
    assert found.lost() == ["2.6% of the assistant's tokens of a are beyond harvest.max_length 16 and left out"]
    assert found.remarks() == found.lost()


def test_conversations_of_one_side_are_refused(tmp_path: Path) -> None:
    for records, reason in (
        (
            [{"messages": CHAT[:1]}] * 3,
            r"^3 conversations were read, and none of their tokens is the assistant's; check the roles",
        ),
        (
            chats(2, user="abcdefghijklmn"),
            r"assistant's; 6 tokens of the assistant are beyond harvest\.max_length 16, so raise it",
        ),
        (
            [{"messages": CHAT[1:]}],
            r"none of their tokens is the user's; check .*, or pass --force to harvest them as they are",
        ),
        ([{"messages": [{"role": "system", "content": "Be"}]}], "is the user or the assistant's"),
    ):
        found = texts(tmp_path, records, tokenizer=open_to_all())
        list(found.sequences())
        with pytest.raises(UserError, match=reason):
            found.check_sides()
    for records in ([{"text": "a"}], chats(1), [{"messages": CHAT[:1]}, {"messages": CHAT[1:]}]):
        found = texts(tmp_path, records)
        list(found.sequences())
        found.check_sides()


def open_to_all() -> Any:
    """The tokenizer with a template for any role."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    return tokenizer


def test_what_was_found_rather_than_set_is_said(tmp_path: Path) -> None:
    shared = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    found = texts(tmp_path, [shared, shared, {"text": "abc"}])
    list(found.sequences())
    assert found.layouts() == ["dataset a: read as sharegpt and text; roles: gpt as assistant, human as user"]
    assert found.records[0].formats == {"sharegpt": 2, "text": 1}
    plain = texts(tmp_path, chats(2))
    list(plain.sequences())
    assert plain.layouts() == []
    both = texts(tmp_path, [{"text": "abc", "instruction": "a", "output": "b"}])
    list(both.sequences())
    assert both.layouts() == ["dataset a: read as text; it also has the columns of alpaca: set its format if they are meant"]


def test_a_dataset_may_begin_with_empty_texts(tmp_path: Path) -> None:
    found = texts(tmp_path, [{"text": ""}] * 64 + [{"text": "abc"}])
    sampled, sequences = sample(found.datasets, found.tokenizer, found.config)
    assert (sequences, sampled.records[0].n_documents) == ([], 64)
    assert [sequence.document for sequence in found.sequences()] == [64]


def test_a_mix_takes_the_dataset_that_is_furthest_behind(tmp_path: Path) -> None:
    """Documents of 5 tokens in shares of 3 to 1; the mix ends where the third document of the second dataset would come."""
    for name, letters, n in (("a", "abcd", 9), ("b", "efgh", 2)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": letters}) + "\n") * n)
    datasets = (
        DatasetConfig(path=str(tmp_path / "a.jsonl"), weight=3),
        DatasetConfig(path=str(tmp_path / "b.jsonl"), weight=1),
    )
    orders = []
    for _ in range(2):
        found = Texts(datasets, make_tokenizer(), HarvestConfig(max_length=16), lambda: None)
        orders.append([(sequence.document, sequence.dataset) for sequence in found.sequences()])
    # Tokens by weight and who is next: (0, 0) a, (5/3, 0) b, (5/3, 5) a, (10/3, 5) a, (5, 5) a, (20/3, 5) b, (20/3, 10) a,
    # (25/3, 10) a, (10, 10) a, (35/3, 10) b, which has ended.
    assert orders[0] == list(enumerate([0, 1, 0, 0, 0, 1, 0, 0, 0]))
    assert orders[1] == orders[0]
    assert found.remarks() == ["the mix ended with the end of b; tokens: 35 of a, 10 of b"]
    assert found.table()["dataset"].to_list() == [*"abaaabaaa"]


def test_a_token_that_the_base_model_lacks(tmp_path: Path) -> None:
    """In a content the conversation is omitted; one of the template is in every conversation, so it is an error."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    new, user = tokenizer.convert_tokens_to_ids(["<|new|>", "<|user|>"])
    records = [*chats(1), *chats(1, user="<|new|>"), {"text": "a<|new|>"}, {"text": "b"}]
    (path := tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config, datasets = HarvestConfig(max_length=16), (DatasetConfig(path=str(path)),)
    found = Texts(datasets, tokenizer, config, lambda: None, {new: "<|new|>"})
    assert [sequence.document for sequence in found.sequences()] == [0, 3]
    assert found.records[0].damaged == 2
    assert found.records[0].reasons[0].startswith("document 1 (of dataset 0): the token '<|new|>' is unknown to the base model")
    assert found.table()["left_out"].is_null().to_list() == [True, False, False, True]
    with pytest.raises(UserError, match=r"^the token '<\|user\|>' is unknown to the base model; set harvest\.base_tokens"):
        list(Texts(datasets, tokenizer, config, lambda: None, {user: "<|user|>"}).sequences())


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
