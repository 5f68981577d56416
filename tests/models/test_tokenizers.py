"""Tokenizers that do or do not make a pair, and the date that a template writes."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from conftest import make_model, make_tokenizer
from crossdiff.errors import UserError
from crossdiff.models.pair import Pair
from crossdiff.models.tokenizers import check_tokenizers, pin_date, reads_clock

DATED = "{% if strftime_now is defined %}{% set day = strftime_now(FORMAT) %}{% else %}{% set day = '?' %}{% endif %}{{ day }}"


def renamed(token: str, new: str) -> Any:
    """The tokenizer with another name for one of its tokens, at the same id."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = make_tokenizer().backend_tokenizer.to_str().replace(json.dumps(token), json.dumps(new))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), bos_token="<|bos|>", eos_token="<|end|>")


def test_tokens_that_the_base_model_lacks_get_stand_ins_or_must_not_occur() -> None:
    left, right = make_tokenizer(), make_tokenizer()
    right.add_tokens(["<|new|>", "<|more|>"])
    new, more, end, user = right.convert_tokens_to_ids(["<|new|>", "<|more|>", "<|end|>", "<|user|>"])
    assert check_tokenizers(left, right, "a", "b", {}) == ({}, {new: "<|new|>", more: "<|more|>"})
    assert check_tokenizers(left, right, "a", "b", {"<|new|>": "<|end|>"}) == ({new: end}, {more: "<|more|>"})
    assert check_tokenizers(left, left, "a", "b", {"<|user|>": "<|end|>"}) == ({user: end}, {})
    for tokens, name in (({"<|odd|>": "a"}, "b"), ({"<|new|>": "<|odd|>"}, "a")):
        with pytest.raises(UserError, match=rf"names '<\|odd\|>', but the tokenizer of {name} has no such token"):
            check_tokenizers(left, right, "a", "b", {"<|new|>": "<|end|>"} | tokens)


def test_the_base_model_refuses_ids_that_it_lacks() -> None:
    pair = Pair(make_model(), make_model(), None, {}, {270: 2}, {271: "<|more|>"})
    assert pair.base_ids(torch.tensor([[5, 270]])).tolist() == [[5, 2]]
    with pytest.raises(UserError, match=r"token '<\|more\|>' is unknown to the base model; set harvest\.base_tokens"):
        pair.base_ids(torch.tensor([[5, 271]]))


def test_reserved_tokens_may_have_other_names_at_the_same_id() -> None:
    left, right = make_tokenizer(), renamed("<|user|>", "<|im_start|>")
    assert check_tokenizers(left, right, "a", "b", {}) == ({}, {})
    assert check_tokenizers(left, right, "a", "b", {"<|im_start|>": "<|user|>"}) == ({}, {})
    # An ordinary token of the base model is no reserved one.
    letter = make_tokenizer().convert_tokens_to_ids("z")
    right = renamed("z", "<|im_start|>")
    right.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>", special=True)]})
    with pytest.raises(
        UserError, match=rf"1 ids stand for other tokens, such as {letter}: 'z' and '<\|im_start\|>'; if the base"
    ):
        check_tokenizers(left, right, "a", "b", {})
    assert check_tokenizers(left, right, "a", "b", {"<|im_start|>": "z"}) == ({}, {})


def test_different_tokenizers_are_refused_with_an_example() -> None:
    left, right = make_tokenizer(), make_tokenizer()
    left.add_tokens(["extra"])
    with pytest.raises(UserError, match=r"1 tokens exist only in the first, such as 'extra'"):
        check_tokenizers(left, right, "a", "b", {})
    right.add_tokens(["other", "extra"])
    with pytest.raises(UserError, match=r"1 tokens have different ids, such as 'extra': 261 and 262"):
        check_tokenizers(left, right, "a", "b", {})


@pytest.mark.parametrize(
    ("directives", "written"),
    [
        ("%d %b %Y", "05 Jan 2027"),
        ("%-d.%-m.%y", "5.1.27"),
        ("%A, %B %-d, %Y at %H:%M", "Tuesday, January 5, 2027 at 00:00"),
        ("%Y-%m-%d", "2027-01-05"),
        ("100%%", "100%"),
    ],
)
def test_a_pinned_date_is_what_the_template_writes(directives: str, written: str) -> None:
    tokenizer = make_tokenizer()
    assert not reads_clock(tokenizer)
    tokenizer.chat_template = (
        DATED.replace("FORMAT", repr(directives)) + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    assert reads_clock(tokenizer)
    pin_date(tokenizer, date(2027, 1, 5))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "!"}], tokenize=False) == f"{written}!"


def test_a_pinned_date_reaches_macros_and_named_templates() -> None:
    tokenizer = make_tokenizer()
    inside = "{% macro head() %}{{ strftime_now('%Y') }}{% endmacro %}{% for m in messages %}{{ head() }}{% endfor %}"
    tokenizer.chat_template = {"default": inside, "other": "plain"}
    pin_date(tokenizer, date(1999, 12, 31))
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}] * 2, tokenize=False) == "19991999"
    assert tokenizer.chat_template["other"] == "plain"
