"""What a pair's tokenizers must have in common, and the date that a chat template writes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any, NamedTuple

from crossdiff.errors import UserError

CLOCK = "strftime_now"
"""The function of transformers' template language that reads the clock."""

DIRECTIVES = "aAbBcdDeFhHIjmMnpSTuUwWxXyY%"
"""Directives of strftime that templates may use, and those of numbers also without padding, as in `%-d`."""
NUMBERS = "dHIjmMSy"


class BaseReading(NamedTuple):
    """How the base model reads the chat model's ids.

    Attributes:
        stand_ins: ids that the base model was never trained on, and the ids that it reads instead.
        unreadable: ids that the base model lacks, with their tokens. No text may contain them.
    """

    stand_ins: dict[int, int]
    unreadable: dict[int, str]


def check_tokenizers(base: Any, chat: Any, base_name: str, chat_name: str, base_tokens: Mapping[str, str]) -> BaseReading:
    """Check that both models read the same ids, except for `base_tokens`, which the base model reads as other tokens.

    A reserved token may have another name in each tokenizer, since the model only sees its id. The chat model's tokenizer may
    have further tokens that no text contains.
    """
    left, right = base.get_vocab(), chat.get_vocab()
    differing = [token for token in left if token in right and left[token] != right[token]]
    if differing:
        token = differing[0]
        what = f"{len(differing)} tokens have different ids, such as {token!r}: {left[token]} and {right[token]}"
        raise UserError(f"{base_name} and {chat_name} have different tokenizers: {what}; a pair must share one tokenizer")
    _check_renamed(base, chat, base_name, chat_name, base_tokens)
    for name, vocabulary, tokens in ((chat_name, right, base_tokens), (base_name, left, base_tokens.values())):
        for token in tokens:
            if token not in vocabulary:
                raise UserError(f"harvest.base_tokens names {token!r}, but the tokenizer of {name} has no such token")
    named = {right[token]: left[stand_in] for token, stand_in in base_tokens.items()}
    known = set(left.values()) | set(named)
    unreadable = {index: token for token, index in right.items() if index not in known}
    return BaseReading({token: stand_in for token, stand_in in named.items() if token != stand_in}, unreadable)


def _check_renamed(base: Any, chat: Any, base_name: str, chat_name: str, base_tokens: Mapping[str, str]) -> None:
    """Refuse tokens of the base model that the chat model lacks, but for reserved ones that it has under another name."""
    right = {index: token for token, index in chat.get_vocab().items()}
    reserved = set(base.added_tokens_decoder) & set(chat.added_tokens_decoder)
    lost = {token: index for token, index in sorted(base.get_vocab().items()) if right.get(index) != token}
    gone = [token for token, index in lost.items() if index not in right]
    if gone:
        raise UserError(
            f"{base_name} and {chat_name} have different tokenizers: {len(gone)} tokens exist only in the first, such as "
            f"{gone[0]!r}; a pair must share one tokenizer"
        )
    ordinary = [token for token, index in lost.items() if index not in reserved and right[index] not in base_tokens]
    if ordinary:
        index = lost[ordinary[0]]
        raise UserError(
            f"{base_name} and {chat_name} have different tokenizers: {len(ordinary)} ids stand for other tokens, such as "
            f"{index}: {ordinary[0]!r} and {right[index]!r}; if the base model may read its own token there, set "
            f'harvest.base_tokens, as in {{"{right[index]}": "{ordinary[0]}"}}'
        )


def unknown_token(token: str) -> UserError:
    """The error about a token that a text contains and the base model lacks."""
    return UserError(
        f"the token {token!r} is unknown to the base model; set harvest.base_tokens to the token of its own that it should "
        f'read instead, as in {{"{token}": "..."}}'
    )


def reads_clock(tokenizer: Any) -> bool:
    """Whether the chat template asks for today's date."""
    return any(CLOCK in template for template in _templates(tokenizer).values())


def pin_date(tokenizer: Any, day: date) -> None:
    """Make the chat template write this date, at midnight, wherever it asks for today's.

    Everything that a template sees must be plain data, so the date is defined in front of the template itself.
    """
    moment = datetime.combine(day, time())
    written = {f"%{directive}": moment.strftime(f"%{directive}") for directive in DIRECTIVES}
    written |= {f"%-{directive}": str(int(written[f"%{directive}"])) for directive in NUMBERS}
    replaced = "".join(f" | replace({directive!r}, {text!r})" for directive, text in written.items())
    macro = f"{{%- macro {CLOCK}(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro -%}}"
    pinned = {name: macro + text if CLOCK in text else text for name, text in _templates(tokenizer).items()}
    if pinned:
        tokenizer.chat_template = pinned if isinstance(tokenizer.chat_template, dict) else pinned[""]


def _templates(tokenizer: Any) -> dict[str, str]:
    """The chat templates by name; a single one has no name."""
    template = tokenizer.chat_template
    return {} if template is None else template if isinstance(template, dict) else {"": template}
