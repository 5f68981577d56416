"""Where each latent fires: counts, means and maxima per cell of tokens, and the table of them.

Memory: three numbers per cell and latent, regardless of the length of the store.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import torch

from crossdiff.activations.transfer import CPU
from crossdiff.latents.groups import GROUPS, LAST_INDEX, ROLES, Cells
from crossdiff.latents.stream import Coded
from crossdiff.ranks import Ranks
from crossdiff.shapes import Float, Float64, Int64, Tensor

COLUMNS = {
    "latent": "number of the latent",
    "dataset": "name of the dataset",
    "group": "plain, bos, template, user or assistant; a token with several flags counts as template first",
    "role": "role of a template token's turn: " + ", ".join(ROLES) + "; null for the other groups",
    "template_index": f"index among the template tokens of the turn, from 0; {LAST_INDEX} stands for this one and all after it",
    "token": "the most frequent token of a template cell, as text; null for the other groups",
    "n_tokens": "analysed tokens of the cell",
    "n_active": "those on which the latent is active; cells without any have no row",
    "frequency": "n_active / n_tokens",
    "share": "share of the latent's active tokens that belong to the cell",
    "mean_activation": "mean of v over the active tokens, v = f * sum of decoder norms",
    "max_activation": "largest v",
}
ROW_GROUP = 16_384
"""Rows per row group of the file, so that one latent's rows can be found without reading the others."""


@dataclass
class Activity:
    """Sums over tokens per cell, in v, on one device until `over` brings them to the host.

    Attributes:
        tokens: number of tokens; counts: number of active tokens; total: sum of v; maximum: largest v.
    """

    cells: Cells
    tokens: Int64[Tensor, " cell"]
    counts: Int64[Tensor, "cell latent"]
    total: Float64[Tensor, "cell latent"]
    maximum: Float[Tensor, "cell latent"]

    @classmethod
    def empty(cls, cells: Cells, n_latents: int, device: torch.device = CPU) -> Activity:
        shape = (cells.table.height, n_latents)
        return cls(
            cells,
            torch.zeros(shape[0], dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(shape, device=device),
        )

    def add(self, chunk: Coded) -> None:
        """Add a chunk."""
        code = chunk.code
        cell = torch.from_numpy(self.cells.of_row[chunk.rows]).to(code.token.device)
        flat = cell[code.token] * code.n_latents + code.latent
        self.tokens += torch.bincount(cell, minlength=len(self.tokens))
        self.counts.view(-1).index_add_(0, flat, torch.ones_like(flat))
        self.total.view(-1).index_add_(0, flat, chunk.v.double())
        self.maximum.view(-1).scatter_reduce_(0, flat, chunk.v, "amax")

    def over(self, ranks: Ranks) -> Activity:
        """Merge the passes of several ranks, in place, and bring the sums to the host."""
        for name in ("tokens", "counts", "total"):
            setattr(self, name, ranks.sum(getattr(self, name)).cpu())
        self.maximum = ranks.maximum(self.maximum).cpu()
        return self

    def by_group(self) -> tuple[Int64[Tensor, " group"], Int64[Tensor, "group latent"]]:
        """Number of tokens in each of `GROUPS`, and of active ones per latent."""
        group = torch.tensor([GROUPS.index(name) for name in self.cells.table["group"]])
        tokens = torch.zeros(len(GROUPS), dtype=torch.int64).index_add_(0, group, self.tokens)
        counts = torch.zeros(len(GROUPS), self.counts.shape[1], dtype=torch.int64).index_add_(0, group, self.counts)
        return tokens, counts


def activity_table(activity: Activity) -> pl.DataFrame:
    """One row per latent and cell in which it is active; `COLUMNS` documents the columns."""
    cell, latent = activity.counts.nonzero(as_tuple=True)
    n_active = activity.counts[cell, latent]
    facts = activity.cells.table.with_row_index("cell").with_columns(pl.col("cell").cast(pl.Int64))
    table = pl.DataFrame({
        "cell": cell.numpy(),
        "latent": latent.numpy(),
        "n_tokens": activity.tokens[cell].numpy(),
        "n_active": n_active.numpy(),
        "share": (n_active / activity.counts.sum(0)[latent]).double().numpy(),
        "mean_activation": (activity.total[cell, latent] / n_active).numpy(),
        "max_activation": activity.maximum[cell, latent].double().numpy(),
    }).with_columns(frequency=pl.col("n_active") / pl.col("n_tokens"))  # fmt: skip
    return table.join(facts, on="cell", how="left").sort("latent", "cell").select(*COLUMNS)
