"""One pass over a store in blocks of documents, which feeds every accumulator of the analysis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.ahead import read_ahead
from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store
from crossdiff.activations.transfer import CPU, is_asynchronous, send
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.errors import UserError
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Float, Int64, Tensor

PIECE_BYTES, PIECE_BYTES_ON_GPU = 1 << 24, 1 << 31
"""Size of the pre-activations that are computed and selected from at a time: what a CPU's cache holds, and what fills a GPU."""


@dataclass(frozen=True, kw_only=True)
class Coded:
    """What is active on some whole sequences of one block, without the left-out positions.

    Attributes:
        rows: rows of the store, `[token]`.
        sequence: index of each token's sequence within the chunk, `[token]`, on the host like `rows`; numbers: the sequences'
            indices in the store.
        code: active pairs of a token and a latent (or a concept); v: their activations f * sum of decoder norms.
    """

    block: int
    rows: npt.NDArray[np.int64]
    sequence: Int64[Tensor, " token"]
    numbers: npt.NDArray[np.int64]
    code: SparseCode
    v: Float[Tensor, " pair"]


@dataclass(frozen=True, kw_only=True)
class Chunk(Coded):
    """The same with the activations that were encoded and their reconstruction.

    Attributes:
        h: activations of both models in their own space; x: normalised activations of what the coder reads.
        reconstruction: sum_j f_j d_j, without bias; error: x - xhat.
    """

    x: Float[Tensor, "token column"]
    reconstruction: Float[Tensor, "token column"]
    error: Float[Tensor, "token column"]
    h: Float[Tensor, "token source d_model"]


@runtime_checkable
class Accumulator(Protocol):
    """Collects what one part of the analysis needs from the chunks of a pass. Its sums are on the device of the chunks."""

    def add(self, chunk: Chunk) -> None:
        """Add a chunk; the order of the chunks does not matter."""

    def over(self, ranks: Ranks) -> Any:
        """Merge the passes of several ranks, in place, on the host; at least the first rank has the result."""


@runtime_checkable
class Encoder(Protocol):
    """What encodes activations: a crosscoder, some of its latents, or concepts."""

    @property
    def n_latents(self) -> int: ...

    def sparse_code(self, x: Float[Tensor, "token source d_model"], /) -> SparseCode: ...


@runtime_checkable
class Coder(Encoder, Protocol):
    """An encoder that reads a store by itself."""

    def inputs(self, store: Store, rows: npt.NDArray[np.int64], /) -> Float[Tensor, "token source d_model"]: ...

    def v(self, code: Any, /) -> Tensor: ...


def piece_tokens(n_latents: int, x: Tensor) -> int:
    """How many of the tokens `x` are encoded at a time."""
    return max(1, (PIECE_BYTES if x.device.type == "cpu" else PIECE_BYTES_ON_GPU) // (n_latents * x.element_size()))


def encode(crosscoder: Encoder, x: Float[Tensor, "token source d_model"]) -> SparseCode:
    """Active pairs of many tokens, computed in pieces whose pre-activations stay in the cache and reuse the same memory."""
    if not crosscoder.n_latents:
        nothing = torch.zeros(0, dtype=torch.int64, device=x.device)
        return SparseCode(nothing, nothing, x.new_zeros(0), len(x), 0)
    size = piece_tokens(crosscoder.n_latents, x)
    parts = [crosscoder.sparse_code(piece) for piece in torch.split(x, size)]
    return SparseCode(
        token=torch.cat([part.token + index * size for index, part in enumerate(parts)]),
        latent=torch.cat([part.latent for part in parts]),
        values=torch.cat([part.values for part in parts]),
        n_tokens=len(x),
        n_latents=crosscoder.n_latents,
    )


def check_fits(crosscoder: Crosscoder, store: Store) -> None:
    """Check that a store holds the models, layer and width that a crosscoder was trained on; a `UserError` names both sides."""
    trained_on = crosscoder.origin["pair"] | {"layer": crosscoder.origin["layer"], "width": crosscoder.d_model}
    found = store.pair | {"layer": store.layer, "width": store.d_model}
    differ = [key for key in {**trained_on, **found} if trained_on.get(key) != found.get(key)]
    if differ:
        theirs, ours = (", ".join(f"{key} {side.get(key)}" for key in differ) for side in (trained_on, found))
        raise UserError(
            f"the crosscoder was trained on {theirs}, but the store {store.folder} holds {ours}; "
            "train again on this store, or analyse the store it was trained on"
        )
    source_indices(store, crosscoder.view.reads)


def blocks_of_sequences(store: Store, n_blocks: int) -> list[npt.NDArray[np.int64]]:
    """The sequences of each block. A document belongs to one block, and every dataset is spread over all blocks."""
    if len(store.documents) < n_blocks:
        raise UserError(f"{len(store.documents)} documents cannot make {n_blocks} blocks; lower analyze.blocks or harvest more")
    first_rows = store.sequences()[:-1]
    document = store.column("document")[first_rows]
    return [np.flatnonzero(document % n_blocks == block) for block in range(n_blocks)]


class Read(NamedTuple):
    """Whole sequences of one block as they are in the store, without the left-out positions; see `Coded`. Only `h` is on the
    device that it was read to."""

    block: int
    rows: npt.NDArray[np.int64]
    sequence: Int64[Tensor, " token"]
    numbers: npt.NDArray[np.int64]
    h: Float[Tensor, "token source d_model"]


def read_blocks(
    store: Store,
    n_blocks: int,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda n_tokens: None,
    ranks: Ranks = ALONE,
    device: torch.device = CPU,
) -> Iterator[Read]:
    """Yield every counted token of a store once, block by block, with one batch in memory at a time.

    Several ranks take turns; `advance` counts the tokens of all of them. The activations are moved to `device`. While a GPU
    works on a batch, a thread reads the next one.
    """
    reads = _reads(store, n_blocks, batch_tokens, advance, ranks)
    for read in read_ahead(reads, 1) if is_asynchronous(device) else reads:
        yield read._replace(h=send(read.h, device))


def _reads(store: Store, n_blocks: int, batch_tokens: int, advance: Callable[[int], None], ranks: Ranks) -> Iterator[Read]:
    """The same in the host's memory."""
    counted = store.counted
    batches = (
        (block, batch)
        for block, numbers in enumerate(blocks_of_sequences(store, n_blocks))
        for batch in store.batches_of_sequences(numbers, batch_tokens)
    )
    for number, (block, batch) in enumerate(batches):
        advance(len(batch.rows))
        keep = counted[batch.rows]
        if ranks.has(number) and keep.any():
            rows = batch.rows[keep]
            yield Read(block, rows, torch.from_numpy(batch.sequence[keep]), batch.numbers, store.gather(rows))


def coded(crosscoder: Crosscoder, store: Store, read: Read) -> Chunk:
    """Encode a batch of a store that was read to the crosscoder's device."""
    index = source_indices(store, crosscoder.view.reads)
    reads_all = crosscoder.view.reads == store.sources
    x = crosscoder.normalise(read.h if reads_all else read.h[:, index])
    code = encode(crosscoder, x)
    reconstruction = code.decode(crosscoder.decoder)
    return Chunk(
        block=read.block,
        rows=read.rows,
        sequence=read.sequence,
        numbers=read.numbers,
        x=x.flatten(1),
        code=code,
        v=crosscoder.v(code),
        reconstruction=reconstruction,
        error=(x.flatten(1) - reconstruction).sub_(crosscoder.decoder_bias),
        h=read.h,
    )


def chunks(
    crosscoder: Crosscoder,
    store: Store,
    n_blocks: int,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda n_tokens: None,
    ranks: Ranks = ALONE,
) -> Iterator[Chunk]:
    """Yield every counted token of a store once, encoded; see `read_blocks`."""
    check_fits(crosscoder, store)
    for read in read_blocks(store, n_blocks, batch_tokens, advance, ranks, crosscoder.encoder.device):
        yield coded(crosscoder, store, read)


def accumulate(
    passes: Sequence[tuple[Crosscoder, Sequence[Accumulator]]],
    store: Store,
    n_blocks: int,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda n_tokens: None,
    ranks: Ranks = ALONE,
) -> None:
    """Feed every counted token of a store to the accumulators of each crosscoder, encoded by it, and merge the ranks.

    Each batch is read once, by one of the ranks. The crosscoders are on one device.
    """
    for crosscoder, _ in passes:
        check_fits(crosscoder, store)
    device = passes[0][0].encoder.device if passes else CPU
    for read in read_blocks(store, n_blocks, batch_tokens, advance, ranks, device):
        for crosscoder, accumulators in passes:
            chunk = coded(crosscoder, store, read)
            for accumulator in accumulators:
                accumulator.add(chunk)
    for _, accumulators in passes:
        for accumulator in accumulators:
            accumulator.over(ranks)
