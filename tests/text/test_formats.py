"""Layouts of other people's conversations: what becomes of a record, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from crossdiff.config import DatasetConfig
from crossdiff.errors import UserError
from crossdiff.text.formats import content_of

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CHAT = [USER, ASSISTANT]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
RENAMED = {"human": "user", "gpt": "assistant"}


def read(record: dict[str, Any], **options: Any) -> Any:
    return content_of(record, DatasetConfig(path="a.jsonl", **options))


@pytest.mark.parametrize(
    ("record", "name", "renamed"),
    [
        ({"messages": CHAT}, "messages", {}),
        ({"messages": CHAT, "text": "Hi", "prompt": "x", "completion": "y"}, "messages", {}),
        ({"conversation": CHAT}, "messages", {}),
        ({"messages": json.dumps(CHAT)}, "messages", {}),
        ({"messages": {"role": ["user", "assistant"], "content": ["Hi", "Yo"]}}, "messages", {}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]}, "messages", {}),
        (
            {"messages": [{"role": "Human", "content": "Hi"}, {"role": "bot", "content": "Yo"}]},
            "messages",
            {"Human": "user", "bot": "assistant"},
        ),
        ({"conversations": SHAREGPT}, "sharegpt", RENAMED),
        ({"messages": SHAREGPT}, "sharegpt", RENAMED),
        ({"prompt": "Hi", "completion": "Yo"}, "prompt_completion", {}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion", {}),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "no"}, "prompt_chosen", {}),
        ({"prompt": [USER], "chosen": [ASSISTANT]}, "prompt_chosen", {}),
        ({"prompt": " Hi\n", "chosen": CHAT}, "prompt_chosen", {}),
        ({"instruction": "Hi", "input": "", "output": "Yo"}, "alpaca", {}),
    ],
)
def test_known_layouts_are_found_and_can_be_named(record: Any, name: str, renamed: dict[str, str]) -> None:
    for chosen in ("auto", name):
        found = read(record, format=chosen)
        assert found == (name, None, CHAT, renamed, None)


def test_alpaca_puts_the_input_below_the_instruction() -> None:
    found = read({"instruction": "Add", "input": "1 2", "output": "3"})
    assert [message["content"] for message in found.messages] == ["Add\n\n1 2", "3"]


def test_text_wins_over_layouts_that_are_not_messages() -> None:
    record = {"text": "all", "instruction": "Hi", "output": "Yo"}
    assert read(record) == ("text", "all", None, {}, "alpaca")
    assert read(record, format="text") == ("text", "all", None, {}, None)
    assert read(record, format="alpaca").messages == CHAT
    assert read({"text": "all", "messages": CHAT}, format="text").text == "all"


def test_other_roles_are_refused_with_those_found_unless_they_are_mapped() -> None:
    talk = [{"role": "pupil", "content": "Hi"}, {"role": "Teacher", "content": "Yo"}]
    with pytest.raises(UserError, match=r"roles of the conversation are 'pupil', 'Teacher'; 'pupil', 'Teacher' is not one of"):
        read({"messages": talk})
    roles = {"pupil": "user", "Teacher": "assistant"}
    assert read({"messages": talk}, roles=roles) == ("messages", None, CHAT, roles, None)


@pytest.mark.parametrize(
    ("record", "options", "reason"),
    [
        ({"messages": CHAT}, {"format": "sharegpt"}, r"sharegpt needs messages with from and value, found .*'content', 'role'"),
        (
            {"messages": SHAREGPT},
            {"format": "messages"},
            r"messages needs messages with role and content, found .*'from', 'value'",
        ),
        ({"messages": CHAT}, {"format": "alpaca"}, r"alpaca needs the column 'instruction'; the columns are \['messages'\]"),
        (
            {"body": "x"},
            {"format": "messages"},
            r"needs the column 'messages'; the columns are \['body'\]; set messages_column",
        ),
        ({"messages": "Hi"}, {}, "must be a list of messages, found str"),
        ({"messages": '{"a": 1}'}, {}, "must be a list of messages, found str"),
        ({"messages": {"role": ["user"], "content": []}}, {}, "must be a list of messages, found dict"),
        ({"prompt": "Hello", "chosen": CHAT}, {}, r"`chosen` starts with the role 'user', but lacks the prompt 'Hello'"),
        ({"prompt": 3, "completion": "Yo"}, {}, "must be a list of messages, found int"),
        ({"instruction": "Hi", "output": 3}, {}, "content of message 1 must be a string, found int"),
        ({"conversations": [{"from": "gpt", "value": "a", "tool_calls": [1]}]}, {}, "has 'tool_calls', which cannot be masked"),
    ],
)
def test_what_does_not_fit_a_layout(record: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read(record, **options)
