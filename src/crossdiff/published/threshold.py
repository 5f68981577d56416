"""Estimating the threshold of a published BatchTopK whose training never set it."""

from __future__ import annotations

import numpy as np
import torch

from crossdiff.activations.store import Store
from crossdiff.activations.transfer import CPU
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.latents.stream import piece_tokens
from crossdiff.published.coder import PublishedCoder, UnsetThreshold
from crossdiff.shapes import Float, Tensor

BATCH = 2048
"""Tokens of a batch; the paper's trainings have the same."""
MOST_BATCHES = 200


def estimate_threshold(coder: PublishedCoder, sources: tuple[str, ...], store: Store, device: torch.device = CPU) -> float:
    """theta: the mean over batches of held-out tokens of the smallest selected f * weight.

    A batch selects its k * tokens largest positive ones, as the training did (docs/method.md#crosscoder). Tokens come in random
    order, at most `MOST_BATCHES` batches of them, which are encoded on `device`.

    Raises:
        UserError: the coder has a threshold, or the store has another width or no held-out tokens.
    """
    if not isinstance(coder.activation, UnsetThreshold):
        raise UserError(f"{coder.path} has no threshold to estimate: only a BatchTopK that never set its own needs one")
    relu = coder.crosscoder(sources).to(device)
    if relu.d_model != store.d_model:
        raise UserError(
            f"{coder.path} has width {relu.d_model}, but {store.folder} has {store.d_model}; name a store of its models"
        )
    rows = np.random.default_rng(0).permutation(store.rows("heldout"))
    if not len(rows):
        raise UserError(f"{store.folder} has no held-out tokens; harvest with a share of held-out documents")
    batches = np.array_split(rows, range(BATCH, len(rows), BATCH))[:MOST_BATCHES]
    whole = [batch for batch in batches if len(batch) == BATCH] or batches
    weight, k = coder.activation.weight.float().to(device), coder.activation.k
    return float(np.mean([_smallest(relu, relu.inputs(store, np.sort(batch)), weight, k * len(batch)) for batch in whole]))


def _smallest(relu: Crosscoder, x: Float[Tensor, "token source d_model"], weight: Float[Tensor, " latent"], n: int) -> float:
    """The smallest of the n largest positive f * weight; 0 if nothing is active."""
    kept = x.new_zeros(0)
    for piece in torch.split(x, piece_tokens(relu.n_latents, x)):
        v = relu.pre_activations(piece).relu() * weight
        kept = torch.cat([kept, v[v > 0]])
        kept = kept.topk(min(n, len(kept)), sorted=False).values
    return float(kept.min()) if len(kept) else 0.0
