"""The share of the models' difference that each latent contributes: a ranking for coders with one decoder or two."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from crossdiff.activations.store import Store
from crossdiff.causal.conversations import training_rows
from crossdiff.causal.patching import DecoderDifference
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.groups import GROUPS
from crossdiff.latents.stream import encode

MAX_TOKENS = 65536


def contributions(store: Store, crosscoder: Crosscoder, batch_tokens: int) -> pl.DataFrame:
    """Mean of ||f_j (d_j^chat - d_j^base)||^2 over tokens of the training conversations, in the models' own space.

    If there are more than `MAX_TOKENS`, only every n-th token is used.

    Returns:
        One row per latent: latent, n_active (on those tokens), contribution.
    """
    rows = training_rows(store)
    rows = rows[:: -(-len(rows) // MAX_TOKENS)]
    device = crosscoder.encoder.device
    squares = torch.zeros(crosscoder.n_latents, dtype=torch.float64, device=device)
    n_active = torch.zeros(crosscoder.n_latents, dtype=torch.int64, device=device)
    for first in range(0, len(rows), batch_tokens):
        code = encode(crosscoder, crosscoder.inputs(store, rows[first : first + batch_tokens]))
        squares.index_add_(0, code.latent, code.values.double().square())
        n_active += code.counts()
    no_means = torch.zeros(len(GROUPS) + 1, crosscoder.d_model)
    directions = DecoderDifference.from_crosscoder(crosscoder, no_means).directions
    squared_norms = directions.double().square().sum(1)
    return pl.DataFrame(
        {
            "latent": np.arange(crosscoder.n_latents),
            "n_active": n_active.cpu().numpy(),
            "contribution": (squares * squared_norms / len(rows)).cpu().numpy(),
        }
    )
