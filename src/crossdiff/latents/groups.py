"""Groups of tokens: BOS, plain text, user, assistant, and each template token, per dataset.

A template token is identified by the role of its turn and its index among the template tokens of that turn (`text/chat.py`).
In a ChatML turn of the user, 0 is `<|im_start|>`, 1 is `user`, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.activations.store import Store
from crossdiff.text.chat import Flag
from crossdiff.text.token_texts import token_text

GROUPS = ("plain", "bos", "template", "user", "assistant")
"""Each token belongs to exactly one. A token with several flags counts as template before user or assistant."""
LAST_INDEX = 31
"""Template tokens of a turn share a cell from this index on, so that a long system prompt does not fill the table."""
ROLES = ("user", "assistant", "other", "before")
"""Roles of a template token's turn: `other` has another role or no content left, `before` precedes the first turn."""


@dataclass(frozen=True)
class Cells:
    """The cells of a store. A cell is a group of tokens in one dataset; only cells that occur are listed.

    Attributes:
        table: one row per cell: dataset, group, role, template_index, token.
        of_row: cell of each token of the store, `[row]`.
    """

    table: pl.DataFrame
    of_row: npt.NDArray[np.int64]


def group_of(flags: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Index into `GROUPS` of each token."""
    group = np.zeros(len(flags), dtype=np.int64)
    for name, flag in (("assistant", Flag.ASSISTANT), ("user", Flag.USER), ("template", Flag.TEMPLATE), ("bos", Flag.BOS)):
        group[(flags & flag) != 0] = GROUPS.index(name)
    return group


def cells_of(store: Store, tokenizer: Any) -> Cells:
    """Find the cells that occur in a store; the tokenizer names the cells of template tokens."""
    flags = store.column("flags")
    turn = store.column("turn").astype(np.int64)
    dataset = store.column("dataset").astype(np.int64)
    ids = store.column("token_id")
    group = group_of(flags)
    template = GROUPS.index("template")
    role = np.where(group == template, _role_of_turns(store, flags, turn), 0)
    index = np.where(group == template, np.minimum(store.column("template_index"), LAST_INDEX), 0).astype(np.int64)
    shape = (len(store.datasets), len(GROUPS), len(ROLES), LAST_INDEX + 1)
    codes, of_row = np.unique(np.ravel_multi_index((dataset, group, role, index), shape), return_inverse=True)
    rows = []
    for cell, parts in enumerate(zip(*np.unravel_index(codes, shape), strict=True)):
        which_dataset, which_group, which_role, number = (int(part) for part in parts)
        row: dict[str, Any] = {"dataset": store.datasets[which_dataset], "group": GROUPS[which_group]}
        if which_group == template:
            token = token_text(tokenizer, int(np.bincount(ids[of_row == cell]).argmax())).text
            row |= {"role": ROLES[which_role], "template_index": number, "token": token}
        rows.append(row)
    schema = {"dataset": pl.String, "group": pl.String, "role": pl.String, "template_index": pl.Int64, "token": pl.String}
    return Cells(pl.DataFrame(rows, schema=schema), of_row)


def _role_of_turns(store: Store, flags: npt.NDArray[np.uint8], turn: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Index into `ROLES` of each token's turn: the role of the content in that turn."""
    key = store.column("sequence").astype(np.int64) * 256 + turn + 1
    role = np.full(len(flags), ROLES.index("other"), dtype=np.int64)
    for name, flag in (("user", Flag.USER), ("assistant", Flag.ASSISTANT)):
        role[np.isin(key, key[(flags & flag) != 0])] = ROLES.index(name)
    role[turn < 0] = ROLES.index("before")
    return role
