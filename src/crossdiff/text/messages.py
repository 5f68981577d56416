"""The messages of a conversation: what may be in them, and what is refused because it could not be masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crossdiff.errors import UserError

Message = Mapping[str, Any]

ROLES = ("user", "assistant", "system", "developer", "tool", "function", "ipython")
"""The roles that a message may have. Only the tokens of the first two have a flag."""

TEXT_KEYS = ("tool_calls", "function_call", "reasoning", "reasoning_content", "thinking")
"""Keys of a message that templates render as text although they are not its content."""


def check_messages(messages: object) -> list[dict[str, str]]:
    """The messages, reduced to `role` and `content`. Text parts of a content are joined.

    Raises:
        UserError: they are not a conversation in one of `ROLES` each, or have text that cannot be masked.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise UserError(f"a conversation must be a list of messages, found {type(messages).__name__}")
    if not messages:
        raise UserError("the conversation is empty; give at least one message, or remove the record")
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"message {index} must be a mapping with role and content, found {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise UserError(f"message {index} has no {key!r}; its keys are {sorted(map(str, message))}")
        content = _joined_parts(message["content"])
        for key, value in (("role", message["role"]), ("content", content)):
            if not isinstance(value, str):
                raise UserError(f"the {key} of message {index} must be a string, found {type(value).__name__}")
        for key in TEXT_KEYS:
            if message.get(key):
                raise UserError(f"message {index} has {key!r}, which cannot be masked; remove it or the record")
        check_unicode(content, f"the content of message {index}")
        turns.append({"role": message["role"], "content": content})
    roles = list(dict.fromkeys(turn["role"] for turn in turns))
    if unknown := [role for role in roles if role not in ROLES]:
        raise UserError(
            f"the roles of the conversation are {', '.join(map(repr, roles))}; {', '.join(map(repr, unknown))} is not one of "
            f"{', '.join(ROLES)}; rename it, or set `roles` of the dataset, as in {{roles: {{{unknown[0]}: user}}}}"
        )
    return turns


def _joined_parts(content: object) -> Any:
    """The text of a content that is a list of text parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        found = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        raise UserError(
            f"a content may be a list of parts with text, found {found}; only text can be read, so remove the record"
        )
    return "".join(map(str, texts))


def check_unicode(text: str, name: str) -> None:
    """Check that a text can be encoded as UTF-8; JSON can contain half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid Unicode at character {error.start}: {error.reason}") from error
