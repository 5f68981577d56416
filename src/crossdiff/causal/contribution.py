"""How much of the models' difference each latent makes up: what orders the latents of any coder, with one decoder or two."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store
from crossdiff.causal.conversations import training_rows
from crossdiff.causal.patching import DecoderDifference
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.groups import GROUPS
from crossdiff.latents.stream import encode

MAX_TOKENS = 65536


def contributions(store: Store, crosscoder: Crosscoder, batch_tokens: int) -> pl.DataFrame:
    """Mean of ||f_j (d_j^chat - d_j^base)||^2 over tokens of the training conversations, in the models' own space.

    Every n-th token is taken where there are more than `MAX_TOKENS`.

    Returns:
        One row a latent: latent, n_active (on those tokens), contribution.

    Raises:
        UserError: there are no training conversations.
    """
    rows = training_rows(store)
    rows = rows[:: -(-len(rows) // MAX_TOKENS)]
    index = source_indices(store, crosscoder.view.reads)
    squares = torch.zeros(crosscoder.n_latents, dtype=torch.float64)
    n_active = torch.zeros(crosscoder.n_latents, dtype=torch.int64)
    for first in range(0, len(rows), batch_tokens):
        h = store.gather(rows[first : first + batch_tokens])[:, index]
        code = encode(crosscoder, crosscoder.normalise(h.to(crosscoder.encoder)))
        squares.index_add_(0, code.latent.cpu(), code.values.double().square().cpu())
        n_active += code.counts().cpu()
    none = torch.zeros(len(GROUPS) + 1, crosscoder.d_model)
    size = DecoderDifference.of(crosscoder, none).directions.double().square().sum(1).cpu()
    return pl.DataFrame(
        {
            "latent": np.arange(crosscoder.n_latents),
            "n_active": n_active.numpy(),
            "contribution": (squares * size / len(rows)).numpy(),
        }
    )
