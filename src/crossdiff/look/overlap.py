"""Whether a direction of the first look says the same as a latent or a concept, over a sample of held-out tokens.

Two measures per latent and direction u: the cosine of the latent's decoder direction in the chat model with u, and over tokens
the Pearson correlation of its activation f with the projection p = <h^chat - h^base, u>, in the models' own space:

    r = (n sum f p - sum f sum p) / sqrt((n sum f^2 - (sum f)^2) (n sum p^2 - (sum p)^2))

Where a latent is silent it adds nothing to the sums with f, so they come from sparse codes. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import SparseCode
from crossdiff.latents.decoder import CHAT_INDEX
from crossdiff.latents.stream import encode
from crossdiff.look.reading import OVERLAP_COLUMNS, OVERLAP_SCHEMA
from crossdiff.shapes import Float, Tensor
from crossdiff.sources import SOURCES

MAX_TOKENS = 100_000
"""Size of the sample."""
ROUNDING = 1e-12
"""Share of the sum of squares that a variance has to exceed; a smaller one is a rounding error of a constant."""


class Reader(NamedTuple):
    """What is compared with the look: the latents of a coder, or concepts.

    Attributes:
        directions: their decoder directions in the chat model, of any length.
        reads: the sources that it reads.
        code: from the activations of these sources in their own space to those of the latents.
    """

    directions: Float[Tensor, "latent d_model"]
    reads: tuple[str, ...]
    code: Callable[[Float[Tensor, "token source d_model"]], SparseCode]


def reader_of(coder: Crosscoder) -> Reader:
    """The latents of a coder."""
    return Reader(
        coder.directions()[CHAT_INDEX], coder.view.reads, lambda h: encode(coder, coder.normalise(h.to(coder.encoder)))
    )


class Sums:
    """Collects the sums over tokens that the correlations need."""

    def __init__(self, n_latents: int, n_directions: int) -> None:
        self.n = 0
        self.f, self.f2 = np.zeros(n_latents), np.zeros(n_latents)
        self.p, self.p2 = np.zeros(n_directions), np.zeros(n_directions)
        self.fp = np.zeros((n_latents, n_directions))

    def add(self, code: SparseCode, p: npt.NDArray[np.float64]) -> None:
        """Add tokens: their activations, and their projections `[token, direction]`."""
        pairs = (code.values.double().cpu().numpy(), (code.token.cpu().numpy(), code.latent.cpu().numpy()))
        f = sparse.csr_array(pairs, shape=(code.n_tokens, code.n_latents))
        self.n += len(p)
        self.f += f.sum(0)
        self.f2 += f.multiply(f).sum(0)
        self.p += p.sum(0)
        self.p2 += np.square(p).sum(0)
        self.fp += f.T @ p

    def correlations(self) -> npt.NDArray[np.float64]:
        """Pearson correlations, `[latent, direction]`; NaN where one side does not vary: a latent that is never active."""
        n = max(1, self.n)
        variances = []
        for total, square in ((self.f, self.f2), (self.p, self.p2)):
            variance = square - total**2 / n
            variances.append(np.where(variance > ROUNDING * square, variance, np.nan))
        found: npt.NDArray[np.float64] = (self.fp - np.outer(self.f, self.p) / n) / np.sqrt(np.outer(*variances))
        return found


def sampled_rows(store: Store, max_tokens: int = MAX_TOKENS, seed: int = 0) -> npt.NDArray[np.int64]:
    """Rows of the counted tokens of random held-out sequences, until there are `max_tokens`; of all if there are fewer.

    Raises:
        UserError: there are no held-out tokens.
    """
    rows = store.rows("heldout")
    _, number, n_tokens = np.unique(store.column("sequence")[rows], return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(n_tokens))
    n_chosen = int(np.searchsorted(np.cumsum(n_tokens[order]), max_tokens)) + 1
    return rows[np.isin(number, order[:n_chosen])]


def overlaps(
    readers: Sequence[Reader],
    store: Store,
    directions: pl.Series,
    vectors: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    batch_tokens: int,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> list[pl.DataFrame]:
    """One table per reader with the columns of `OVERLAP_COLUMNS`, a row per latent.

    Args:
        directions: names of the look's directions; vectors: the directions, `[direction, d_model]`.
        rows: the sample; read `batch_tokens` at a time.
    """
    units = _unit(vectors.astype(np.float64))
    base, chat = source_indices(store, SOURCES)
    sums = [Sums(len(reader.directions), len(units)) for reader in readers]
    index = [source_indices(store, reader.reads) for reader in readers]
    for first in range(0, len(rows), batch_tokens):
        h = store.gather(rows[first : first + batch_tokens])
        projections = (h[:, chat] - h[:, base]).double().numpy() @ units.T
        for reader, read, own in zip(readers, index, sums, strict=True):
            if len(reader.directions):
                own.add(reader.code(h[:, read]), projections)
        advance(len(h))
    tables = []
    for reader, own in zip(readers, sums, strict=True):
        cosines = _unit(reader.directions.cpu().double().numpy()) @ units.T
        columns = (*_strongest(cosines, directions), *_strongest(own.correlations(), directions))
        tables.append(pl.DataFrame(dict(zip(OVERLAP_COLUMNS, columns, strict=True)), schema=OVERLAP_SCHEMA))
    return tables


def _unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Vectors of length 1; NaN for those of length 0."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, np.nan)


def _strongest(values: npt.NDArray[np.float64], names: pl.Series) -> tuple[npt.NDArray[np.float64], list[str | None]]:
    """The value of largest size in each row of `[latent, direction]` and its direction; NaN and null where all are NaN."""
    if not len(names):
        return np.full(len(values), np.nan), [None] * len(values)
    best = np.where(np.isnan(values), -1.0, np.abs(values)).argmax(1)
    found = values[np.arange(len(values)), best]
    return found, [None if np.isnan(value) else names[int(at)] for value, at in zip(found, best, strict=True)]
