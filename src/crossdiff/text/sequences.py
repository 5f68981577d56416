"""Documents as token sequences of bounded length, and batches of sequences of similar length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from crossdiff.errors import UserError
from crossdiff.text.chat import Flag, Tokenizer, front_ids, tokenise_chat
from crossdiff.text.documents import Document
from crossdiff.text.templates import TemplateLimit

CHUNK = 128
"""Number of documents that are tokenised together."""
LOST_SHARE = 0.05
"""From this share of the assistant's tokens beyond max_length on, a harvest and its report warn."""
POOL = 2048
"""Number of sequences that are sorted by length together: enough for batches with less than 5% padding."""


@dataclass(eq=False)
class TokenSequence:
    """A sequence that a model reads at once; every array has the shape `[token]`.

    document, dataset: as in `Document`. flags, template_index, turn: as in `TokenisedChat`; 0, -1, -1 in plain text.
    assistant_lost: number of the assistant's tokens of a conversation beyond max_length.
    """

    document: int
    token_ids: NDArray[np.int32]
    flags: NDArray[np.uint8]
    template_index: NDArray[np.int8]
    turn: NDArray[np.int8]
    dataset: int
    assistant_lost: int = 0


def tokenise_all(
    documents: Iterable[Document], tokenizer: Tokenizer, max_length: int
) -> Iterator[tuple[Document, list[TokenSequence] | UserError]]:
    """Tokenise documents like `tokenise`, in order, with several plain texts per call of the tokenizer.

    A conversation that cannot be tokenised comes with the error, which does not name it, in place of its sequence. A template
    that exceeds its limits is raised.
    """
    stream, front = iter(documents), front_ids(tokenizer)
    while chunk := list(islice(stream, CHUNK)):
        texts = [document.text for document in chunk if document.text is not None]
        encoded = iter(_encode(texts, tokenizer))
        for document in chunk:
            if document.text is not None:
                yield document, _windows(document, next(encoded), front, max_length)
                continue
            try:
                yield document, [_conversation(document, tokenizer, max_length)]
            except TemplateLimit:  # the template is at fault, not this conversation
                raise
            except UserError as error:
                yield document, error


def tokenise(document: Document, tokenizer: Tokenizer, max_length: int) -> list[TokenSequence]:
    """Cut a plain text into consecutive windows of `max_length` tokens, or truncate a conversation to that many.

    Each window starts with the BOS (`front_ids`), if there is one, which counts; the last window may be shorter, and a text
    without tokens has no window. The text of a special token inside plain text is tokenised like any other text.
    """
    if document.text is None:
        try:
            return [_conversation(document, tokenizer, max_length)]
        except UserError as error:
            raise UserError(f"document {document.number} (of dataset {document.dataset}): {error}") from error
    return _windows(document, _encode([document.text], tokenizer)[0], front_ids(tokenizer), max_length)


def _conversation(document: Document, tokenizer: Tokenizer, max_length: int) -> TokenSequence:
    assert document.messages is not None
    chat = tokenise_chat(tokenizer, document.messages)
    kept = slice(max_length)
    arrays = (chat.token_ids[kept], chat.flags[kept], chat.template_index[kept], chat.turn[kept])
    lost = int(np.count_nonzero(chat.flags[max_length:] & Flag.ASSISTANT))
    return TokenSequence(document.number, *arrays, document.dataset, lost)


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False, return_attention_mask=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _windows(document: Document, token_ids: list[int], front: list[int], max_length: int) -> list[TokenSequence]:
    ids = np.asarray(token_ids, dtype=np.int32)
    before = np.array(front, dtype=np.int32)
    room = max_length - len(front)
    if room < 1:
        raise UserError(
            f"max_length is {max_length}, but a sequence needs a token after the BOS; give {len(front) + 1} or more"
        )
    windows = (np.concatenate([before, ids[start : start + room]]) for start in range(0, len(ids), room))
    return [_plain(document, window, len(front)) for window in windows]


def _plain(document: Document, token_ids: NDArray[np.int32], n_front: int) -> TokenSequence:
    flags = np.zeros(len(token_ids), dtype=np.uint8)
    flags[:n_front] = Flag.BOS
    none = np.full(len(token_ids), -1, dtype=np.int8)
    return TokenSequence(document.number, token_ids, flags, none, none.copy(), document.dataset)


def bucketed(sequences: Iterable[TokenSequence], batch_tokens: int, pool: int) -> Iterator[list[TokenSequence]]:
    """Batches whose padded size (number of sequences times longest length) is at most `batch_tokens`.

    `pool` sequences at a time are sorted, longest first, and cut into batches as large as possible. Each sequence is in one
    batch, and the same input gives the same batches.
    """
    if pool < 1:
        raise ValueError(f"pool must be at least 1, found {pool}")
    stream = iter(sequences)
    while pooled := sorted(islice(stream, pool), key=lambda sequence: -len(sequence.token_ids)):
        for first, last in _cut([len(sequence.token_ids) for sequence in pooled], batch_tokens):
            yield pooled[first:last]


def batch_bounds(lengths: NDArray[np.int64], batch_tokens: int, pool: int) -> NDArray[np.int64]:
    """Bounds of the batches of `bucketed`, from the lengths of its sequences in their order of output."""
    bounds = [0]
    for start in range(0, len(lengths), pool):
        bounds += [start + last for _, last in _cut(lengths[start : start + pool].tolist(), batch_tokens)]
    return np.array(bounds, dtype=np.int64)


def _cut(lengths: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, int]]:
    """The largest ranges that fit, for decreasing lengths."""
    at = 0
    while at < len(lengths):
        longest = lengths[at]
        if longest > batch_tokens:
            raise UserError(
                f"a sequence of {longest} tokens does not fit into batch_tokens = {batch_tokens}; "
                "raise batch_tokens or lower max_length"
            )
        last = min(len(lengths), at + batch_tokens // max(longest, 1))
        yield at, last
        at = last
