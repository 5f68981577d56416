"""Windows of text around tokens, and where some latents are active in a sample of a store's sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.store import Store
from crossdiff.errors import UserError
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.latents.stream import Coder, encode

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a sequence.

    Attributes:
        marked: positions within the window where the latent is active; in a context of kind `similar`, its neighbour.
        values: v at the marked positions.
    """

    document: int
    sequence: int
    start: int
    stop: int
    token_ids: npt.NDArray[np.int32]
    marked: Integers
    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Contexts:
    """The windows of one latent in one split, by kind: active, similar and random."""

    kinds: dict[str, list[Window]]

    def items(self) -> Iterator[tuple[str, Window]]:
        for kind, windows in self.kinds.items():
            for window in windows:
                yield kind, window


@dataclass(frozen=True)
class TextSample:
    """Sequences of a store in random order, up to a number of tokens.

    Attributes:
        numbers: the sampled sequences.
        bounds: rows of every sequence of the store, `[sequence + 1]`.
        document: document of every sequence.
        token_id: token of every row.
        before, after: tokens of a window on either side of its central token.
    """

    store: Store
    numbers: Integers
    bounds: Integers
    document: npt.NDArray[np.int32]
    token_id: npt.NDArray[np.int32]
    before: int
    after: int

    @classmethod
    def draw(cls, store: Store, split: str, config: InterpretConfig) -> TextSample:
        """A seeded sample of the split's sequences."""
        bounds = store.sequences()
        document = store.column("document")[bounds[:-1]]
        lengths = np.diff(bounds)
        wanted = store.documents.filter(store.documents["split"] == split)["document"].to_numpy()
        members = np.flatnonzero(np.isin(document, wanted))
        if not len(members):
            raise UserError(
                f"the store {store.folder} has no {split} text; scores need held-out text, and their baseline training "
                "text; harvest with a heldout_share between 0 and 1"
            )
        members = np.random.default_rng([config.seed, len(members)]).permutation(members)
        chosen = members[np.cumsum(lengths[members]) - lengths[members] < config.tokens]
        return cls(store, chosen, bounds, document, store.column("token_id"), config.before, config.after)

    @property
    def n_tokens(self) -> int:
        return int(np.diff(self.bounds)[self.numbers].sum())

    def window(self, sequence: int, position: int, positions: npt.NDArray[Any], values: npt.NDArray[np.float32]) -> Window:
        """The tokens around a position; at one end of the sequence, the window extends further on the other side."""
        first, last = int(self.bounds[sequence]), int(self.bounds[sequence + 1])
        length = self.before + self.after + 1
        start = max(0, min(position - self.before, last - first - length))
        stop = min(last - first, start + length)
        inside = (positions >= start) & (positions < stop)
        return Window(
            int(self.document[sequence]), sequence, start, stop, self.token_id[first + start : first + stop],
            positions[inside].astype(np.int64) - start, values[inside],
        )  # fmt: skip


Occurrences = dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]
"""Sequence -> positions where a latent is active, and its v there."""


@dataclass(frozen=True)
class LatentActivations:
    """Where some latents are active, as (latent, token) pairs sorted by latent, sequence and position.

    Attributes:
        latents: the latents, sorted.
        bounds: the pairs of each latent, `[latent + 1]`.
        sequence, position, value: sequence, position and v of each pair.
    """

    latents: Integers
    bounds: Integers
    sequence: Integers
    position: npt.NDArray[np.int32]
    value: npt.NDArray[np.float32]

    def of_latent(self, latent: int) -> Occurrences:
        index = int(np.searchsorted(self.latents, latent))
        pairs = slice(self.bounds[index], self.bounds[index + 1])
        sequence = self.sequence[pairs]
        if not len(sequence):
            return {}
        cuts = np.flatnonzero(np.diff(sequence)) + 1
        parts = zip(np.split(self.position[pairs], cuts), np.split(self.value[pairs], cuts), strict=True)
        return dict(zip(sequence[np.concatenate([[0], cuts])].tolist(), parts, strict=True))


def find_activations(
    coder: Coder, sample: TextSample, latents: Integers, batch_tokens: int, advance: Callable[[int], None]
) -> LatentActivations:
    """Encode the sample and record where the given latents (sorted) are active; tokens that are skipped count as inactive."""
    store = sample.store
    positions = store.column("position")
    is_wanted = torch.zeros(coder.n_latents, dtype=torch.bool)
    is_wanted[torch.from_numpy(latents)] = True
    parts = []
    for batch in store.batches_of_sequences(np.sort(sample.numbers), batch_tokens):
        code = encode(coder, coder.inputs(store, batch.rows))
        device = code.latent.device
        counted = torch.from_numpy(store.counted[batch.rows]).to(device)
        kept = is_wanted.to(device)[code.latent] & counted[code.token]
        latent, token, v = (of[kept].cpu().numpy() for of in (code.latent, code.token, coder.v(code).float()))
        parts.append((latent, batch.numbers[batch.sequence[token]], positions[batch.rows[token]], v))
        advance(len(batch.rows))
    latent, sequence, position, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((position, sequence, latent))
    bounds = np.searchsorted(latent[order], np.append(latents, coder.n_latents))
    return LatentActivations(latents, bounds, sequence[order], position[order].astype(np.int32), value[order])
