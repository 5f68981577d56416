"""The text of single tokens, and which tokens together make one character.

A byte-level BPE or a SentencePiece vocabulary with byte fallback may cut a character ("é", an emoji) into several tokens.
Such a token has no text of its own: it has bytes, which are kept and decoded together with those of its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MOST_BYTES = 4
"""Bytes of the longest characters in UTF-8, hence the most tokens that can share one."""
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText(NamedTuple):
    """A token by itself: its text, in which bytes that are not a whole character stand as `<0xE2>`.

    `data` has all bytes of such a token; it is empty for the others.
    """

    text: str
    data: bytes = b""

    @property
    def encoded(self) -> bytes:
        """The bytes of the token in UTF-8."""
        return self.data or self.text.encode("utf-8", "surrogatepass")


def token_text(tokenizer: Any, token_id: int) -> TokenText:
    """The text of one token, with the space before it that some tokenizers leave out at the start of a text."""
    alone = str(tokenizer.decode([token_id]))
    if REPLACEMENT in alone:
        data = _bytes_of(tokenizer, token_id)
        # The token may also be the replacement character itself, whose bytes are whole.
        return TokenText(alone) if data is None or _is_whole(data) else TokenText(written(data), data)
    second = str(tokenizer.decode([token_id, token_id]))[len(alone) :]
    return TokenText(second if second.endswith(alone) else alone)


def _bytes_of(tokenizer: Any, token_id: int) -> bytes | None:
    """The bytes of a token; None if the vocabulary does not tell them."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if isinstance(token, bytes):
        return token
    if not isinstance(token, str):
        return None
    if found := _FALLBACK.fullmatch(token):
        return bytes.fromhex(found[1])
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return None


def _byte_level_alphabet() -> dict[str, int]:
    """The byte of each character of byte-level BPE (GPT-2): printable bytes stand for themselves, the others follow at 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def written(data: bytes) -> str:
    """Bytes as text; those that are not a whole character as `<0xE2>`."""
    text = data.decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(each) - 0xDC00:02X}>" if "\udc80" <= each <= "\udcff" else each for each in text)


def characters(tokens: Sequence[TokenText]) -> Iterator[tuple[slice, str]]:
    """The tokens in groups, in order, with the text of each: one token per group, or several that share a character."""
    if not any(token.data for token in tokens):
        yield from ((slice(at, at + 1), token.text) for at, token in enumerate(tokens))
        return
    ends, end = [], 0
    for token in tokens:
        end += len(token.encoded)
        ends.append(end)
    whole = b"".join(token.encoded for token in tokens)
    inside = _inside_characters(whole)
    first = 0
    for index, token in enumerate(tokens):
        if ends[index] in inside:
            continue
        if index == first:
            yield slice(first, index + 1), token.text
        else:
            yield slice(first, index + 1), written(whole[ends[first] - len(tokens[first].encoded) : ends[index]])
        first = index + 1


def character_at(tokens: Sequence[TokenText], position: int) -> tuple[slice, str]:
    """The group of `characters` that a token belongs to."""
    return next((at, text) for at, text in characters(tokens) if at.start <= position < at.stop)


def _inside_characters(data: bytes) -> frozenset[int]:
    """The offsets at which a cut would divide a character. A byte that belongs to no character stands alone."""
    found: set[int] = set()
    at = 0
    for character in data.decode("utf-8", "surrogateescape"):
        length = len(character.encode("utf-8", "surrogateescape"))
        found.update(range(at + 1, at + length))
        at += length
    return frozenset(found)
