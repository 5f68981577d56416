"""A store's conversations, the tokens on which the causal test measures KL, and the mean difference between the models."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch.nn.utils.rnn import pad_sequence

from crossdiff.activations.store import Store
from crossdiff.activations.transfer import CPU
from crossdiff.errors import UserError
from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.shapes import Float64, Int, Tensor
from crossdiff.sources import SOURCES
from crossdiff.text.chat import Flag
from crossdiff.text.sequences import TokenSequence

SPANS = ("first", "2_to_10", "from_11")
"""Spans of an assistant's message: its first token (predicted at the last template token), tokens 2 to 10, tokens from 11 on.
Together they are the `response`, including the special token that closes the message."""
RESPONSE = "response"


class MeasuredConversations(NamedTuple):
    """Conversations with at least one assistant token to predict, in an order that depends only on their tokens.

    Attributes:
        n_without_assistant: number of conversations skipped because they have no such token within max_length.
    """

    sequences: tuple[TokenSequence, ...]
    n_without_assistant: int


def number_in_message(flags: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The number of each token in its message of the assistant's, from 1; 0 for other tokens."""
    assistant = (flags & Flag.ASSISTANT) != 0
    at = np.arange(len(flags))
    starts = assistant & ~np.concatenate([[False], assistant[:-1]])
    return np.where(assistant, at - np.maximum.accumulate(np.where(starts, at, -1)) + 1, 0)


def span_of(flags: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """For each token, the index in `SPANS` of the next token; -1 if the next token is not the assistant's."""
    number = number_in_message(flags)
    span = np.where(number > 0, np.searchsorted([2, 11], number, side="right"), -1)
    return np.concatenate([span[1:], [-1]])


def read_conversations(store: Store, split: str, limit: int | None, seed: int) -> MeasuredConversations:
    """The conversations of a split; at most `limit` of them, chosen and ordered by a digest of their tokens.

    The order of the documents in the store does not matter.
    """
    is_wanted = (pl.col("split") == split) & (pl.col("n_messages") > 0) & (pl.col("n_tokens") > 0)
    wanted = set(store.documents.filter(is_wanted)["document"].to_list())
    columns = {name: store.column(name) for name in ("document", "token_id", "flags", "template_index", "turn", "dataset")}
    found: list[tuple[str, TokenSequence]] = []
    n_without_assistant = 0
    for first, last in pairwise(store.sequences()):
        document = int(columns["document"][first])
        if document not in wanted:
            continue
        part = {name: values[first:last] for name, values in columns.items()}
        if (span_of(part["flags"]) < 0).all():
            n_without_assistant += 1
            continue
        sequence = TokenSequence(
            document, part["token_id"], part["flags"], part["template_index"], part["turn"], int(part["dataset"][0])
        )
        digest = hashlib.sha256(f"{seed}".encode() + sequence.token_ids.tobytes()).hexdigest()
        found.append((digest, sequence))
    if not found:
        raise UserError(
            f"the {split!r} split of {store.folder} has no conversation with an assistant's turn ({n_without_assistant} "
            "without one); harvest conversations with a held-out share, or set causal.split to train"
        )
    found.sort(key=lambda entry: (entry[0], entry[1].document))
    return MeasuredConversations(tuple(sequence for _, sequence in found[:limit]), n_without_assistant)


def pad_column(columns: list[npt.NDArray[np.int64]], fill: int, device: torch.device) -> Int[Tensor, "sequence position"]:
    """Per-token integers of several sequences, right-padded with `fill`."""
    return pad_sequence([torch.from_numpy(column) for column in columns], batch_first=True, padding_value=fill).to(device)


def pad(batch: list[TokenSequence], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded token ids and attention mask, `[sequence, position]`."""
    ids = pad_column([sequence.token_ids.astype(np.int64) for sequence in batch], pad_id, device)
    mask = pad_column([np.ones(len(sequence.token_ids), np.int64) for sequence in batch], 0, device)
    return ids, mask


def training_rows(store: Store) -> npt.NDArray[np.int64]:
    """Rows of the store with tokens of the training conversations that count."""
    is_training = (pl.col("split") == "train") & (pl.col("n_messages") > 0)
    documents = store.documents.filter(is_training)["document"].to_numpy()
    rows = np.flatnonzero(np.isin(store.column("document"), documents) & store.counted)
    if not len(rows):
        raise UserError(
            f"{store.folder} has no training conversations, which mean differences, principal directions and contributions are "
            "computed from; harvest some, or omit the interventions with mean_difference or principal and the ranking "
            "contribution"
        )
    return rows


def mean_differences(
    store: Store, batch_tokens: int, device: torch.device = CPU, between: tuple[str, str] = SOURCES
) -> Float64[Tensor, "group d_model"]:
    """Mean of h^chat - h^base over the training conversations: one row per group in `GROUPS`, then one over all tokens.

    A group that does not occur gets the mean over all tokens. They are computed on `device`, and come to the host.
    """
    rows = training_rows(store)
    group = group_of(store.column("flags")[rows])
    base, chat = (store.sources.index(name) for name in between)
    total = torch.zeros(len(GROUPS), store.d_model, dtype=torch.float64, device=device)
    for first in range(0, len(rows), batch_tokens):
        part = slice(first, first + batch_tokens)
        h = store.gather(rows[part]).to(device).double()
        total.index_add_(0, torch.from_numpy(group[part]).to(device), h[:, chat] - h[:, base])
    total = total.cpu()
    counts = torch.from_numpy(np.bincount(group, minlength=len(GROUPS))).unsqueeze(1)
    overall = total.sum(0, keepdim=True) / counts.sum()
    return torch.cat([torch.where(counts > 0, total / counts.clamp(min=1), overall), overall])


def principal_directions(
    store: Store, batch_tokens: int, device: torch.device = CPU, between: tuple[str, str] = SOURCES
) -> Float64[Tensor, "component d_model"]:
    """Unit eigenvectors of the covariance of h^chat - h^base over the training conversations, the largest variance first.

    They are computed on `device`, and come to the host.
    """
    rows = training_rows(store)
    base, chat = (store.sources.index(name) for name in between)
    total = torch.zeros(store.d_model, dtype=torch.float64, device=device)
    squares = torch.zeros(store.d_model, store.d_model, dtype=torch.float64, device=device)
    for first in range(0, len(rows), batch_tokens):
        h = store.gather(rows[first : first + batch_tokens]).to(device).double()
        difference = h[:, chat] - h[:, base]
        total += difference.sum(0)
        squares += difference.T @ difference
    mean = total / len(rows)
    vectors = torch.linalg.eigh(squares / len(rows) - torch.outer(mean, mean)).eigenvectors
    largest_first: Tensor = vectors.T.flip(0).cpu().contiguous()
    return largest_first
