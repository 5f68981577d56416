"""Shuffled training batches from a store: each token once per epoch, in an order that depends only on the seed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.store import Store
from crossdiff.activations.transfer import CPU, ToDevice, is_asynchronous, send
from crossdiff.errors import UserError
from crossdiff.shapes import Float, Tensor

BLOCK = 128
"""Number of rows that are read together. The blocks of an epoch come in random order."""
BUFFER_BYTES = 256_000_000
"""Size of the buffer whose rows are shuffled. A second buffer is filled while the first is used."""
SLICE = 8192
"""Number of rows that are read as float32 before they are converted to the stored type."""


class _Buffer(NamedTuple):
    """The rows of one part of an epoch, ascending, with their activations as stored."""

    rows: npt.NDArray[np.int64]
    activations: Float[Tensor, "row source d_model"]


class Batches:
    """Batches of a store's training tokens, as raw activations of the models.

    The batch of a step depends only on the step and the seed, so a resumed run sees the same batches as an uninterrupted one.
    An epoch is a random order of blocks of neighbouring rows, or of the harvest's forward passes (`harvest.storage`). As many
    of them as fit into memory are shuffled row by row. A store that fits entirely is read once and shuffled completely.

    The batches are on `device`. Those of a live store whose models are there never leave it. The others are sent there ahead:
    while one is used, a thread makes the next one.
    """

    def __init__(
        self, store: Store, batch_size: int, seed: int, buffer_bytes: int = BUFFER_BYTES, device: torch.device = CPU
    ) -> None:
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self.device = torch.empty(0, device=device).device  # with the index of an accelerator, as tensors there have it
        self._home = store.home(self.device)
        self.rows = store.rows("train")
        check_batch_size(batch_size, len(self.rows), store)
        self._cuts = _block_bounds(store, self.rows)
        self.per_epoch = len(self.rows) // batch_size
        self._dtype = store.float_dtype
        row_bytes = len(store.sources) * store.d_model * self._dtype.itemsize
        fits = row_bytes * len(self.rows) <= 2 * buffer_bytes  # a store that fits needs no second buffer
        self._per_buffer = self.per_epoch if fits else max(1, min(self.per_epoch, buffer_bytes // (row_bytes * batch_size)))
        self._buffers = _ReadAhead(self._read)
        self._epoch = -1
        self._epoch_rows: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._shuffled_key = (-1, -1)
        self._shuffled: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._sender = ThreadPoolExecutor(1)
        self._sent: tuple[int, Future[ToDevice]] | None = None

    def __getitem__(self, step: int) -> Float[Tensor, "batch source d_model"]:
        if self._home == self.device or not is_asynchronous(self.device):
            return self._chosen(step).to(self.device).float()
        sent = self._sent if self._sent is not None and self._sent[0] == step else (step, self._sender.submit(self._send, step))
        batch = sent[1].result().wait().float()
        self._sent = (step + 1, self._sender.submit(self._send, step + 1))
        return batch

    def _send(self, step: int) -> ToDevice:
        return ToDevice(self._chosen(step), self.device)

    def _chosen(self, step: int) -> Float[Tensor, "batch source d_model"]:
        """The rows of a step's batch, as they are in the buffer."""
        epoch, index = divmod(step, self.per_epoch)
        number, offset = divmod(index, self._per_buffer)
        buffer = self._buffers.get(self._key(epoch, number), self._key(*self._after(epoch, number)))
        if self._shuffled_key != (epoch, number):
            self._shuffled = np.random.default_rng([self.seed, epoch, number]).permutation(len(buffer.rows))
            self._shuffled_key = (epoch, number)
        chosen = self._shuffled[offset * self.batch_size : (offset + 1) * self.batch_size]
        return buffer.activations.index_select(0, send(torch.from_numpy(chosen), self._home))

    def describe(self, step: int) -> str:
        """Position of a step's batch in the data, in words."""
        epoch, index = divmod(step, self.per_epoch)
        return f"batch {index + 1} of {self.per_epoch} in epoch {epoch + 1} of the order of seed {self.seed}"

    def close(self) -> None:
        """Release the memory of the buffers and stop reading ahead."""
        self._sender.shutdown(cancel_futures=True)
        self._sent = None
        self._buffers.close()

    @property
    def _fits(self) -> bool:
        return self._per_buffer == self.per_epoch

    def _key(self, epoch: int, number: int) -> tuple[int, int]:
        """Identify the content of a buffer. A store that fits entirely has the same content in every epoch."""
        return (0, 0) if self._fits else (epoch, number)

    def _after(self, epoch: int, number: int) -> tuple[int, int]:
        is_last = (number + 1) * self._per_buffer >= self.per_epoch
        return (epoch + 1, 0) if is_last else (epoch, number + 1)

    def _read(self, key: tuple[int, int]) -> _Buffer:
        epoch, number = key
        if self._fits:
            rows = self.rows
        else:
            first = number * self._per_buffer * self.batch_size
            rows = np.sort(self._order_of(epoch)[first : first + self._per_buffer * self.batch_size])
        shape = (len(rows), len(self.store.sources), self.store.d_model)
        activations = torch.empty(shape, dtype=self._dtype, device=self._home)
        for start in range(0, len(rows), SLICE):
            activations[start : start + SLICE] = self.store.gather(rows[start : start + SLICE], self._home)
        return _Buffer(rows, activations)

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        """The training rows in an epoch's random order of blocks."""
        if epoch != self._epoch:
            blocks = np.random.default_rng([self.seed, epoch]).permutation(len(self._cuts) - 1)
            self._epoch_rows = np.concatenate([self.rows[self._cuts[block] : self._cuts[block + 1]] for block in blocks])
            self._epoch = epoch
        return self._epoch_rows


def check_batch_size(batch_size: int, n_tokens: int, store: Store) -> None:
    """Raises `UserError` if a batch is larger than a store's training tokens, of which there are `n_tokens`."""
    if n_tokens < batch_size:
        raise UserError(f"batch_size {batch_size} is larger than the {n_tokens} training tokens of {store.folder}; lower it")


def _block_bounds(store: Store, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bounds, as indices into `rows`, of the blocks that stay together."""
    if store.order == "blocks":
        return np.append(np.arange(0, len(rows), BLOCK), len(rows))
    return np.unique(np.searchsorted(rows, store.passes))


class _ReadAhead:
    """Keeps the current buffer, and reads the next one in a thread."""

    def __init__(self, read: Callable[[tuple[int, int]], _Buffer]) -> None:
        self._reader = ThreadPoolExecutor(1)
        self._read = read
        self._key: tuple[int, int] | None = None
        self._buffer: _Buffer | None = None
        self._next: tuple[tuple[int, int], Future[_Buffer]] | None = None

    def get(self, key: tuple[int, int], next_key: tuple[int, int]) -> _Buffer:
        """Return the buffer of `key`, and start to read that of `next_key`."""
        if key != self._key or self._buffer is None:
            self._buffer = None  # frees its memory before the next buffer is complete
            if self._next is not None and self._next[0] == key:
                self._buffer = self._next[1].result()
            else:
                self._buffer = self._reader.submit(self._read, key).result()
            self._key, self._next = key, None
            if next_key != key:
                self._next = (next_key, self._reader.submit(self._read, next_key))
        return self._buffer

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._buffer, self._next, self._key = None, None, None


def source_indices(store: Store, sources: tuple[str, ...]) -> Tensor:
    """Positions of the named sources in the store. A `UserError` names a source that the store lacks."""
    for name in sources:
        if name not in store.sources:
            raise UserError(f"the store {store.folder} has no source {name!r}; it has {', '.join(store.sources)}")
    return torch.tensor([store.sources.index(name) for name in sources])
