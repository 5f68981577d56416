"""Where in depth two models differ: the residual stream after every layer, and how much of the final KL is already there.

For layer l the chat model's upper layers continue from the base model's residual stream after l. KL(chat || that) is 0 if the
two residual streams are equal there, and grows with depth to what the residual stream can show at all. What then remains of
KL(chat || base) is the work of the chat model's final norm and unembedding alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.look.predictions import compare
from crossdiff.models.access import UpperHalf
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float, Float64, Tensor
from crossdiff.statistics import jackknife

HALF = 0.5
"""Share of the KL after the last layer that has to be there for a layer to be recommended."""
DEPTH_COLUMNS = {
    "layer": pl.Int64, "relative_norm": pl.Float64, "centred_cosine": pl.Float64, "effective_rank": pl.Float64,
    "kl": pl.Float64, "kl_low": pl.Float64, "kl_high": pl.Float64,
}  # fmt: skip


@dataclass(frozen=True)
class LayerPair:
    """The residual streams of both models after one layer, without padding, in float64."""

    base: Float64[Tensor, "token d_model"]
    chat: Float64[Tensor, "token d_model"]

    @property
    def relative_norm(self) -> float:
        """Root of the mean square of the difference over that of the base model's residual stream."""
        square = self.base.square().sum()
        return float(((self.chat - self.base).square().sum() / square).sqrt()) if square > 0 else float("nan")

    @property
    def centred_cosine(self) -> float:
        """Cosine of the two residual streams, as vectors over all tokens, without their means; 1 if the models are equal."""
        base, chat = self.base - self.base.mean(0), self.chat - self.chat.mean(0)
        norm = base.norm() * chat.norm()
        return float((base * chat).sum() / norm) if norm > 0 else float("nan")

    def components(self) -> tuple[Float64[Tensor, " component"], Float64[Tensor, "component d_model"]]:
        """Variances of the difference along its principal directions, and the directions, the largest variance first."""
        difference = self.chat - self.base
        centred = difference - difference.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        return values.flip(0).clamp(min=0), vectors.T.flip(0).contiguous()

    @property
    def effective_rank(self) -> float:
        """exp(entropy) of the shares of the difference's variance (Roy & Vetterli 2007); 0 if the difference is constant."""
        values, _ = self.components()
        if not values.sum() > 0:
            return 0.0
        shares = values / values.sum()
        return float(torch.where(shares > 0, -shares * shares.log(), 0.0).sum().exp())


class Continuations:
    """KL(chat || the chat model's upper layers on the base model's residual stream) at every position and for every layer."""

    def __init__(self, pair: Pair) -> None:
        self._uppers = [UpperHalf(pair.chat, layer) for layer in range(pair.n_layers)]

    def kl(
        self,
        base: Sequence[Float[Tensor, "sequence position d_model"]],
        chat_logits: Float[Tensor, "token vocabulary"],
        token_ids: Tensor,
        mask: Tensor,
    ) -> Float[Tensor, "token layer"]:
        """The KL of a batch, without padding.

        Args:
            base: residual streams of the base model after every layer; chat_logits: of the chat model, without padding.
            token_ids, mask: `[sequence, position]`, as the chat model reads them, and which are tokens.
        """
        nothing = torch.full((len(chat_logits),), -1, device=chat_logits.device)
        rows = []
        for upper, hidden in zip(self._uppers, base, strict=True):
            logits = upper.logits(hidden, token_ids, mask, mask.bool())
            rows.append(compare(logits, chat_logits, nothing, nothing).kl)
        return torch.stack(rows, dim=1)


def depth_table(layers: Iterable[LayerPair], kl: Float[Tensor, "token layer"], block: npt.NDArray[np.int64]) -> pl.DataFrame:
    """One row per layer, with the interval of the mean KL from the jackknife over blocks of documents."""
    rows = []
    for layer, pair in enumerate(layers):
        mean = blockwise(kl[:, layer].double().numpy(), block)
        rows.append({
            "layer": layer, "relative_norm": pair.relative_norm, "centred_cosine": pair.centred_cosine,
            "effective_rank": pair.effective_rank, "kl": mean[0], "kl_low": mean[1], "kl_high": mean[2],
        })  # fmt: skip
    return pl.DataFrame(rows, schema=DEPTH_COLUMNS)


def blockwise(values: npt.NDArray[np.float64], block: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """A mean with the ends of its interval, from the jackknife over blocks; the ends are NaN with fewer than two blocks."""
    n = np.bincount(block).astype(np.float64)
    total = np.bincount(block, weights=values)
    filled = n > 0
    n, total = n[filled], total[filled]
    if not len(n):
        return float("nan"), float("nan"), float("nan")
    value = float(total.sum() / n.sum())
    if len(n) < 2:
        return value, float("nan"), float("nan")
    found = jackknife(value, (total.sum() - total) / (n.sum() - n))
    return value, float(found.low), float(found.high)


def recommended(table: pl.DataFrame) -> tuple[int | None, str]:
    """The earliest layer worth trying, the first with half of the last layer's KL, and why; None without any KL."""
    last = float(table["kl"][-1])
    if not last > 0:
        return None, "the models do not differ after any layer"
    reached = table.filter(pl.col("kl") >= HALF * last).row(0, named=True)
    return int(reached["layer"]), (
        f"after it the KL is {reached['kl']:.3g} nats, {reached['kl'] / last:.0%} of the {last:.3g} after the last layer"
    )
