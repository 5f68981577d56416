"""Decoder geometry: relative norms, their classes, and cosines between directions (docs/method.md#decoder-norms)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from crossdiff.shapes import Float, Int64, Tensor

BASE_INDEX, CHAT_INDEX = 0, -1
"""Index of each model on an axis of models or of decoder directions. A coder with one decoder uses the same one for both."""
BASE_ONLY, SHARED, CHAT_ONLY = (0.0, 0.1), (0.4, 0.6), (0.9, 1.0)
"""Ranges of delta_norm, ends included."""
BLOCK = 512
"""Number of directions whose cosines with all others are in memory at once."""


def delta_norm(norms: Float[Tensor, "latent source"]) -> Float[Tensor, " latent"]:
    """Relative decoder norm 1/2 ((||d^chat|| - ||d^base||) / max + 1), in [0, 1]; 1 = chat-only.

    NaN where both directions vanish, and for a coder with one decoder. Lindsey et al. 2024; Minder, Dumas et al. 2025.
    """
    if norms.shape[1] == 1:
        return torch.full((len(norms),), torch.nan, dtype=torch.float64)
    base, chat = norms.double()[:, BASE_INDEX], norms.double()[:, CHAT_INDEX]
    return 0.5 * ((chat - base) / torch.maximum(base, chat) + 1)


def delta_norm_class(value: float) -> str:
    """`base_only`, `shared`, `chat_only` or `other`; `undefined` for NaN."""
    if math.isnan(value):
        return "undefined"
    for name, (low, high) in (("base_only", BASE_ONLY), ("shared", SHARED), ("chat_only", CHAT_ONLY)):
        if low <= value <= high:
            return name
    return "other"


def cosine(directions: Float[Tensor, "source latent d_model"]) -> Float[Tensor, " latent"]:
    """Cosine of each latent's decoder directions in the base and the chat model.

    NaN where one of them vanishes, and for a coder with one decoder.
    """
    if len(directions) == 1:
        return torch.full((directions.shape[1],), torch.nan, dtype=torch.float64)
    base, chat = directions[BASE_INDEX].double(), directions[CHAT_INDEX].double()
    cosines: Tensor = (base * chat).sum(1) / (base.norm(dim=1) * chat.norm(dim=1))
    return cosines


def nearest(
    directions: Float[Tensor, "row d_model"], others: Float[Tensor, "other d_model"], n: int
) -> Iterator[tuple[int, Float[Tensor, "block n"], Int64[Tensor, "block n"]]]:
    """The `n` others with the highest cosine for each direction, a block of directions at a time.

    A direction of length 0 has cosine 0 with everything.

    Yields:
        The index of the block's first direction, the cosines from the highest down, and the indices of the others; both on the
        host.
    """
    directions = torch.nn.functional.normalize(directions, dim=1)
    others = torch.nn.functional.normalize(others, dim=1)
    for first in range(0, len(directions), BLOCK):
        top = (directions[first : first + BLOCK] @ others.T).topk(min(n, len(others)), dim=1)
        yield first, top.values.cpu(), top.indices.cpu()
