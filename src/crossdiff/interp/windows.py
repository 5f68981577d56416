"""Pieces of sequences that a latent is explained and scored on, found in one pass over a part of the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store, consecutive
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.latents.stream import encode

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a sequence.

    Attributes:
        token_ids: its tokens; marked: those on which a latent is active, as places within it, and values: v there. For a
            window of kind similar it is the neighbour that is active there.
    """

    document: int
    sequence: int
    start: int
    stop: int
    token_ids: npt.NDArray[np.int32]
    marked: Integers
    values: npt.NDArray[np.float32]

    @property
    def content(self) -> bytes:
        """What two windows of the same words have in common."""
        return self.token_ids.tobytes()


@dataclass(frozen=True)
class Texts:
    """Sequences of a store in a random order, up to a number of tokens.

    Attributes:
        numbers: the sequences; bounds: rows of every sequence of the store, `[sequence + 1]`.
        document: of every sequence; token_id: of every row.
        before, after: tokens of a window on both sides of the token that it is made for.
    """

    store: Store
    numbers: Integers
    bounds: Integers
    document: npt.NDArray[np.int32]
    token_id: npt.NDArray[np.int32]
    before: int
    after: int

    @classmethod
    def of(cls, store: Store, split: str, config: InterpretConfig) -> Texts:
        """A seeded sample of the split's sequences.

        Raises:
            UserError: the split is empty.
        """
        bounds = store.sequences()
        document, lengths = store.column("document")[bounds[:-1]], np.diff(bounds)
        wanted = store.documents.filter(store.documents["split"] == split)["document"].to_numpy()
        members = np.flatnonzero(np.isin(document, wanted))
        if not len(members):
            raise UserError(
                f"the store {store.folder} has no {split} text, and latents are scored on held-out text, with a baseline "
                "fitted on training text; harvest with a heldout_share between 0 and 1"
            )
        members = np.random.default_rng([config.seed, len(members)]).permutation(members)
        chosen = members[np.cumsum(lengths[members]) - lengths[members] < config.tokens]
        return cls(store, chosen, bounds, document, store.column("token_id"), config.before, config.after)

    def window(self, sequence: int, position: int, positions: npt.NDArray[Any], values: npt.NDArray[np.float32]) -> Window:
        """The tokens around a position; room that is missing on one side goes to the other."""
        first, last = int(self.bounds[sequence]), int(self.bounds[sequence + 1])
        length = self.before + self.after + 1
        start = max(0, min(position - self.before, last - first - length))
        stop = min(last - first, start + length)
        inside = (positions >= start) & (positions < stop)
        return Window(
            int(self.document[sequence]), sequence, start, stop, self.token_id[first + start : first + stop],
            positions[inside].astype(np.int64) - start, values[inside],
        )  # fmt: skip


@dataclass(frozen=True)
class Activations:
    """Where some latents are active in some sequences: a pair is a latent and a token, sorted by latent, then as read.

    Attributes:
        latents: those that were looked for; bounds: their pairs, `[latent + 1]`.
        sequence, position, value: of each pair.
    """

    latents: Integers
    bounds: Integers
    sequence: Integers
    position: npt.NDArray[np.int32]
    value: npt.NDArray[np.float32]

    def by_sequence(self, latent: int) -> dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """Sequence -> where the latent is active in it, and how strongly."""
        index = int(np.searchsorted(self.latents, latent))
        pairs = slice(self.bounds[index], self.bounds[index + 1])
        sequence = self.sequence[pairs]
        cuts = np.flatnonzero(np.diff(sequence)) + 1
        parts = zip(np.split(self.position[pairs], cuts), np.split(self.value[pairs], cuts), strict=True)
        return dict(zip(sequence[np.concatenate([[0], cuts])].tolist(), parts, strict=True)) if len(sequence) else {}


def activations_of(
    crosscoder: Crosscoder, texts: Texts, latents: Integers, batch_tokens: int, advance: Callable[[int], None]
) -> Activations:
    """Read the texts once and note where the latents (sorted) are active; left-out positions count as silent."""
    store, index, norms = texts.store, source_indices(texts.store, crosscoder.view.reads), crosscoder.norms().sum(1)
    positions, wanted = store.column("position"), np.zeros(crosscoder.n_latents, dtype=bool)
    wanted[latents] = True
    parts = []
    for rows, sequence in _batches(texts, batch_tokens):
        code = encode(crosscoder, crosscoder.normalise(store.gather(rows)[:, index]))
        latent, token = code.latent.numpy(), code.token.numpy()
        v = (code.values * norms[code.latent]).float().numpy()
        kept = wanted[latent] & (positions[rows[token]] >= store.leave_out)
        token = token[kept]
        parts.append((latent[kept], sequence[token], positions[rows[token]], v[kept]))
        advance(len(rows))
    latent, sequence, position, value = (np.concatenate([part[i] for part in parts]) for i in range(4))
    # Batches hold whole sequences; within a batch the pairs of a latent come in the order of the tokens only after sorting.
    order = np.lexsort((position, sequence, latent))
    bounds = np.searchsorted(latent[order], np.append(latents, crosscoder.n_latents))
    return Activations(latents, bounds, sequence[order], position[order].astype(np.int32), value[order])


def _batches(texts: Texts, batch_tokens: int) -> Iterator[tuple[Integers, Integers]]:
    """Rows of the store and the sequence of each."""
    bounds = texts.bounds
    members = np.sort(texts.numbers)
    lengths = bounds[members + 1] - bounds[members]
    for first, last in consecutive(np.concatenate([[0], np.cumsum(lengths)]), batch_tokens):
        numbers = members[first:last]
        rows = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in numbers])
        yield rows, np.repeat(numbers, lengths[first:last])


@dataclass(frozen=True)
class Contexts:
    """Windows of one latent in one split: `kinds` has active, random and similar."""

    kinds: dict[str, list[Window]]

    def items(self) -> Iterator[tuple[str, Window]]:
        for kind, windows in self.kinds.items():
            for window in windows:
                yield kind, window


class Finder:
    """Finds the contexts of a latent: one a document, no words twice, none from the documents that were shown."""

    def __init__(self, texts: Texts, activations: Activations, seed: int) -> None:
        self.texts, self.activations, self.seed = texts, activations, seed
        self._length = np.diff(texts.bounds)

    def contexts(self, latent: int, neighbours: list[int], size: int, shown: list[Window]) -> Contexts:
        """Up to `size` windows of each kind; the neighbours take turns, the nearest first."""
        generator = np.random.default_rng([self.seed, latent])
        active = self.activations.by_sequence(latent)
        taken = {window.document for window in shown}
        seen = {window.content for window in shown}
        kinds: dict[str, list[Window]] = {}
        for kind, candidates in (
            ("active", self._at_maxima(active, generator)),
            ("similar", self._of_neighbours(neighbours, generator)),
            ("random", self._anywhere(generator)),
        ):
            used, chosen = set(taken), list[Window]()
            for window in candidates:
                if len(chosen) == size:
                    break
                fresh = window.document not in used and window.content not in seen
                if fresh and (kind == "active" or self._is_silent(active, window)):
                    used.add(window.document)
                    seen.add(window.content)
                    chosen.append(window)
            kinds[kind] = chosen
        return Contexts(kinds)

    def _at_maxima(self, active: dict[int, Any], generator: np.random.Generator) -> Iterator[Window]:
        for sequence in generator.permutation(sorted(active)).tolist():
            positions, values = active[sequence]
            yield self.texts.window(sequence, int(positions[values.argmax()]), positions, values)

    def _anywhere(self, generator: np.random.Generator) -> Iterator[Window]:
        nothing = np.empty(0, np.int32), np.empty(0, np.float32)
        for sequence in generator.permutation(self.texts.numbers).tolist():
            yield self.texts.window(sequence, int(generator.integers(self._length[sequence])), *nothing)

    def _of_neighbours(self, neighbours: list[int], generator: np.random.Generator) -> Iterator[Window]:
        waiting = [self._at_maxima(self.activations.by_sequence(neighbour), generator) for neighbour in neighbours]
        while waiting:
            for candidates in list(waiting):
                window = next(candidates, None)
                if window is None:
                    waiting.remove(candidates)
                else:
                    yield window

    def _is_silent(self, active: dict[int, Any], window: Window) -> bool:
        if window.sequence not in active:
            return True
        positions, _ = active[window.sequence]
        return not bool(((positions >= window.start) & (positions < window.stop)).any())
