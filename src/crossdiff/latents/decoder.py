"""Decoder geometry: relative norms, classes, and the cosine of the two directions (METHOD: naive specificity)."""

from __future__ import annotations

import math

import torch

from crossdiff.shapes import Float, Tensor

BASE, CHAT = 0, -1
"""Index of each model's decoder direction; where a coder has one decoder it stands for both."""
BASE_ONLY, SHARED, CHAT_ONLY = (0.0, 0.1), (0.4, 0.6), (0.9, 1.0)


def delta_norm(norms: Float[Tensor, "latent source"]) -> Float[Tensor, " latent"]:
    """1/2 ((||d^chat|| - ||d^base||) / max + 1) in [0, 1]; 1 = chat-only. NaN where both directions vanish, and for a coder
    with one decoder.

    Lindsey et al. 2024; Minder, Dumas et al. 2025.
    """
    if norms.shape[1] == 1:
        return torch.full((len(norms),), torch.nan, dtype=torch.float64)
    base, chat = norms.double().unbind(1)
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
    """Cosine of each latent's two decoder directions; NaN where one vanishes or there is but one."""
    if len(directions) == 1:
        return torch.full((directions.shape[1],), torch.nan, dtype=torch.float64)
    base, chat = directions.double().unbind(0)
    cosines: Tensor = (base * chat).sum(1) / (base.norm(dim=1) * chat.norm(dim=1))
    return cosines
