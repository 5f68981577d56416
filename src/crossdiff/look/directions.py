"""What the difference between the models says: its mean over groups of tokens and its principal directions, by the logit lens.

Beside every mean stands what chance gives: the cosine of the means over two halves of the documents, and the largest logit of
random directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.look.depth import LayerPair
from crossdiff.models.lens import direction_logits
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float, Float64, Int64, Tensor

BEGINNING = "plain_beginning"
"""The first tokens of plain texts: a mean difference there is the same whatever the text is about."""
N_BEGINNING = 5
MEAN_GROUPS = (*GROUPS, BEGINNING, "all")
N_PROMOTED, N_RANDOM = 10, 20
DIRECTION_COLUMNS: dict[str, Any] = {
    "direction": pl.String, "n_tokens": pl.Int64, "norm_share": pl.Float64, "halves_cosine": pl.Float64, "share": pl.Float64,
    "chat_up": pl.List(pl.String), "chat_down": pl.List(pl.String), "base_up": pl.List(pl.String), "top_logit": pl.Float64,
    "random_logit": pl.Float64,
}  # fmt: skip


def direction_name(group: str) -> str:
    """How the mean difference over a group is called."""
    return f"mean over {group.replace('_', ' ')} tokens"


@dataclass(frozen=True)
class MeanDifferences:
    """Collects the mean of h^chat - h^base after every layer, over groups of tokens and over two halves of the documents.

    Attributes:
        total: sums of the differences; n: numbers of tokens; groups as in `MEAN_GROUPS`.
        square: sum of ||h^chat||^2 after every layer over all tokens.
    """

    total: Float64[Tensor, "half group layer d_model"]
    n: Int64[Tensor, "half group"]
    square: Float64[Tensor, " layer"]

    @classmethod
    def empty(cls, n_layers: int, d_model: int) -> MeanDifferences:
        """Nothing collected yet."""
        shape = (2, len(MEAN_GROUPS))
        total = torch.zeros(*shape, n_layers, d_model, dtype=torch.float64)
        return cls(total, torch.zeros(shape, dtype=torch.int64), torch.zeros(n_layers, dtype=torch.float64))

    def tensors(self) -> dict[str, Tensor]:
        """The attributes by name."""
        return {"total": self.total, "n": self.n, "square": self.square}

    def add(
        self,
        base: list[Float[Tensor, "token d_model"]],
        chat: list[Float[Tensor, "token d_model"]],
        flags: npt.NDArray[np.uint8],
        position: npt.NDArray[np.int64],
        document: npt.NDArray[np.int64],
    ) -> None:
        """Add the tokens of a batch; `base` and `chat` hold one tensor per layer."""
        group = group_of(flags)
        beginning = (group == GROUPS.index("plain")) & (position <= N_BEGINNING)
        member = np.zeros((2 * len(MEAN_GROUPS), len(group)))
        rows = (document % 2) * len(MEAN_GROUPS)
        token = np.arange(len(group))
        member[rows + group, token] = 1
        member[rows[beginning] + MEAN_GROUPS.index(BEGINNING), token[beginning]] = 1
        member[rows + MEAN_GROUPS.index("all"), token] = 1
        self.n.add_(torch.from_numpy(member.sum(1).astype(np.int64).reshape(2, -1)))
        weights = torch.from_numpy(member).float().to(base[0].device)
        for layer, (h_base, h_chat) in enumerate(zip(base, chat, strict=True)):
            sums = weights @ (h_chat.float() - h_base.float())
            self.total[:, :, layer] += sums.view(2, len(MEAN_GROUPS), -1).cpu().double()
            self.square[layer] += float(h_chat.float().square().sum())

    def mean(self, group: str, layer: int, half: int | None = None) -> Float64[Tensor, " d_model"]:
        """The mean over a group, or over the documents of one half; NaN if it has no tokens."""
        index = MEAN_GROUPS.index(group)
        chosen = slice(None) if half is None else slice(half, half + 1)
        n = int(self.n[chosen, index].sum())
        total: Tensor = self.total[chosen, index, layer].sum(0)
        return total / n if n else torch.full_like(total, torch.nan)


def direction_table(
    pair: Pair, means: MeanDifferences, layer: int, sample: LayerPair, n_components: int, seed: int
) -> tuple[pl.DataFrame, Float64[Tensor, "direction d_model"]]:
    """One row per mean difference and principal direction after a layer, and the directions.

    Args:
        sample: the residual streams of both models for some tokens, from which the principal directions come.

    Returns:
        `norm_share`: the norm of a mean over the usual norm of the chat model's residual stream; `halves_cosine`: of the means
        over two halves of the documents; `share`: of the difference's variance, for principal directions; the promoted tokens;
        `top_logit`, and `random_logit`: the mean largest logit of random directions of the same norm.
    """
    usual = float((means.square[layer] / max(1, int(means.n[:, -1].sum()))).sqrt())
    rows: list[dict[str, Any]] = []
    directions = []
    for group in MEAN_GROUPS:
        direction = means.mean(group, layer)
        n_tokens = int(means.n[:, MEAN_GROUPS.index(group)].sum())
        if n_tokens and direction.norm() > 0:
            one, other = (means.mean(group, layer, half) for half in (0, 1))
            cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
            found = {"n_tokens": n_tokens, "norm_share": float(direction.norm()) / usual, "halves_cosine": cosine}
            rows.append({"direction": direction_name(group)} | found)
            directions.append(direction)
    values, vectors = sample.components()
    for index in range(min(n_components, int((values > 0).sum()))):
        vector = vectors[index] * torch.sign(vectors[index] @ (sample.chat - sample.base).mean(0))
        share = float(values[index] / values.sum())
        rows.append({"direction": f"principal direction {index + 1}", "n_tokens": len(sample.base), "share": share})
        directions.append(vector if vector.any() else vectors[index])
    for row, direction in zip(rows, directions, strict=True):
        row |= _promoted(pair, direction, seed)
    return pl.DataFrame(rows, schema=DIRECTION_COLUMNS), torch.stack(directions) if directions else vectors[:0]


@torch.no_grad()
def _promoted(pair: Pair, direction: Float64[Tensor, " d_model"], seed: int) -> dict[str, Any]:
    """The tokens that a direction promotes in both models, and how its largest logit compares with those of random ones."""
    chat, base = (direction_logits(model, direction.float().to(pair.device)) for model in (pair.chat, pair.base))
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(N_RANDOM, len(direction), generator=generator)
    random *= float(direction.norm()) / random.norm(dim=1, keepdim=True)
    tops = [float(direction_logits(pair.chat, each.to(pair.device)).max()) for each in random]

    def tokens(logits: Tensor, largest: bool) -> list[str]:
        top = logits.topk(min(N_PROMOTED, len(logits)), largest=largest).indices
        return [pair.tokenizer.decode([int(token)]) for token in top]

    return {
        "chat_up": tokens(chat, True), "chat_down": tokens(chat, False), "base_up": tokens(base, True),
        "top_logit": float(chat.max()), "random_logit": float(np.mean(tops)),
    }  # fmt: skip
