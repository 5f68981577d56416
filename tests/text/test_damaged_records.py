"""Damaged records are counted once, whether reading or tokenising finds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import make_tokenizer
from crossdiff.activations.texts import Texts
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.text.templates import TemplateLimit

REFUSING = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('bad content') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


def texts(path: Path, lines: list[str], template: str = REFUSING, max_documents: int | None = None) -> Texts:
    (path / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    datasets = (DatasetConfig(path=str(path / "a.jsonl"), max_documents=max_documents),)
    return Texts(datasets, tokenizer, HarvestConfig(max_length=64), lambda: None)


def conversation(content: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]})


def test_a_conversation_that_cannot_be_tokenised_is_counted_once(tmp_path: Path) -> None:
    lines = [conversation("good")] * 29 + [conversation("bad")] * 11
    with pytest.raises(UserError, match=r"^11 of the first 40 records of a are damaged"):
        list(texts(tmp_path, lines).sequences())


def test_a_record_that_cannot_be_read_is_counted_where_it_is(tmp_path: Path) -> None:
    lines = [conversation("good")] * 20 + ["{"] * 11 + [conversation("good")] * 9
    with pytest.raises(UserError, match=r"^11 of the first 31 records of a are damaged"):
        list(texts(tmp_path, lines).sequences())


@pytest.mark.parametrize("bad", [conversation("bad"), "{"])
def test_damaged_records_do_not_hide_that_a_dataset_is_short(tmp_path: Path, bad: str) -> None:
    found = texts(tmp_path, [conversation("good")] * 3 + [bad] * 2, max_documents=6)
    list(found.sequences())
    assert found.records[0].shortfall() == "a is shorter than requested: 5 of max_documents 6"
    assert found.records[0].damaged == 2


def test_a_template_beyond_its_limits_ends_the_reading(tmp_path: Path) -> None:
    with pytest.raises(TemplateLimit, match="makes more than"):
        list(texts(tmp_path, [conversation("good")] * 3, "{{ 'a' * 3000000000 }}").sequences())
