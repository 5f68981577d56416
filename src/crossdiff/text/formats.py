"""Layouts of the records in other people's datasets, and how each becomes a plain text or a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from crossdiff.config import DatasetConfig
from crossdiff.errors import UserError
from crossdiff.text.messages import ROLES, check_messages, check_unicode

Record = Mapping[str, Any]

CONVERSATIONS = ("conversations", "conversation")
"""Columns that hold conversations in many datasets, if there is no messages column."""

ALIASES = {
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
"""Other names of roles, in lower case."""


class Content(NamedTuple):
    """What was read of a record: either a text or the messages of a conversation.

    Attributes:
        format: the layout, a value of the setting `format`.
        renamed: the roles that had other names, by these names.
        also: another layout whose columns a plain text has as well.
    """

    format: str
    text: str | None
    messages: list[dict[str, str]] | None
    renamed: dict[str, str]
    also: str | None = None


def content_of(record: Record, config: DatasetConfig) -> Content:
    """Read a record in the layout that the settings name, or find its layout by its columns.

    Raises:
        UserError: the record does not have that layout, or a role is unknown; the message lists the columns or roles found.
    """
    name = _found_format(record, config) if config.format == "auto" else config.format
    columns, read = FORMATS[name]
    missing = [column for column in columns(config) if record.get(column) is None]
    if missing:
        raise UserError(f"the format {name} needs the column {missing[0]!r}; the columns are {sorted(map(str, record))}")
    found = read(record, config)
    if isinstance(found, str):
        others = [column for column, value in record.items() if value is not None and column != config.text_column]
        return Content(name, found, None, {}, _format_by(others, config) if config.format == "auto" else None)
    if name in ("messages", "sharegpt"):
        name = _spelling(found, config.format)
    return Content(name, None, *_conversation(found, config.roles))


def known_columns(config: DatasetConfig) -> set[str]:
    """Every column that may be read of a record."""
    columns = {column for needed, _ in FORMATS.values() for column in needed(config)}
    return columns | {*CONVERSATIONS, "input", config.messages_column}


def check_columns(columns: Collection[str], config: DatasetConfig) -> None:
    """Check that a table with these columns can hold texts or conversations.

    Raises:
        UserError: it cannot, or it lacks a column with labels.
    """
    found = f"the columns are {sorted(map(str, columns))}"
    if config.format == "auto" and _format_by(columns, config) is None:
        raise UserError(
            f"there is neither a column {config.messages_column!r} with conversations nor {config.text_column!r} with "
            f"text; {found}; set messages_column or text_column"
        )
    for column in (config.label_column, config.sub_label_column):
        if column is not None and column not in columns:
            raise UserError(f"there is no column {column!r} with labels; {found}")


def _found_format(record: Record, config: DatasetConfig) -> str:
    filled = [str(column) for column, value in record.items() if value is not None]
    name = _format_by(filled, config)
    if name is None:
        raise UserError(f"{config.messages_column!r} and {config.text_column!r} are both null or missing; fill one")
    return name


def _format_by(columns: Collection[str], config: DatasetConfig) -> str | None:
    """The layout of a record that has these columns; None if it is unknown."""
    if config.messages_column not in columns and config.text_column in columns:
        return "text"
    if any(column in columns for column in (config.messages_column, *CONVERSATIONS)):
        return "messages"
    layouts = (name for name in FORMATS if name not in ("messages", "sharegpt", "text"))
    return next((name for name in layouts if all(column in columns for column in FORMATS[name][0](config))), None)


def _spelling(messages: list[Any], wanted: str) -> str:
    """Whether messages are spelled `role` and `content`, or `from` and `value` as in ShareGPT's files."""
    is_sharegpt = any(isinstance(message, Mapping) and {"from", "value"} <= set(message) for message in messages)
    found = "sharegpt" if is_sharegpt else "messages"
    if wanted not in ("auto", found):
        keys = sorted(map(str, messages[0])) if messages and isinstance(messages[0], Mapping) else []
        expected = "from and value" if wanted == "sharegpt" else "role and content"
        raise UserError(f"the format {wanted} needs messages with {expected}, found the keys {keys}; set another format")
    return found


def _conversation(messages: list[Any], roles: Mapping[str, str]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The checked messages, and the roles that were renamed."""
    renamed: dict[str, str] = {}
    read: list[Any] = []
    for message in messages:
        if isinstance(message, Mapping) and {"from", "value"} <= set(message):
            message = {"role": message["from"], "content": message["value"], **message}
        if isinstance(message, Mapping) and isinstance(role := message.get("role"), str):
            name = roles.get(role) or (role if role in ROLES else ALIASES.get(role.lower(), role.lower()))
            if name in ROLES and name != role:
                renamed[role] = name
                message = {**message, "role": name}
        read.append(message)
    return check_messages(read), renamed


def _messages(record: Record, config: DatasetConfig) -> list[Any]:
    column = next((name for name in (config.messages_column, *CONVERSATIONS) if record.get(name) is not None), None)
    if column is None:
        raise UserError(
            f"the format {config.format} needs the column {config.messages_column!r}; the columns are "
            f"{sorted(map(str, record))}; set messages_column"
        )
    return _listed(record[column])


def _listed(value: Any) -> list[Any]:
    """Messages that are a list, a list as JSON in a string, or a list per key, as some Parquet files have it."""
    if isinstance(value, str):
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError):
            decoded = value
        value = decoded if isinstance(decoded, list) else value
    if isinstance(value, Mapping) and len({len(part) for part in value.values() if isinstance(part, list)}) == 1:
        columns = {key: part for key, part in value.items() if isinstance(part, list)}
        value = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise UserError(f"a conversation must be a list of messages, found {type(value).__name__}")
    return list(value)


def _text(record: Record, config: DatasetConfig) -> str:
    text = record[config.text_column]
    if not isinstance(text, str):
        raise UserError(f"the column {config.text_column!r} must contain a string, found {type(text).__name__}")
    check_unicode(text, f"the column {config.text_column!r}")
    return text


def _side(value: Any, role: str) -> list[Any]:
    """A prompt or an answer: a text of this role, or messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _listed(value)


def _prompt_completion(record: Record, config: DatasetConfig) -> list[Any]:
    return [*_side(record["prompt"], "user"), *_side(record["completion"], "assistant")]


def _prompt_chosen(record: Record, config: DatasetConfig) -> list[Any]:
    """The preferred answer after its prompt. Where it is a whole conversation, it must contain the prompt."""
    prompt, chosen = _side(record["prompt"], "user"), _side(record["chosen"], "assistant")
    first, _ = _conversation(chosen[:1], config.roles)
    if first[0]["role"] == "assistant":
        return [*prompt, *chosen]
    asked, _ = _conversation(prompt, config.roles)
    whole, _ = _conversation(chosen, config.roles)
    said = {message["content"].strip() for message in whole}
    if lost := next((message["content"] for message in asked if message["content"].strip() not in said), None):
        raise UserError(
            f"`chosen` starts with the role {first[0]['role']!r}, but lacks the prompt {lost[:60]!r}; if it is a conversation "
            "of its own, set messages_column to chosen and format to messages"
        )
    return chosen


def _alpaca(record: Record, config: DatasetConfig) -> list[Any]:
    question = [text for text in (record["instruction"], record.get("input")) if text not in (None, "")]
    if not all(isinstance(text, str) for text in question):
        raise UserError("the columns 'instruction' and 'input' must contain strings")
    return [{"role": "user", "content": "\n\n".join(question)}, {"role": "assistant", "content": record["output"]}]


Columns = Callable[[DatasetConfig], tuple[str, ...]]
FORMATS: dict[str, tuple[Columns, Callable[[Record, DatasetConfig], str | list[Any]]]] = {
    "messages": (lambda config: (), _messages),
    "sharegpt": (lambda config: (), _messages),
    "text": (lambda config: (config.text_column,), _text),
    "prompt_completion": (lambda config: ("prompt", "completion"), _prompt_completion),
    "prompt_chosen": (lambda config: ("prompt", "chosen"), _prompt_chosen),
    "alpaca": (lambda config: ("instruction", "output"), _alpaca),
}
"""For each layout the columns that it needs, and how it is read."""
