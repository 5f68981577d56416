"""Where each latent fires, in detail: BOS, plain text, user, assistant, and each template token, per dataset.

A template token is known by the role of its turn and its index among the template tokens of that turn (`text/chat.py`): in a
ChatML turn of the user, 0 is `<|im_start|>`, 1 is `user`, and so on. Memory: three numbers per cell and latent, however long
the store is; a cell is a group of tokens in a dataset, and only those that occur are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.activations.store import Store
from crossdiff.latents.activity import GROUPS, group_of
from crossdiff.latents.stream import Chunk
from crossdiff.ranks import Ranks
from crossdiff.shapes import Float, Float64, Int64, Tensor
from crossdiff.text.chat import Flag

LAST_INDEX = 31
"""Template tokens of a turn from this one on share a cell, so that a long system prompt does not fill the table."""
ROLES = ("user", "assistant", "other", "before")
"""Of a template token's turn: `other` has another role or no content that is left, `before` is in front of the first turn."""

COLUMNS = {
    "latent": "number of the latent",
    "dataset": "name of the dataset",
    "group": "plain, bos, template, user or assistant; a token with several flags counts as template first",
    "role": "of the turn of a template token: " + ", ".join(ROLES) + "; null for the other groups",
    "template_index": f"which of the template tokens of its turn, from 0; {LAST_INDEX} stands for all from there on",
    "token": "the most frequent token of a template cell, as text; null for the other groups",
    "n_tokens": "analysed tokens of the cell",
    "n_active": "those on which the latent is active; a cell where it never is has no row",
    "frequency": "n_active / n_tokens",
    "share": "part of the latent's active tokens that lie in the cell",
    "mean_activation": "mean of v over the active tokens, v = f * sum of decoder norms",
    "max_activation": "largest v",
}

ROW_GROUP = 16_384
"""Rows of the table that the file keeps together: one latent's are found without reading the other groups of rows."""


@dataclass(frozen=True)
class Cells:
    """The cells of a store: `table` has a row each (dataset, group, role, template_index, token), `of_row` the cell of every
    token of the store."""

    table: pl.DataFrame
    of_row: npt.NDArray[np.int64]


def _role_of_turns(store: Store, flags: npt.NDArray[np.uint8], turn: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Index into `ROLES` of the turn of each token: the role of the content that the turn has."""
    key = store.column("sequence").astype(np.int64) * 256 + turn + 1
    role = np.full(len(flags), ROLES.index("other"), dtype=np.int64)
    for name, flag in (("user", Flag.USER), ("assistant", Flag.ASSISTANT)):
        role[np.isin(key, np.unique(key[(flags & flag) != 0]))] = ROLES.index(name)
    role[turn < 0] = ROLES.index("before")
    return role


def _most_frequent(ids: npt.NDArray[np.int32]) -> int:
    values, counts = np.unique(ids, return_counts=True)
    return int(values[counts.argmax()])


def cells_of(store: Store, tokenizer: Any) -> Cells:
    """Find the cells that occur in a store."""
    flags, turn, dataset = store.column("flags"), store.column("turn").astype(np.int64), store.column("dataset")
    group, template = group_of(flags), GROUPS.index("template")
    is_template = group == template
    role = np.where(is_template, _role_of_turns(store, flags, turn), 0)
    index = np.where(is_template, np.minimum(store.column("template_index"), LAST_INDEX), 0).astype(np.int64)
    code = ((dataset.astype(np.int64) * len(GROUPS) + group) * len(ROLES) + role) * (LAST_INDEX + 1) + index
    codes, of_row = np.unique(code, return_inverse=True)
    ids = store.column("token_id")
    rows = []
    for cell, value in enumerate(codes.tolist()):
        rest, number = divmod(value, LAST_INDEX + 1)
        rest, which_role = divmod(rest, len(ROLES))
        which_dataset, which_group = divmod(rest, len(GROUPS))
        row: dict[str, Any] = {"dataset": store.datasets[which_dataset], "group": GROUPS[which_group]}
        if which_group == template:
            token = tokenizer.decode([_most_frequent(ids[of_row == cell])])
            row |= {"role": ROLES[which_role], "template_index": number, "token": token}
        rows.append(row)
    schema = {"dataset": pl.String, "group": pl.String, "role": pl.String, "template_index": pl.Int64, "token": pl.String}
    return Cells(pl.DataFrame(rows, schema=schema), of_row)


@dataclass
class GroupActivity:
    """Sums over tokens in v; passes over disjoint tokens add up.

    Attributes:
        tokens: number of tokens of each cell; counts: active ones; total: sum of v; maximum: largest v.
    """

    tokens: Int64[Tensor, " cell"]
    counts: Int64[Tensor, "cell latent"]
    total: Float64[Tensor, "cell latent"]
    maximum: Float[Tensor, "cell latent"]

    @classmethod
    def empty(cls, n_cells: int, n_latents: int) -> GroupActivity:
        shape = (n_cells, n_latents)
        return cls(
            torch.zeros(n_cells, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.float64),
            torch.zeros(shape),
        )

    def add(self, chunk: Chunk, cells: Cells, norms: Float[Tensor, " latent"]) -> None:
        """Add a chunk; `norms` are the sums of the decoder norms."""
        cell, code = torch.from_numpy(cells.of_row[chunk.rows]), chunk.code
        v = code.values * norms[code.latent]
        flat = cell[code.token] * code.n_latents + code.latent
        self.tokens += torch.bincount(cell, minlength=len(self.tokens))
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(flat))
        self.total.view(-1).index_add_(0, flat, v.double())
        self.maximum.view(-1).scatter_reduce_(0, flat, v, "amax")

    def over(self, ranks: Ranks) -> GroupActivity:
        """Merge the passes of several ranks, in place."""
        for tensor in (self.tokens, self.counts, self.total):
            ranks.sum(tensor)
        ranks.maximum(self.maximum)
        return self

    def __add__(self, other: GroupActivity) -> GroupActivity:
        """Merge two passes over disjoint tokens of one store."""
        return GroupActivity(
            self.tokens + other.tokens,
            self.counts + other.counts,
            self.total + other.total,
            torch.maximum(self.maximum, other.maximum),
        )


def activity_table(activity: GroupActivity, cells: Cells) -> pl.DataFrame:
    """One row a latent and cell in which it is active; `COLUMNS` documents the columns."""
    cell, latent = activity.counts.nonzero(as_tuple=True)
    n_active = activity.counts[cell, latent]
    facts = cells.table.with_row_index("cell").with_columns(pl.col("cell").cast(pl.Int64))
    table = pl.DataFrame({
        "cell": cell.numpy(),
        "latent": latent.numpy(),
        "n_tokens": activity.tokens[cell].numpy(),
        "n_active": n_active.numpy(),
        "share": (n_active / activity.counts.sum(0)[latent]).double().numpy(),
        "mean_activation": (activity.total[cell, latent] / n_active).numpy(),
        "max_activation": activity.maximum[cell, latent].double().numpy(),
    }).with_columns(frequency=pl.col("n_active") / pl.col("n_tokens"))  # fmt: skip
    names: Sequence[str] = list(COLUMNS)
    return table.join(facts, on="cell", how="left").sort("latent", "cell").select(names)
