"""Shuffled training batches from a store: each token once per epoch, in an order that depends on the seed alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.store import Store
from crossdiff.config import UserError
from crossdiff.shapes import Float, Tensor


class Batches:
    """Normalised batches `[batch, source, d_model]` of a store's training tokens.

    The batch of a step is a function of the step and the seed, so that a resumed run sees what an undisturbed one sees.

    Raises:
        UserError: the store has fewer training tokens than a batch.
    """

    def __init__(self, store: Store, batch_size: int, seed: int) -> None:
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self.rows = store.rows("train")
        if len(self.rows) < batch_size:
            raise UserError(f"batch_size {batch_size} is larger than the {len(self.rows)} training tokens of {store.folder}")
        self.per_epoch = len(self.rows) // batch_size
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._mean = store.normalisation.mean.float()
        self._scale = store.normalisation.scale

    def __getitem__(self, step: int) -> Float[Tensor, "batch source d_model"]:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            self._epoch = epoch
        rows = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return (self.store.gather(rows) - self._mean) * self._scale


def source_indices(store: Store, sources: tuple[str, ...]) -> Tensor:
    """Positions of the named sources in the store.

    Raises:
        UserError: the store lacks one.
    """
    for name in sources:
        if name not in store.sources:
            raise UserError(f"the store {store.folder} has no source {name!r}; it has {', '.join(store.sources)}")
    return torch.tensor([store.sources.index(name) for name in sources])
