"""One forward pass of all models over a batch of sequences, up to a layer, returned without padding."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.transfer import send
from crossdiff.errors import UserError
from crossdiff.models.access import residuals_after
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float32, Int, Tensor

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


class ForwardPass:
    """One pass of all models over a batch of sequences, which an accelerator may still be computing.

    Attributes:
        streams: residual streams `[layer][source]` of the same tokens, without padding, on the models' device.
        norms: the norm of every row of `streams`, on that device. What is not finite in a stream is not finite in its norms.

    Raises:
        UserError: a sequence is longer than a model can read.
    """

    streams: list[list[Float32[Tensor, "token d_model"]]]
    norms: Float32[Tensor, "layer source token"]

    def __init__(self, pair: Pair, batch: Sequence[TokenIds], layers: Sequence[int]) -> None:
        ids, self._kept = right_padded(batch)
        pair.check_length(ids.shape[1], f"a sequence of {ids.shape[1]} tokens", "shorten it")
        self._pair, self._lengths = pair, [len(token_ids) for token_ids in batch]
        self._read = [pair.ids_of(source, ids) for source in pair.sources]
        kept = None if self._kept is None else send(self._kept, pair.device)
        by_source = []
        for model, read in zip(pair.models, self._read, strict=True):
            with _ONE_PASS:
                streams = [stream.flatten(0, 1) for stream in residuals_after(model, send(read, pair.device), layers)]
            if kept is not None:
                streams = [stream.index_select(0, kept) for stream in streams]
            by_source.append([stream.float() for stream in streams])
        self.streams = [list(streams) for streams in zip(*by_source, strict=True)]
        norms = [[torch.linalg.vector_norm(stream, dim=1) for stream in streams] for streams in self.streams]
        self.norms = torch.stack([torch.stack(of_sources) for of_sources in norms])

    def check(self, norms: Float32[Tensor, "layer source token"]) -> None:
        """Raise `NotFiniteError` if a model gives NaN or infinite activations; `norms` is a copy of its own on the CPU."""
        if bool(norms.isfinite().all()):
            return
        for source in range(len(self._pair.sources)):
            for streams in self.streams:
                # The squares in a norm may overflow although the values do not.
                wrong = torch.nonzero(~streams[source].isfinite().all(1)).flatten()
                if len(wrong):
                    raise self._not_finite(source, int(wrong[0]))

    def _not_finite(self, source: int, row: int) -> NotFiniteError:
        """The error for the first row that is not finite; it names the token if its embedding is damaged."""
        pair, model, read = self._pair, self._pair.models[source], self._read[source].flatten()
        read = read if self._kept is None else read[self._kept]
        name = pair.sources[source]
        message = f"the {name} model ({pair.identity[name]['name']}) gives NaN or infinite activations"
        # Attention spreads a NaN over the whole sequence, so the token with the damaged embedding need not be the first.
        ends = np.cumsum(self._lengths)
        last = int(ends[np.searchsorted(ends, row, side="right")])
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
        for index in range(row, last):
            if not bool(weight[int(read[index])].isfinite().all()):
                token = pair.tokenizer.convert_ids_to_tokens(int(read[index]))
                return NotFiniteError(
                    f"{message}: its embedding of the token {token!r} is not finite; repair it, or remove the text", row
                )
        return NotFiniteError(
            f"{message}: set model_dtype to float32 if they overflow, otherwise check the model's weights, or remove the text",
            row,
        )


def paired_residuals(
    pair: Pair, batch: Sequence[TokenIds], layers: Sequence[int]
) -> list[list[Float32[Tensor, "token d_model"]]]:
    """Residual streams `[layer][source]` of all models on the same ids, without padding, on the models' device.

    Raises:
        UserError: a sequence is longer than a model can read, or a model gives NaN or infinite activations (`NotFiniteError`).
    """
    forward = ForwardPass(pair, batch, layers)
    forward.check(forward.norms.cpu())
    return forward.streams
