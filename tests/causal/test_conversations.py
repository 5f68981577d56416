"""Spans, and which conversations of a store are measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from crossdiff.activations.store import Store
from crossdiff.causal.contribution import contributions
from crossdiff.causal.conversations import (
    SPANS,
    mean_differences,
    number_in_message,
    principal_directions,
    read_conversations,
    span_of,
)
from crossdiff.config import DifferenceConfig, L1Config
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.crosscoder.view import identity, view_of
from crossdiff.errors import UserError
from crossdiff.latents.groups import GROUPS
from crossdiff.text.chat import Flag
from stores import make_store

B, T, U, A = Flag.BOS.value, Flag.TEMPLATE.value, Flag.USER.value, Flag.ASSISTANT.value


def test_spans_by_hand() -> None:
    # bos <user> a b <end> <assistant> 12 content tokens, the closing <end> (number 13)
    flags = np.array([B, T, U, U, T, T, *[A] * 12, A | T], dtype=np.uint8)
    span = span_of(flags)
    assert SPANS == ("first", "2_to_10", "from_11")
    # Position 5, the last template token, predicts the first content token (position 6).
    assert span.tolist() == [-1] * 5 + [0] + [1] * 9 + [2] * 3 + [-1]


def test_each_message_is_counted_from_1() -> None:
    flags = np.array([B, T, U, T, A, A | T, T, U, T, A, A, A | T], dtype=np.uint8)
    assert span_of(flags).tolist() == [-1, -1, -1, 0, 1, -1, -1, -1, 0, 1, 1, -1]
    assert number_in_message(flags).tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 0, 1, 2, 3]


def test_an_assistant_that_opens_the_text_is_not_predicted() -> None:
    assert span_of(np.array([A, A, T], dtype=np.uint8)).tolist() == [1, -1, -1]
    assert span_of(np.array([U, T], dtype=np.uint8)).tolist() == [-1, -1]


def chat_store(folder: Path, flags: torch.Tensor, heldout: float = 0.5) -> Store:
    """A store of conversations with the given flags for each sequence; activations are random."""
    from safetensors.torch import load_file, save_file

    from crossdiff.files import read_json, sha256, write_json

    n_sequences, length = flags.shape
    h = torch.randn(n_sequences * length, 2, 4, generator=torch.Generator().manual_seed(0))
    make_store(folder, h, length=length, shard=n_sequences * length, heldout=heldout)
    tensors = load_file(folder / "shard-00000.safetensors")
    tensors["flags"] = flags.flatten().to(torch.uint8)
    tensors["token_id"] = (flags * 16 + torch.arange(length)).flatten().int()  # the content follows the flags
    save_file(tensors, folder / "shard-00000.safetensors")
    manifest = read_json(folder / "manifest.json")
    manifest["files"] = {}  # the documents change below
    manifest["shards"][0] |= {
        "bytes": (folder / "shard-00000.safetensors").stat().st_size,
        "sha256": sha256(folder / "shard-00000.safetensors"),
    }
    write_json(folder / "manifest.json", manifest)
    table = pl.read_parquet(folder / "documents.parquet").with_columns(n_messages=pl.lit(2, dtype=pl.Int32))
    table.write_parquet(folder / "documents.parquet")
    return Store(folder)


def test_conversations_of_a_split_are_read_and_those_without_an_assistant_counted(tmp_path: Path) -> None:
    with_assistant, without = [B, T, U, T, A, A], [B, T, U, U, U, T]
    store = chat_store(
        tmp_path, torch.tensor([with_assistant, without, with_assistant, without, with_assistant, with_assistant])
    )
    found = read_conversations(store, "heldout", None, seed=0)
    assert sorted(sequence.document for sequence in found.sequences) == [4, 5]
    assert found.n_without_assistant == 1
    assert found.sequences[0].token_ids.shape == (6,)
    one = read_conversations(store, "heldout", 1, seed=0)
    assert one.sequences[0].document == found.sequences[0].document


def test_without_an_assistant_it_says_so(tmp_path: Path) -> None:
    store = chat_store(tmp_path, torch.tensor([[B, T, U, U, U, T]] * 4))
    with pytest.raises(
        UserError, match=r"'heldout' split of .* has no conversation with an assistant's turn \(2 without one\)"
    ):
        read_conversations(store, "heldout", None, seed=0)


def test_mean_differences_against_a_loop(tmp_path: Path) -> None:
    flags = torch.tensor([[B, T, U, T, A, A]] * 4)
    store = chat_store(tmp_path, flags)
    got = mean_differences(store, batch_tokens=5)
    rows = [row for row in range(24) if row // 6 < 2 and row % 6 >= 1]  # two training sequences without their BOS
    h = store.gather(np.array(rows)).double()
    difference = h[:, 1] - h[:, 0]
    torch.testing.assert_close(got[-1], difference.mean(0))
    template = [index for index, row in enumerate(rows) if row % 6 in (1, 3)]
    torch.testing.assert_close(got[GROUPS.index("template")], difference[template].mean(0))
    torch.testing.assert_close(got[GROUPS.index("plain")], difference.mean(0))  # no such token: the mean over all


def test_principal_directions_against_a_singular_value_decomposition(tmp_path: Path) -> None:
    store = chat_store(tmp_path, torch.tensor([[B, T, U, T, A, A]] * 4))
    rows = [row for row in range(24) if row // 6 < 2 and row % 6 >= 1]  # two training sequences without their BOS
    h = store.gather(np.array(rows)).double()
    difference = h[:, 1] - h[:, 0]
    expected = torch.linalg.svd(difference - difference.mean(0)).Vh
    got = principal_directions(store, batch_tokens=3)
    torch.testing.assert_close((got * expected).sum(1).abs(), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("paired", [True, False])
def test_contributions_against_a_loop(tmp_path: Path, paired: bool) -> None:
    store = chat_store(tmp_path, torch.tensor([[B, T, U, T, A, A]] * 4))
    generator = torch.Generator().manual_seed(1)
    view = identity() if paired else view_of(DifferenceConfig(), ("base", "chat"))
    sources = 2 if paired else 1
    coder = replace(new_crosscoder(6, torch.zeros(sources, 4), 1.7, L1Config(), 1.0, 0), view=view)
    coder.decoder = torch.randn(6, sources * 4, generator=generator)
    rows = [row for row in range(24) if row // 6 < 2 and row % 6 >= 1]  # two training sequences without their BOS
    h = store.gather(np.array(rows))
    x = (h if paired else h[:, 1:] - h[:, :1]).flatten(1) * 1.7
    f = (x @ coder.encoder.T + coder.encoder_bias).clamp(min=0)
    direction = (coder.decoder[:, 4:] - coder.decoder[:, :4] if paired else coder.decoder) / 1.7
    expected = (f[:, :, None] * direction).square().sum(2).mean(0)
    assert float(expected.max()) > 0
    found = contributions(store, coder, batch_tokens=3)
    np.testing.assert_allclose(found["contribution"].to_numpy(), expected.numpy(), rtol=1e-5)
    assert found["n_active"].to_list() == (f > 0).sum(0).tolist()


def test_the_order_of_the_documents_decides_nothing(tmp_path: Path) -> None:
    kinds = [[B, T, U, T, A, A], [B, T, U, U, T, A], [B, T, T, A, A, A], [B, U, T, A, A, A]]
    chosen = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        store = chat_store(tmp_path / str(order[0]), torch.tensor([kinds[index] for index in order]), heldout=1.0)
        found = read_conversations(store, "heldout", 2, seed=0)
        chosen.append([sequence.token_ids.tolist() for sequence in found.sequences])
    assert chosen[0] == chosen[1]
