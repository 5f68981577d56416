"""The conversations of a store, and which of their tokens the causal test measures (METHOD: causal test, the spans)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.activations.store import Store
from crossdiff.errors import UserError
from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.shapes import Float64, Int, Tensor
from crossdiff.text.chat import Flag
from crossdiff.text.sequences import TokenSequence

SPANS = ("first", "2_to_10", "from_11")
"""Parts of an assistant's message, by the number of the token in it: 1, 2 to 10, 11 and on. The first is predicted at the
last template token. Together they are the `response`; the special token that closes the message is its last token."""
RESPONSE = "response"


@dataclass(frozen=True)
class Conversations:
    """Conversations with at least one token to predict, in an order that their content decides.

    n_without_assistant: how many others were skipped because no assistant speaks in them (after cutting to max_length).
    """

    sequences: tuple[TokenSequence, ...]
    n_without_assistant: int


def span_of(flags: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """For each token, the index in `SPANS` of the token that comes next; -1 where that is not the assistant's."""
    assistant = (flags & Flag.ASSISTANT) != 0
    at = np.arange(len(flags))
    starts = assistant & ~np.concatenate([[False], assistant[:-1]])
    number = at - np.maximum.accumulate(np.where(starts, at, -1)) + 1  # within the message, from 1
    span = np.where(assistant, np.searchsorted([2, 11], number, side="right"), -1)
    return np.concatenate([span[1:], [-1]])


def read_conversations(store: Store, split: str, limit: int | None, seed: int) -> Conversations:
    """The conversations of a split; at most `limit` of them, chosen and ordered by a digest of their tokens.

    The order of the documents in the store has no influence on which are chosen nor on any number made from them.

    Raises:
        UserError: there are none with an assistant's turn.
    """
    wanted = store.documents.filter((pl.col("split") == split) & (pl.col("n_messages") > 0) & (pl.col("n_tokens") > 0))
    members = set(wanted["document"].to_list())
    bounds = store.sequences()
    columns = {name: store.column(name) for name in ("document", "token_id", "flags", "template_index", "turn", "dataset")}
    found: list[tuple[str, TokenSequence]] = []
    n_silent = 0
    for first, last in pairwise(bounds):
        document = int(columns["document"][first])
        if document not in members:
            continue
        part = {name: values[first:last] for name, values in columns.items()}
        if (span_of(part["flags"]) < 0).all():
            n_silent += 1
            continue
        sequence = TokenSequence(
            document, part["token_id"], part["flags"], part["template_index"], part["turn"], int(part["dataset"][0])
        )
        digest = hashlib.sha256(f"{seed}".encode() + sequence.token_ids.tobytes()).hexdigest()
        found.append((digest, sequence))
    if not found:
        raise UserError(
            f"the split {split!r} of {store.folder} has no conversation in which an assistant speaks ({n_silent} without); "
            "harvest conversations with a held-out share, or set causal.split to train"
        )
    found.sort(key=lambda entry: (entry[0], entry[1].document))
    return Conversations(tuple(sequence for _, sequence in found[:limit]), n_silent)


def pad(batch: list[TokenSequence], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded token ids and attention mask `[sequence, position]`."""
    longest = max(len(sequence.token_ids) for sequence in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence.token_ids)] = torch.from_numpy(sequence.token_ids.astype(np.int64))
        mask[row, : len(sequence.token_ids)] = 1
    return ids.to(device), mask.to(device)


def pad_column(columns: list[npt.NDArray[np.int64]], fill: int, device: torch.device) -> Int[Tensor, "sequence position"]:
    """Per-token integers of several sequences, right-padded with `fill`."""
    out = torch.full((len(columns), max(map(len, columns))), fill, dtype=torch.long)
    for row, column in enumerate(columns):
        out[row, : len(column)] = torch.from_numpy(column)
    return out.to(device)


def training_rows(store: Store) -> npt.NDArray[np.int64]:
    """Rows of the store that are tokens of the training conversations, without the left-out positions.

    Raises:
        UserError: there are none.
    """
    members = store.documents.filter((pl.col("split") == "train") & (pl.col("n_messages") > 0))["document"].to_numpy()
    rows = np.flatnonzero(np.isin(store.column("document"), members) & (store.column("position") >= store.leave_out))
    if not len(rows):
        raise UserError(
            f"{store.folder} has no training conversations, from which mean differences are taken and contributions measured; "
            "harvest some, or leave out the interventions with mean_difference or the ranking contribution"
        )
    return rows


def mean_differences(store: Store, batch_tokens: int) -> Float64[Tensor, "group d_model"]:
    """Mean of h^chat - h^base over the training conversations: one row for each of `GROUPS`, and one over all at the end.

    A group that no training conversation has gets the mean over all.

    Raises:
        UserError: there are no training conversations.
    """
    rows = training_rows(store)
    group = group_of(store.column("flags")[rows])
    base, chat = store.sources.index("base"), store.sources.index("chat")
    total = torch.zeros(len(GROUPS), store.d_model, dtype=torch.float64)
    for first in range(0, len(rows), batch_tokens):
        part = slice(first, first + batch_tokens)
        h = store.gather(rows[part]).double()
        total.index_add_(0, torch.from_numpy(group[part]), h[:, chat] - h[:, base])
    counts = torch.from_numpy(np.bincount(group, minlength=len(GROUPS))).unsqueeze(1)
    overall = total.sum(0, keepdim=True) / counts.sum()
    return torch.cat([torch.where(counts > 0, total / counts.clamp(min=1), overall), overall])
