"""One pass over a store in blocks of documents: what every accumulator of the analysis reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store, consecutive
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.errors import UserError
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Float, Int64, Tensor

PIECE_BYTES = 1 << 24
"""Pre-activations that are computed and selected from at a time."""


@dataclass(frozen=True)
class Chunk:
    """Some whole sequences of one block, without the left-out positions.

    Attributes:
        rows: rows of the store, `[token]`.
        sequence: index of each token's sequence within the chunk, `[token]`; `numbers` are the sequences' indices in the store.
        h: activations of both models, in their own space; x: normalised ones of what the coder reads; code: active pairs;
            reconstruction: sum_j f_j d_j, without bias; error: x - xhat.
    """

    block: int
    rows: npt.NDArray[np.int64]
    sequence: Int64[Tensor, " token"]
    numbers: npt.NDArray[np.int64]
    x: Float[Tensor, "token column"]
    code: SparseCode
    reconstruction: Float[Tensor, "token column"]
    error: Float[Tensor, "token column"]
    h: Float[Tensor, "token source d_model"]


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
    trained_on, found = origin["pair"] | {"layer": origin["layer"]}, store.pair | {"layer": store.layer}
    differ = [key for key in {**trained_on, **found} if trained_on.get(key) != found.get(key)]
    if differ:
        theirs, ours = ({key: side.get(key) for key in differ} for side in (trained_on, found))
        raise UserError(
            f"the crosscoder was trained on {_named(theirs)}, the store {store.folder} holds {_named(ours)}; "
            "train again on this store, or analyse the one that it was trained on"
        )
    if crosscoder.d_model != store.d_model:
        raise UserError(f"the crosscoder reads width {crosscoder.d_model}, the store {store.folder} holds {store.d_model}")
    source_indices(store, crosscoder.view.reads)


def _named(side: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in side.items())


def check_latents(latents: Iterable[int], n_latents: int) -> None:
    """Latents that somebody asks for have to exist.

    Raises:
        UserError: names the first that does not.
    """
    for latent in latents:
        if not 0 <= latent < n_latents:
            raise UserError(f"there is no latent {latent}: the crosscoder has {n_latents}, 0 to {n_latents - 1}")


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
    ranks: Ranks = ALONE,
) -> Iterator[Chunk]:
    """Every counted token of the store once, block after block; no more than a chunk is in memory.

    Several ranks take the chunks in turn. `advance` is told of all of them, also of those that others have.
    """
    check_fits(crosscoder, store)
    number = -1
    index, whole = source_indices(store, crosscoder.view.reads), crosscoder.view.reads == store.sources
    bounds, positions = store.sequences(), store.column("position")
    for block, members in enumerate(blocks_of_sequences(store, n_blocks)):
        lengths = bounds[members + 1] - bounds[members]
        for first, last in consecutive(np.concatenate([[0], np.cumsum(lengths)]), batch_tokens):
            numbers = members[first:last]
            number += 1
            if not ranks.has(number):
                advance(int(lengths[first:last].sum()))
                continue
            rows = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in numbers])
            sequence = np.repeat(np.arange(len(numbers)), lengths[first:last])
            counted = positions[rows] >= store.leave_out
            advance(len(rows))
            rows, sequence = rows[counted], sequence[counted]
            if not len(rows):
                continue
            h = store.gather(rows)
            x = crosscoder.normalise(h if whole else h[:, index])
            code = encode(crosscoder, x)
            reconstruction = code.decode(crosscoder.decoder)
            error = (x.flatten(1) - reconstruction).sub_(crosscoder.decoder_bias)
            yield Chunk(block, rows, torch.from_numpy(sequence), numbers, x.flatten(1), code, reconstruction, error, h)
