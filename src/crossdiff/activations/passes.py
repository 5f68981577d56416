"""One forward pass of both models over a batch of sequences, up to a layer, returned without padding."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.models.access import residuals_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float32, Int, Tensor

TokenIds = npt.NDArray[np.int32]
_ONE_PASS = threading.Lock()
"""Layers are read by hooks, which a model keeps for all threads: two passes at once would see each other's activations."""


def right_padded(batch: Sequence[TokenIds]) -> tuple[Int[Tensor, "sequence position"], Int[Tensor, " token"] | None]:
    """Token ids padded with zeros on the right, and the flat indices of the real tokens (None if there is no padding)."""
    lengths = np.array([len(token_ids) for token_ids in batch])
    ids = np.zeros((len(batch), lengths.max()), dtype=np.int64)
    is_token = np.arange(ids.shape[1]) < lengths[:, None]
    ids[is_token] = np.concatenate(batch)
    return torch.from_numpy(ids), None if is_token.all() else torch.from_numpy(np.flatnonzero(is_token))


def paired_residuals(
    pair: Pair, batch: Sequence[TokenIds], layers: Sequence[int]
) -> list[list[Float32[Tensor, "token d_model"]]]:
    """Residual streams `[layer][source]` of both models on the same ids, without padding, on the models' device."""
    ids, kept = right_padded(batch)
    by_source = []
    for model, read in zip(pair.models, (pair.base_ids(ids), ids), strict=True):
        device = next(model.parameters()).device
        with _ONE_PASS:
            streams = [stream.flatten(0, 1) for stream in residuals_after(model, read.to(device), layers)]
        if kept is not None:
            streams = [stream.index_select(0, kept.to(device)) for stream in streams]
        by_source.append([stream.float() for stream in streams])
    return [list(streams) for streams in zip(*by_source, strict=True)]
