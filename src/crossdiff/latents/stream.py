"""One pass over a store in blocks of documents: what every accumulator of the analysis reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store, consecutive
from crossdiff.config import UserError
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.crosscoder.model import Crosscoder
from crossdiff.shapes import Float, Int64, Tensor

PIECE_BYTES = 1 << 24
"""Pre-activations that are computed and selected from at a time."""


@dataclass(frozen=True)
class Chunk:
    """Some whole sequences of one block, without the left-out positions.

    Attributes:
        rows: rows of the store, `[token]`.
        sequence: index of each token's sequence within the chunk, `[token]`; `numbers` are the sequences' indices in the store.
        x: normalised activations; code: active pairs; reconstruction: sum_j f_j d_j, without bias; error: x - xhat.
    """

    block: int
    rows: npt.NDArray[np.int64]
    sequence: Int64[Tensor, " token"]
    numbers: npt.NDArray[np.int64]
    x: Float[Tensor, "token column"]
    code: SparseCode
    reconstruction: Float[Tensor, "token column"]
    error: Float[Tensor, "token column"]


def encode(crosscoder: Crosscoder, x: Float[Tensor, "token source d_model"]) -> SparseCode:
    """The active pairs of a chunk, piece by piece: the pre-activations of a piece stay in the cache and in memory that is
    used again, where those of a whole chunk would be fetched from the system anew each time."""
    size = max(1, PIECE_BYTES // (crosscoder.n_latents * x.element_size()))
    parts = [crosscoder.sparse_code(piece) for piece in torch.split(x, size)]
    return SparseCode(
        token=torch.cat([part.token + index * size for index, part in enumerate(parts)]),
        latent=torch.cat([part.latent for part in parts]),
        values=torch.cat([part.values for part in parts]),
        n_tokens=len(x),
        n_latents=crosscoder.n_latents,
    )


def check_fits(crosscoder: Crosscoder, store: Store) -> None:
    """A crosscoder is analysed on activations of the models and layer that it was trained on.

    Raises:
        UserError: names both sides.
    """
    origin = crosscoder.origin
    if (origin["pair"], origin["layer"]) != (store.pair, store.layer):
        raise UserError(
            f"the crosscoder was trained on {origin['pair']} at layer {origin['layer']}, "
            f"the store {store.folder} holds {store.pair} at layer {store.layer}; train again on this store"
        )
    if crosscoder.d_model != store.d_model:
        raise UserError(f"the crosscoder reads width {crosscoder.d_model}, the store {store.folder} holds {store.d_model}")
    source_indices(store, crosscoder.sources)


def blocks_of_sequences(store: Store, n_blocks: int) -> list[npt.NDArray[np.int64]]:
    """The sequences of each block; a document lies in one block, and every dataset is spread over all of them.

    Raises:
        UserError: fewer documents than blocks.
    """
    if len(store.documents) < n_blocks:
        raise UserError(f"{len(store.documents)} documents cannot make {n_blocks} blocks; lower analyze.blocks or harvest more")
    first_rows = store.sequences()[:-1]
    document = store.column("document")[first_rows]
    return [np.flatnonzero(document % n_blocks == block) for block in range(n_blocks)]


def chunks(
    crosscoder: Crosscoder,
    store: Store,
    n_blocks: int,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> Iterator[Chunk]:
    """Every counted token of the store once, block after block; no more than a chunk is in memory."""
    check_fits(crosscoder, store)
    index = source_indices(store, crosscoder.sources)
    bounds, positions = store.sequences(), store.column("position")
    for block, members in enumerate(blocks_of_sequences(store, n_blocks)):
        lengths = bounds[members + 1] - bounds[members]
        for first, last in consecutive(np.concatenate([[0], np.cumsum(lengths)]), batch_tokens):
            numbers = members[first:last]
            rows = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in numbers])
            sequence = np.repeat(np.arange(len(numbers)), lengths[first:last])
            counted = positions[rows] >= store.leave_out
            advance(len(rows))
            rows, sequence = rows[counted], sequence[counted]
            if not len(rows):
                continue
            x = crosscoder.normalise(store.gather(rows)[:, index])
            code = encode(crosscoder, x)
            reconstruction = code.decode(crosscoder.decoder)
            error = (x.flatten(1) - reconstruction).sub_(crosscoder.decoder_bias)
            yield Chunk(block, rows, torch.from_numpy(sequence), numbers, x.flatten(1), code, reconstruction, error)
