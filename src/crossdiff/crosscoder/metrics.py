"""Quality of a crosscoder on held-out tokens: variance explained, sparsity, dead latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store
from crossdiff.config import MASSIVE_NORM
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Float, Float64, Int64, Tensor
from crossdiff.statistics import jackknife_se, student_t

BLOCKS = 20


@dataclass
class HeldoutSums:
    """Sums over held-out tokens in blocks of documents, in float64; `kind` is 0 for ordinary and 1 for massive tokens.

    They are on the crosscoder's device until `over` brings them to the host, where they are read.

    Attributes:
        limit: norm above which a token is massive, per source, in the models' own space.
    """

    limit: Float[Tensor, " source"]
    n: Int64[Tensor, "kind block"]
    squared_error: Float64[Tensor, "kind block source"]
    square: Float64[Tensor, "kind block source"]
    total: Float64[Tensor, "kind block column"]
    counts: Int64[Tensor, " latent"]

    @classmethod
    def empty(cls, crosscoder: Crosscoder, store: Store, rows: npt.NDArray[np.int64]) -> HeldoutSums:
        """Empty sums for the tokens of the given rows; at least one row."""
        device = crosscoder.encoder.device
        chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), 4096)).astype(np.int64)]
        sample = crosscoder.view.apply(store.gather(chosen)[:, source_indices(store, crosscoder.view.reads)].to(device))
        per_source = (2, BLOCKS, crosscoder.n_sources)
        return cls(
            limit=MASSIVE_NORM * sample.norm(dim=2).median(0).values,
            n=torch.zeros(2, BLOCKS, dtype=torch.int64, device=device),
            squared_error=torch.zeros(per_source, dtype=torch.float64, device=device),
            square=torch.zeros(per_source, dtype=torch.float64, device=device),
            total=torch.zeros(2, BLOCKS, crosscoder.n_sources * crosscoder.d_model, dtype=torch.float64, device=device),
            counts=torch.zeros(crosscoder.n_latents, dtype=torch.int64, device=device),
        )

    def add(
        self,
        crosscoder: Crosscoder,
        document: npt.NDArray[np.integer[Any]],
        x: Float[Tensor, "batch source d_model"],
        error: Float[Tensor, "batch source d_model"],
        counts: Int64[Tensor, " latent"],
    ) -> None:
        """Add tokens: their documents, normalised activations, reconstruction errors, and the active tokens of each latent."""
        norms = (x / crosscoder.scale + crosscoder.mean).norm(dim=2)
        block = torch.from_numpy(document % BLOCKS).to(x.device).long()
        cell = (norms > self.limit).any(1).long() * BLOCKS + block
        self.n += torch.bincount(cell, minlength=2 * BLOCKS).view(2, BLOCKS)
        self.squared_error.view(2 * BLOCKS, -1).index_add_(0, cell, error.square().sum(2).double())
        self.square.view(2 * BLOCKS, -1).index_add_(0, cell, x.square().sum(2).double())
        self.total.view(2 * BLOCKS, -1).index_add_(0, cell, x.flatten(1).double())
        self.counts += counts

    def over(self, ranks: Ranks) -> HeldoutSums:
        """Sum over the ranks, in place, and bring the sums to the host."""
        for name in ("n", "squared_error", "square", "total", "counts"):
            setattr(self, name, ranks.sum(getattr(self, name)).cpu())
        return self

    def fve(self, kind: int, blocks: Tensor | None = None) -> Float64[Tensor, " entry"]:
        """1 - sum ||x - xhat||^2 / sum ||x - mean||^2 for each source, and for all of them together at the end."""
        chosen = slice(None) if blocks is None else blocks
        n = self.n[kind][chosen].sum()
        error = self.squared_error[kind][chosen].sum(0)
        mean_square = (self.total[kind][chosen].sum(0).view(len(error), -1) / n).square().sum(1)
        variance = self.square[kind][chosen].sum(0) - n * mean_square
        return torch.cat([1 - error / variance, (1 - error.sum() / variance.sum()).unsqueeze(0)])


def heldout_sums(
    crosscoder: Crosscoder,
    store: Store,
    split: str,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> HeldoutSums:
    """One pass over the tokens of a split."""
    rows, document = store.rows(split), store.column("document")
    sums = HeldoutSums.empty(crosscoder, store, rows)
    for first in range(0, len(rows), batch_tokens):
        part = rows[first : first + batch_tokens]
        x = crosscoder.inputs(store, part)
        code = crosscoder.code(x)
        sums.add(crosscoder, document[part], x, x - crosscoder.decode(code), code.counts())
        advance(len(part))
    return sums.over(ALONE)


def health(crosscoder: Crosscoder, sums: HeldoutSums) -> dict[str, Any]:
    """Metrics on held-out tokens: FVE with jackknife intervals, L0, dead latents; massive tokens are reported separately.

    A store has them only if `harvest.max_norm_multiple` is null, or if an earlier version made it.
    """
    names = [*crosscoder.sources, "total"]
    value = sums.fve(0)
    filled = (sums.n[0] > 0).nonzero().squeeze(1)
    left_out = torch.stack([sums.fve(0, filled[filled != block]) for block in filled])
    half = jackknife_se(left_out) * student_t(max(2, len(filled)))
    n_tokens = int(sums.n.sum())
    n_massive = int(sums.n[1].sum())
    report: dict[str, Any] = {
        "n_tokens": n_tokens,
        "fve": dict(zip(names, value.tolist(), strict=True)),
        "fve_interval": {name: [float(v - h), float(v + h)] for name, v, h in zip(names, value, half, strict=True)},
        "l0": float(sums.counts.sum()) / n_tokens,
        "n_dead": int((sums.counts == 0).sum()),
        "dead_share": float((sums.counts == 0).double().mean()),
        "massive": {"n_tokens": n_massive, "share": n_massive / n_tokens, "norm_over_median": MASSIVE_NORM},
    }
    if n_massive > 1:
        report["massive"]["fve"] = dict(zip(names, sums.fve(1).tolist(), strict=True))
    return report


def frequency_histogram(sums: HeldoutSums) -> dict[str, list[float]]:
    """Histogram of log10 of the latents' frequencies, without dead latents."""
    frequency = sums.counts[sums.counts > 0].double() / sums.n.sum()
    edges = np.linspace(-6, 0, 25)
    counts, _ = np.histogram(np.log10(frequency.numpy()), bins=edges)
    return {"log10_edges": edges.tolist(), "counts": counts.tolist()}
