"""One forward pass of both models over a batch of sequences, up to a layer, returned without padding."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.errors import UserError
from crossdiff.models.access import residuals_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float32, Int, Tensor
from crossdiff.sources import SOURCES

TokenIds = npt.NDArray[np.int32]
_ONE_PASS = threading.Lock()
"""Layers are read by hooks, which a model keeps for all threads: two passes at once would see each other's activations."""


class NotFiniteError(UserError):
    """A model gives NaN or infinite activations. row: the first token of the pass for which it does."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row

    def in_document(self, document: int) -> UserError:
        """The same error with the number of the document, over all datasets."""
        return UserError(f"{self} (document {document}, counted from 0 over all datasets)")


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
    """Residual streams `[layer][source]` of both models on the same ids, without padding, on the models' device.

    Raises:
        UserError: a sequence is longer than a model can read, or a model gives NaN or infinite activations (`NotFiniteError`).
    """
    ids, kept = right_padded(batch)
    pair.check_length(ids.shape[1], f"a sequence of {ids.shape[1]} tokens", "shorten it")
    lengths = [len(token_ids) for token_ids in batch]
    by_source = []
    for source, model, read in zip(SOURCES, pair.models, (pair.base_ids(ids), ids), strict=True):
        device = next(model.parameters()).device
        with _ONE_PASS:
            streams = [stream.flatten(0, 1) for stream in residuals_after(model, read.to(device), layers)]
        if kept is not None:
            streams = [stream.index_select(0, kept.to(device)) for stream in streams]
        by_source.append([stream.float() for stream in streams])
        for stream in by_source[-1]:
            _check_finite(pair, source, read.flatten() if kept is None else read.flatten()[kept], lengths, stream)
    return [list(streams) for streams in zip(*by_source, strict=True)]


def _check_finite(
    pair: Pair, source: str, read: Int[Tensor, " token"], lengths: Sequence[int], stream: Float32[Tensor, "token d_model"]
) -> None:
    """Check the activations of one source. `read` holds the ids that its model has read, `lengths` those of the sequences."""
    if bool(torch.linalg.vector_norm(stream, dim=1).isfinite().all()):
        return
    wrong = torch.nonzero(~stream.isfinite().all(1)).flatten()
    if not len(wrong):
        return  # the squares in the norm overflow, and the values do not
    row = int(wrong[0])
    message = f"the {source} model ({pair.identity[source]['name']}) gives NaN or infinite activations"
    # Attention spreads a NaN over the whole sequence, so the token with the damaged embedding need not be the first.
    ends = np.cumsum(lengths)
    last = int(ends[np.searchsorted(ends, row, side="right")])
    model = pair.base if source == SOURCES[0] else pair.chat
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    for index in range(row, last):
        if not bool(weight[int(read[index])].isfinite().all()):
            token = pair.tokenizer.convert_ids_to_tokens(int(read[index]))
            raise NotFiniteError(
                f"{message}: its embedding of the token {token!r} is not finite; repair it, or remove the text", row
            )
    raise NotFiniteError(
        f"{message}: set model_dtype to float32 if they overflow, otherwise check the model's weights, or remove the text", row
    )
