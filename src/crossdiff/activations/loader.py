"""Shuffled training batches from a store: each token once per epoch, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.store import Store
from crossdiff.errors import UserError
from crossdiff.shapes import Float, Tensor

BLOCK = 128
"""Rows that are read together; blocks of an epoch come in random order."""
BUFFER_BYTES = 256_000_000
"""Memory of the rows that are shuffled together; one more such buffer is filled while one is used."""
SLICE = 8192
"""Rows that are read as float32 before they are narrowed to the stored type."""


@dataclass(frozen=True)
class _Buffer:
    """The rows of one part of an epoch, ascending, with their activations as stored."""

    rows: npt.NDArray[np.int64]
    activations: Float[Tensor, "row source d_model"]


class Batches:
    """Batches of a store's training tokens, in the models' space.

    The batch of a step is a function of the step and the seed, so that a resumed run sees what an undisturbed one sees.
    An epoch is a random order of blocks of neighbouring rows, or of the harvest's forward passes (`harvest.storage`); as
    many as fit into memory are shuffled row by row. A store that fits as a whole is read once and shuffled completely.

    Raises:
        UserError: the store has fewer training tokens than a batch.
    """

    def __init__(self, store: Store, batch_size: int, seed: int, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self.rows = store.rows("train")
        if len(self.rows) < batch_size:
            raise UserError(f"batch_size {batch_size} is larger than the {len(self.rows)} training tokens of {store.folder}")
        self._cuts = _cuts(store, self.rows)
        self.per_epoch = len(self.rows) // batch_size
        self._dtype = store.float_dtype
        row_bytes = len(store.sources) * store.d_model * self._dtype.itemsize
        fits = row_bytes * len(self.rows) <= 2 * buffer_bytes  # then there is no next buffer to make room for
        self._per_buffer = self.per_epoch if fits else max(1, min(self.per_epoch, buffer_bytes // (row_bytes * batch_size)))
        self._buffers = _Ahead(self._read)
        self._epoch = -1
        self._blocks: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._order: tuple[tuple[int, int], npt.NDArray[np.int64]] = ((-1, -1), np.empty(0, dtype=np.int64))

    def __getitem__(self, step: int) -> Float[Tensor, "batch source d_model"]:
        epoch, index = divmod(step, self.per_epoch)
        number, place = divmod(index, self._per_buffer)
        buffer = self._buffers.get(self._key(epoch, number), self._key(*self._after(epoch, number)))
        if self._order[0] != (epoch, number):
            shuffled = np.random.default_rng([self.seed, epoch, number]).permutation(len(buffer.rows))
            self._order = ((epoch, number), shuffled)
        chosen = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        return buffer.activations[torch.from_numpy(chosen)].float()

    def place(self, step: int) -> str:
        """Where in the data a step's batch is, in words."""
        epoch, index = divmod(step, self.per_epoch)
        return f"batch {index + 1} of {self.per_epoch} in epoch {epoch + 1} of the order of seed {self.seed}"

    def close(self) -> None:
        """Give the buffers' memory back and end the reading ahead."""
        self._buffers.close()

    @property
    def _is_whole(self) -> bool:
        return self._per_buffer == self.per_epoch

    def _key(self, epoch: int, number: int) -> tuple[int, int]:
        """What a buffer holds: a store that fits as a whole is the same in every epoch."""
        return (0, 0) if self._is_whole else (epoch, number)

    def _after(self, epoch: int, number: int) -> tuple[int, int]:
        last = (number + 1) * self._per_buffer >= self.per_epoch
        return (epoch + 1, 0) if last else (epoch, number + 1)

    def _read(self, key: tuple[int, int]) -> _Buffer:
        epoch, number = key
        if self._is_whole:
            rows = self.rows
        else:
            first = number * self._per_buffer * self.batch_size
            rows = np.sort(self._epoch_order(epoch)[first : first + self._per_buffer * self.batch_size])
        activations = torch.empty(len(rows), len(self.store.sources), self.store.d_model, dtype=self._dtype)
        for start in range(0, len(rows), SLICE):
            activations[start : start + SLICE] = self.store.gather(rows[start : start + SLICE])
        return _Buffer(rows, activations)

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The training rows in an epoch's random order of blocks."""
        if epoch != self._epoch:
            blocks = np.random.default_rng([self.seed, epoch]).permutation(len(self._cuts) - 1)
            self._blocks = np.concatenate([self.rows[self._cuts[block] : self._cuts[block + 1]] for block in blocks])
            self._epoch = epoch
        return self._blocks


def _cuts(store: Store, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where in `rows` the blocks begin that stay together, and the end."""
    if store.order == "blocks":
        return np.append(np.arange(0, len(rows), BLOCK), len(rows))
    return np.unique(np.searchsorted(rows, store.passes))


class _Ahead:
    """Keeps the buffer in use, and reads the one after it in a thread of its own."""

    def __init__(self, read: Callable[[tuple[int, int]], _Buffer]) -> None:
        self._reader = ThreadPoolExecutor(1)
        self._read = read
        self._key: tuple[int, int] | None = None
        self._buffer: _Buffer | None = None
        self._next: tuple[tuple[int, int], Future[_Buffer]] | None = None

    def get(self, key: tuple[int, int], then: tuple[int, int]) -> _Buffer:
        """The buffer of `key`; that of `then` is going to be read meanwhile."""
        if key != self._key or self._buffer is None:
            self._buffer = None  # its memory is free before the next one is complete
            if self._next is not None and self._next[0] == key:
                self._buffer = self._next[1].result()
            else:
                self._buffer = self._reader.submit(self._read, key).result()
            self._key, self._next = key, None
            if then != key:
                self._next = (then, self._reader.submit(self._read, then))
        return self._buffer

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._buffer, self._next, self._key = None, None, None


def source_indices(store: Store, sources: tuple[str, ...]) -> Tensor:
    """Positions of the named sources in the store.

    Raises:
        UserError: the store lacks one.
    """
    for name in sources:
        if name not in store.sources:
            raise UserError(f"the store {store.folder} has no source {name!r}; it has {', '.join(store.sources)}")
    return torch.tensor([store.sources.index(name) for name in sources])
