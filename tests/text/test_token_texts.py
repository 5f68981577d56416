"""Tokens that are parts of a character: exact with byte-level BPE and with byte fallback, and never a replacement character."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from crossdiff.text.token_texts import TokenText, characters, token_text, written

TEXT = "the café \N{GRINNING FACE} \N{ARABIC LETTER SEEN}\N{ARABIC LETTER LAM} é"


def byte_level() -> Any:
    """Every byte is a token, and so is "Ġ" + the first byte of "é" (as byte-level BPE merges them)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, "ĠÃ"])}, [("Ġ", "Ã")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def byte_fallback() -> Any:
    """SentencePiece as Llama uses it: letters and "▁" are tokens, everything else is bytes; the first space is left out."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecaf"]
    bpe = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, [], byte_fallback=True, unk_token="<unk>")
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    bpe.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte-level BPE", "byte fallback"])
def test_tokens_of_one_character_are_joined_exactly(tokenizer: Any) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    tokens = [token_text(tokenizer, each) for each in ids]
    groups = list(characters(tokens))
    assert "".join(text for _, text in groups) == TEXT
    assert [at for group, _ in groups for at in range(group.start, group.stop)] == list(range(len(ids)))
    # The emoji is 4 bytes, and each of them a token.
    assert next(group.stop - group.start for group, text in groups if text == "\N{GRINNING FACE}") == 4
    assert not any("\N{REPLACEMENT CHARACTER}" in token.text for token in tokens)


def test_a_part_alone_is_shown_as_bytes() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(" é", add_special_tokens=False)
    first, second = (token_text(tokenizer, each) for each in ids)
    assert first == TokenText(" <0xC3>", b" \xc3") and second == TokenText("<0xA9>", b"\xa9")
    assert list(characters([first, second])) == [(slice(0, 2), " é")]
    assert list(characters([second, first])) == [(slice(0, 1), "<0xA9>"), (slice(1, 2), " <0xC3>")]


def test_the_replacement_character_itself_is_whole() -> None:
    tokenizer = byte_fallback()
    tokenizer.add_tokens(["\N{REPLACEMENT CHARACTER}"])
    assert token_text(tokenizer, len(tokenizer) - 1) == TokenText("\N{REPLACEMENT CHARACTER}")


@given(st.binary(max_size=40), st.data())
def test_any_bytes_cut_anywhere_keep_their_characters(data: bytes, draws: st.DataObject) -> None:
    cuts = sorted(draws.draw(st.sets(st.integers(0, len(data)))) | {0, len(data)})
    parts = [data[first:end] for first, end in pairwise(cuts)]
    # What is whole has no bytes, as token_text gives it; the oracle decodes all the bytes at once.
    tokens = [TokenText(written(part), b"" if part.decode("utf-8", "ignore").encode() == part else part) for part in parts]
    groups = list(characters(tokens))
    assert "".join(text for _, text in groups) == written(data)
    for group, text in groups:
        assert text == written(b"".join(parts[group]))
