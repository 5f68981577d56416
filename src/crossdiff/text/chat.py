"""Render a conversation with the tokenizer's chat template and determine the role of every token.

The template is discovered, not known: the conversation is rendered once as it is and once with a sentinel in place of each
content. The text between the sentinels is template (a *literal*). The real rendering is then rebuilt from the literals and the
contents, exactly or not at all, and each token gets the flags of the characters that it covers.

Template tokens are assigned to turns as follows. What the template writes after the last assistant message, when nothing
follows, is the *closing*. After any other content, the closing of that turn is the part that the literal shares with it
(nothing, if the closing has a special token that the literal lacks), and the rest of the literal is the header of the next
turn. So `<|im_end|>\n` closes a ChatML turn and `<|im_start|>user\n` opens one, and a template token has the same
`template_index` in each turn of a role. Text that the template writes before the first header (a default system prompt) belongs
to turn -1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from crossdiff.errors import UserError
from crossdiff.text.messages import Message, check_messages
from crossdiff.text.templates import TemplateLimit, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer: TypeAlias = PreTrainedTokenizerBase
else:  # transformers takes seconds to import, and annotations are looked up when types are checked at run time
    Tokenizer = Any

INT8_MAX = 127


class Flag(IntFlag):
    """The role of a token. Plain text has no flag; a token that straddles a border has the flags of both sides.

    MASSIVE is not a role: the harvest sets it on tokens whose activation has a massive norm.
    """

    BOS = 1
    TEMPLATE = 2
    USER = 4
    ASSISTANT = 8
    MASSIVE = 16


ROLE_FLAGS = {"user": Flag.USER, "assistant": Flag.ASSISTANT}
"""The content of any other role has no flag."""
CLOSING_TAG = re.compile(r"</[^<>\s]+>|\[/[^\[\]\s]+\]")
"""A tag such as `</think>`, up to which reasoning templates treat a content in their own way."""


@dataclass(frozen=True, eq=False)
class TokenisedChat:
    """A conversation as the model reads it; every array has the shape `[token]`.

    flags: bits of `Flag`. The special token that closes an assistant's message has TEMPLATE and ASSISTANT.
    template_index: index among the template tokens of its turn, from 0; -1 for other tokens. 127 stands for 127 and more.
    turn: index of the message; -1 for a BOS in front and for text before the first header. 127 stands for 127 and more.
    """

    token_ids: NDArray[np.int32]
    flags: NDArray[np.uint8]
    template_index: NDArray[np.int8]
    turn: NDArray[np.int8]


def tokenise_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> TokenisedChat:
    """Token ids of the rendered conversation, equal to those of `apply_chat_template`, with flags.

    Only `role` and `content` of a message are rendered. A token of `front_ids` that the template writes has only the flag BOS.
    """
    turns = check_messages(messages)
    rendered = _render(tokenizer, turns)
    heads, literals, spans = _taken_apart(tokenizer, turns, rendered)
    closing = _closing(tokenizer, turns, heads, rendered, literals)
    character_flags, character_turns = _label_characters(tokenizer, turns, rendered, literals, spans, closing)
    token_ids, starts, stops = _encode(tokenizer, rendered)
    expected = _apply(tokenizer, turns, tokenize=True, return_dict=False, tokenizer_kwargs={"verbose": False})
    if token_ids.tolist() != list(expected):
        raise UserError(
            f"the tokenizer gives {len(token_ids)} ids for the rendered conversation, but apply_chat_template gives "
            f"{len(expected)} ids, or other ones, so roles cannot be assigned; use the model's own fast tokenizer"
        )
    flags, turn = _label_tokens(character_flags, character_turns, starts, stops)
    _mark_bos(tokenizer, token_ids, flags, turn)
    return TokenisedChat(token_ids, flags, _count_template_tokens(flags, turn), _narrow(turn))


def front_ids(tokenizer: Tokenizer) -> list[int]:
    """The BOS: the ids that the tokenizer puts in front of a plain text.

    If it adds none, its `bos_token` counts where the chat template writes it once, at the very beginning of a conversation.
    A `bos_token` that opens every turn, as in SmolLM2, is part of the template.
    """
    alone = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    added = tokenizer("a", verbose=False)["input_ids"]
    front = next((at for at in range(len(added)) if added[at : at + len(alone)] == alone), 0)
    if front or tokenizer.bos_token_id is None or tokenizer.chat_template is None:
        return list(added[:front])
    roles = ("user", "assistant", "user")
    for n_messages in (3, 1):  # some templates refuse a second question
        try:
            rendered = _render(tokenizer, [{"role": role, "content": "a"} for role in roles[:n_messages]])
        except TemplateLimit:
            raise
        except UserError:
            continue
        is_first = rendered.startswith(str(tokenizer.bos_token)) and rendered.count(str(tokenizer.bos_token)) == 1
        return [int(tokenizer.bos_token_id)] if is_first else []
    return []


def _mark_bos(tokenizer: Tokenizer, token_ids: NDArray[np.int32], flags: NDArray[np.uint8], turn: NDArray[np.int64]) -> None:
    """Flag the BOS that the template writes. In front it is of no turn; one that Llama 2 writes before a turn is of that."""
    is_bos = np.isin(token_ids, front_ids(tokenizer)) & (flags == Flag.TEMPLATE)
    n_front = len(is_bos) if is_bos.all() else int(np.argmin(is_bos))
    if tokenizer.bos_token_id == tokenizer.eos_token_id:  # further on, this token ends a text
        is_bos[n_front:] = False
    flags[is_bos] = Flag.BOS
    turn[:n_front] = -1


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of the conversation followed by the header of the assistant's next message."""
    turns = check_messages(messages)
    options = {"tokenize": True, "return_dict": False, "add_generation_prompt": True}
    return list(_apply(tokenizer, turns, **options, tokenizer_kwargs={"verbose": False}))


def tokenise_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> TokenisedChat:
    """The conversation as the model reads it before it answers: `chat_prompt` with flags.

    The header of the answer is template, in its own turn after the last message.
    """
    chat = tokenise_chat(tokenizer, messages)
    token_ids = np.asarray(chat_prompt(tokenizer, messages), dtype=np.int32)
    shorter = min(len(token_ids), len(chat.token_ids))
    differ = np.flatnonzero(token_ids[:shorter] != chat.token_ids[:shorter])
    # The header may begin before the last message ends.
    common = int(differ[0]) if len(differ) else shorter
    n_header = len(token_ids) - common
    flags = np.concatenate([chat.flags[:common], np.full(n_header, Flag.TEMPLATE, dtype=np.uint8)])
    turn = np.concatenate([chat.turn[:common].astype(np.int64), np.full(n_header, len(messages))])
    return TokenisedChat(token_ids, flags, _count_template_tokens(flags, turn), _narrow(turn))


def _apply(tokenizer: Tokenizer, turns: list[dict[str, str]], **options: Any) -> Any:
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template, so conversations cannot be rendered; use the chat model's tokenizer, put its "
            "chat_template.jinja into the model's folder, or give plain text only"
        )
    try:
        with limited(tokenizer.name_or_path or "the tokenizer", sum(len(turn["content"]) for turn in turns)):
            return tokenizer.apply_chat_template(turns, **options)
    except TemplateLimit:
        raise
    except (ArithmeticError, AttributeError, LookupError, SyntaxError, TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"the chat template cannot render a conversation with the roles {roles}: {error}") from error


def _render(tokenizer: Tokenizer, turns: list[dict[str, str]]) -> str:
    return str(_apply(tokenizer, turns, tokenize=False))


def _taken_apart(
    tokenizer: Tokenizer, turns: list[dict[str, str]], rendered: str
) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """The heads of the contents that the template must see, its literals, and the span of each content in the rendering.

    A template that names a closing tag such as `</think>` may write an empty block of reasoning around contents without it.
    So if the plain sentinels do not do, those of the contents with such a tag keep the text up to it.
    """
    plain = [""] * len(turns)
    try:
        literals = _literals(tokenizer, turns, plain, rendered)
        return plain, literals, _rebuild(rendered, literals, turns)
    except UserError:
        heads = [_head(str(tokenizer.get_chat_template()), turn["content"]) for turn in turns]
        if heads == plain:
            raise
        with suppress(UserError):
            literals = _literals(tokenizer, turns, heads, rendered)
            return heads, literals, _rebuild(rendered, literals, turns)
        raise


def _head(template: str, content: str) -> str:
    """The text up to the last closing tag that the template names, without white space in front."""
    tags = [match for match in CLOSING_TAG.finditer(content) if match.group() in template]
    if not tags:
        return ""
    answer = content[tags[-1].end() :]
    return content[: len(content) - len(answer.lstrip())].lstrip()


def _literals(tokenizer: Tokenizer, turns: list[dict[str, str]], heads: list[str], rendered: str) -> list[str]:
    """What the template writes before, between and after the contents: one string more than messages.

    heads: what the sentinel of each content begins with.
    """
    marker = "CONTENT"
    while marker in rendered:
        marker += "X"
    sentinels = [f"{head}{marker}{index}END" for index, head in zip(range(len(turns)), heads, strict=False)]
    marked = [{**turn, "content": sentinel} for turn, sentinel in zip(turns, sentinels, strict=True)]
    rest = _render(tokenizer, marked)
    literals = []
    for index, sentinel in enumerate(sentinels):
        before, found, rest = rest.partition(sentinel)
        if not found or sentinel in rest:
            raise UserError(
                f"the chat template drops, repeats, moves or changes the content of message {index} "
                f"({turns[index]['role']}), so roles cannot be assigned; remove such records"
            )
        literals.append(before)
    return [*literals, rest]


def _rebuild(rendered: str, literals: list[str], turns: list[dict[str, str]]) -> list[tuple[int, int]]:
    """Start and stop of each content in the rendering, such that literal, content, literal, ... rebuild it exactly.

    Templates strip white space, and a stripped content may fit where the raw one fails later. So all positions that can be
    reached are followed, the raw content first.
    """
    reached = {len(literals[0]): (0, 0)} if rendered.startswith(literals[0]) else {}
    steps = []
    for index, turn in enumerate(turns):
        content, literal, positions = turn["content"], literals[index + 1], list(reached)
        reached = {}
        for start in positions:
            for text in (content, content.strip(), content.lstrip(), content.rstrip()):
                stop = start + len(text)
                if rendered.startswith(text, start) and rendered.startswith(literal, stop):
                    reached.setdefault(stop + len(literal), (start, stop))
        if not reached or (index == len(turns) - 1 and len(rendered) not in reached):
            found = rendered[positions[0] : positions[0] + 60] if positions else rendered[:60]
            raise UserError(
                f"the chat template drops or changes text at message {index} ({turn['role']}): the content starts with "
                f"{content[:60]!r}, but the rendering continues with {found!r}; remove such records"
            )
        steps.append(reached)
    spans, end = [], len(rendered)
    for step in reversed(steps):
        spans.append(step[end])
        end = step[end][0]
    return spans[::-1]


def _label_characters(
    tokenizer: Tokenizer,
    turns: list[dict[str, str]],
    rendered: str,
    literals: list[str],
    spans: list[tuple[int, int]],
    closing: str,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Flags and turn of each character of the rendering, both `[character]`."""
    special = _special_pattern(tokenizer)
    flags = np.full(len(rendered), Flag.TEMPLATE, dtype=np.uint8)
    turn = np.full(len(rendered), -1, dtype=np.int64)
    opens = _preamble_length(literals[0], closing, special)
    for index, (start, stop) in enumerate(spans):
        literal, is_last = literals[index + 1], index == len(spans) - 1
        closes = stop + (len(literal) if is_last else _closing_length(literal, closing, special))
        turn[opens:closes] = index
        role = turns[index]["role"]
        flags[start:stop] = ROLE_FLAGS.get(role, 0)
        end_of_turn = special.search(rendered, stop, closes)
        if role == "assistant" and end_of_turn:
            flags[end_of_turn.start() : end_of_turn.end()] |= Flag.ASSISTANT.value
        opens = closes
    return flags, turn


def _closing(tokenizer: Tokenizer, turns: list[dict[str, str]], heads: list[str], rendered: str, literals: list[str]) -> str:
    """What the template writes after the last assistant message (or the last message) when nothing follows."""
    assistants = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not assistants or assistants[-1] == len(turns) - 1:
        return literals[-1]
    return _literals(tokenizer, turns[: assistants[-1] + 1], heads, rendered)[-1]


def _closing_length(literal: str, closing: str, special: re.Pattern[str]) -> int:
    """Number of characters of a literal between two contents that belong to the preceding turn."""
    pairs = zip(literal, closing, strict=False)
    common = next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(literal), len(closing)))
    first = special.search(closing)
    if first and common < first.end():
        return 0
    for match in special.finditer(literal):
        if match.start() < common < match.end():
            return match.start()
    return common


def _preamble_length(literal: str, closing: str, special: re.Pattern[str]) -> int:
    """Number of characters up to the end of a closed turn that the template writes before the first message."""
    at = literal.rfind(closing) if special.search(closing) else -1
    return at + len(closing) if at >= 0 else 0


def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches the text of each special token, the longest first."""
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(tokens - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _encode(tokenizer: Tokenizer, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Token ids, and where each token starts and stops in the text: three arrays `[token]`.

    The post-processor is removed meanwhile: byte-level ones (GPT-2, Llama 3) exclude white space from the offsets, so a token
    whose space is template would look like pure content. Without special tokens it adds no ids.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets, so roles cannot be assigned; "
            "load the fast tokenizer (tokenizer.json)"
        )
    backend = cast(Any, tokenizer).backend_tokenizer  # only fast tokenizers have it
    post_processor = backend.post_processor
    backend.post_processor = None
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    finally:
        backend.post_processor = post_processor
    if not encoded["input_ids"]:
        raise UserError("the chat template renders the conversation as an empty text; check the template")
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64)
    return np.asarray(encoded["input_ids"], dtype=np.int32), offsets[:, 0], offsets[:, 1]


def _label_tokens(
    character_flags: NDArray[np.uint8],
    character_turns: NDArray[np.int64],
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Flags of all the characters that a token covers, and the turn of the first: both `[token]`."""
    first = np.minimum(starts, len(character_flags) - 1)
    after = np.maximum(stops, first + 1)  # a token of no width counts as the character after it
    flags = np.zeros(len(starts), dtype=np.uint8)
    for flag in Flag:
        covered = np.concatenate([[0], np.cumsum((character_flags & flag.value) > 0)])
        flags[covered[after] > covered[first]] |= flag.value
    return flags, character_turns[first]


def _count_template_tokens(flags: NDArray[np.uint8], turn: NDArray[np.int64]) -> NDArray[np.int8]:
    """Index of each template token among those of its turn, -1 for others: `[token]`. Turns never decrease."""
    index = np.full(len(flags), -1, dtype=np.int64)
    at = np.flatnonzero(flags & Flag.TEMPLATE)
    index[at] = np.arange(len(at)) - np.searchsorted(turn[at], turn[at])
    return _narrow(index)


def _narrow(values: NDArray[np.int64]) -> NDArray[np.int8]:
    return np.minimum(values, INT8_MAX).astype(np.int8)
