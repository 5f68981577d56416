"""Windows, cut conversations, and batches of like length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from crossdiff.errors import UserError
from crossdiff.text.chat import Flag
from crossdiff.text.documents import Document
from crossdiff.text.sequences import TokenSequence, bucketed, tokenise, tokenise_all

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
B, T, U, A = Flag.BOS, Flag.TEMPLATE, Flag.USER, Flag.ASSISTANT


def build(bos: str | None = "<bos>") -> Any:
    """One token a byte, and the special tokens <bos>, <end>, <user>, <assistant>: ids 0 to 3."""
    specials = ["<bos>", "<end>", "<user>", "<assistant>"]
    vocabulary = {piece: index for index, piece in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(specials)
    wrap: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    tokenizer = wrap(tokenizer_object=bpe, bos_token=bos, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def plain(text: str) -> Document:
    return Document(7, 2, text, None, "train", None, None)


def spell(tokenizer: Any, sequences: list[TokenSequence]) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(sequence.token_ids) for sequence in sequences]


def test_windows_have_a_bos_in_front_and_the_last_one_is_shorter() -> None:
    tokenizer = build()
    sequences = tokenise(plain("abcdefgh"), tokenizer, 4)
    assert spell(tokenizer, sequences) == [["<bos>", *"abc"], ["<bos>", *"def"], ["<bos>", *"gh"]]
    for sequence in sequences:
        length = len(sequence.token_ids)
        assert (sequence.document, sequence.dataset) == (7, 2)
        assert sequence.flags.tolist() == [B] + [0] * (length - 1)
        assert sequence.template_index.tolist() == sequence.turn.tolist() == [-1] * length
        arrays = (sequence.token_ids, sequence.flags, sequence.template_index, sequence.turn)
        assert [array.dtype for array in arrays] == [np.int32, np.uint8, np.int8, np.int8]


def test_windows_without_bos() -> None:
    tokenizer = build(bos=None)
    sequences = tokenise(plain("abcdefgh"), tokenizer, 4)
    assert spell(tokenizer, sequences) == [[*"abcd"], [*"efgh"]]
    assert [sequence.flags.tolist() for sequence in sequences] == [[0] * 4, [0] * 4]
    assert spell(tokenizer, tokenise(plain("ab"), tokenizer, 1)) == [["a"], ["b"]]


def test_special_tokens_in_plain_text_are_split_and_those_of_chats_are_not() -> None:
    tokenizer = build()
    assert spell(tokenizer, tokenise(plain("a<end>"), tokenizer, 9)) == [["<bos>", "a", *"<end>"]]
    # Reading plain text leaves no trace in the tokenizer: the chat after it is read as before.
    chat = Document(0, 0, None, [{"role": "user", "content": "a<end>"}], "train", None, None)
    (sequence,) = tokenise(chat, tokenizer, 9)
    assert spell(tokenizer, [sequence]) == [["<bos>", "<user>", "a", "<end>", "<end>"]]
    assert sequence.flags.tolist() == [B, T, U, U, T]


def test_a_conversation_is_one_sequence_cut_off_at_the_end() -> None:
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    document = Document(3, 1, None, messages, "heldout", "x", None)
    (whole,) = tokenise(document, build(), 99)
    # <bos> <user> a b <end> <assistant> c d <end>
    assert whole.flags.tolist() == [B, T, U, U, T, T, A, A, T | A]
    (cut,) = tokenise(document, build(), 7)
    assert (cut.document, cut.dataset) == (3, 1)
    assert cut.token_ids.tolist() == whole.token_ids[:7].tolist()
    assert cut.flags.tolist() == [B, T, U, U, T, T, A]
    assert cut.template_index.tolist() == [-1, 0, -1, -1, 1, 0, -1]
    assert cut.turn.tolist() == [-1, 0, 0, 0, 0, 1, 1]
    assert (whole.assistant_lost, cut.assistant_lost) == (0, 2)  # the answer's second letter and its <end>


def test_documents_tokenised_together_are_those_tokenised_alone() -> None:
    tokenizer, refused = build(), 0
    chats: list[Any] = [[{"role": "user", "content": "ab"}], [{"role": "user", "content": "x"}, {"role": "user"}], []]
    mixed = [(f"text {number}" * (number % 3), None) if number % 4 else (None, chats[number % 3]) for number in range(300)]
    documents = [Document(n, 0, text, chat, "train", None, None) for n, (text, chat) in enumerate(mixed)]
    found = list(tokenise_all(documents, tokenizer, 6))
    assert [document for document, _ in found] == documents
    for document, parts in found:
        if document.messages is not None and document.messages != chats[0]:
            assert isinstance(parts, UserError)
            refused += 1
            continue
        assert not isinstance(parts, UserError)
        alone = tokenise(document, tokenizer, 6)
        assert [part.token_ids.tolist() for part in parts] == [part.token_ids.tolist() for part in alone]
        assert [part.flags.tolist() for part in parts] == [part.flags.tolist() for part in alone]
        assert all(part.document == document.number for part in parts)
    assert refused == 50  # of 75 conversations, numbers 0, 4, 8, ..., every third is whole


def test_a_text_without_tokens_has_no_window() -> None:
    assert tokenise(plain(""), build(), 4) == []


def test_errors_name_the_document_and_what_to_do() -> None:
    tokenizer = build()
    with pytest.raises(UserError, match=r"max_length is 1.*give 2 or more"):
        tokenise(plain("a"), tokenizer, 1)
    tokenizer.chat_template = None
    chat = Document(5, 1, None, [{"role": "user", "content": "a"}], "train", None, None)
    with pytest.raises(UserError, match=r"document 5 \(of dataset 1\): .*no chat template"):
        tokenise(chat, tokenizer, 9)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.integers(2, 9))
def test_windows_joined_are_the_text(text: str, max_length: int) -> None:
    tokenizer = build()
    sequences = tokenise(plain(text), tokenizer, max_length)
    assert all(len(sequence.token_ids) == max_length for sequence in sequences[:-1])
    assert all(1 < len(sequence.token_ids) <= max_length for sequence in sequences)
    assert all(sequence.token_ids[0] == 0 for sequence in sequences)
    joined = [piece for sequence in sequences for piece in sequence.token_ids[1:].tolist()]
    assert len(joined) == len(text.encode())
    assert tokenizer.decode(joined) == text


def sized(*lengths: int) -> list[TokenSequence]:
    """Sequences of these lengths, numbered in order."""
    sequences = []
    for number, length in enumerate(lengths):
        none = np.full(length, -1, dtype=np.int8)
        ids, flags = np.zeros(length, dtype=np.int32), np.zeros(length, dtype=np.uint8)
        sequences.append(TokenSequence(number, ids, flags, none, none, 0))
    return sequences


def numbers(batches: list[list[TokenSequence]]) -> list[list[int]]:
    return [[sequence.document for sequence in batch] for batch in batches]


def test_batches_hold_sequences_of_like_length() -> None:
    # Sorted: 9 8 4 4 3 3 2. Of length 9, two fit into 20 or 19; of length 4, five fit into 20 and four into 19.
    batches = bucketed(iter(sized(3, 9, 4, 2, 8, 4, 3)), 20, 7)
    assert numbers(list(batches)) == [[1, 4], [2, 5, 0, 6, 3]]
    batches = bucketed(iter(sized(3, 9, 4, 2, 8, 4, 3)), 19, 7)
    assert numbers(list(batches)) == [[1, 4], [2, 5, 0, 6], [3]]


def test_a_pool_is_sorted_by_itself_and_read_when_needed() -> None:
    stream = iter(sized(1, 3, 2, 3))
    batches = bucketed(stream, 3, 2)
    assert numbers([next(batches)]) == [[1]]
    assert next(stream).document == 2  # the second pool is still to come
    assert numbers(list(bucketed(sized(1, 3, 2, 3), 3, 2))) == [[1], [0], [3], [2]]


def test_limits_of_batches() -> None:
    assert list(bucketed(iter([]), 5, 2)) == []
    with pytest.raises(UserError, match="sequence of 6 tokens does not fit into batch_tokens = 5"):
        list(bucketed(iter(sized(6)), 5, 2))
    with pytest.raises(ValueError, match="pool must be at least 1, found 0"):
        list(bucketed(iter(sized(1)), 5, 0))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 120), st.integers(1, 20))
def test_bucketing_loses_nothing(lengths: list[int], batch_tokens: int, pool: int) -> None:
    batches = list(bucketed(iter(sized(*lengths)), batch_tokens, pool))
    assert sorted(number for batch in numbers(batches) for number in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 0 < len(batch) * max(len(sequence.token_ids) for sequence in batch) <= batch_tokens
    assert numbers(batches) == numbers(list(bucketed(iter(sized(*lengths)), batch_tokens, pool)))


def test_padding_waste_is_small() -> None:
    lengths = np.random.default_rng(0).integers(5, 256, size=1000).tolist()
    batches = list(bucketed(iter(sized(*lengths)), 8192, 500))
    padded = sum(len(batch) * max(len(sequence.token_ids) for sequence in batch) for batch in batches)
    assert sum(lengths) / padded > 0.9  # batches in the order of the stream: 0.5
