"""The contexts in which each latent fires: the strongest ones, and a sample over the quantiles of its activation.

They are collected in the one pass over the store. What is kept of a latent is the largest maxima and a random sample of the
others, both among *distinct* contexts (the maximum's token and the `CONTEXT` tokens before it), each with the activation on
every token of its sequence. Both are exact whatever the order of the sequences: a context that falls behind `examples` better
ones never comes back but with a larger maximum, and the sample holds the contexts of the smallest hashes (Bar-Yossef et al.
2002), so that a context met again is recognised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig
from crossdiff.latents.stream import Chunk
from crossdiff.ranks import Ranks
from crossdiff.shapes import Float, Tensor

QUANTILES = (0.25, 0.5, 0.75, 0.95, 1.0)
SAMPLED_PER_EXAMPLE = 4
"""Size of the sample over the number of quantile examples picked from it: the finer, the nearer to the quantiles they lie."""
CONTEXT = 8
"""Two examples of a latent are duplicates when the maximum and this many tokens before it are the same."""
ROOM = 1 << 20
"""Active pairs that are collected before the first selection."""

Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Candidates:
    """Latents on sequences. Candidate c has the pairs `bounds[c]` to `bounds[c + 1]` of `positions` and `activations`.

    Attributes:
        latent, sequence: which latent on which sequence of the store, `[candidate]`.
        key: hash of the context before the maximum, the latent and the seed, `[candidate]`.
        value: largest v on the sequence, and peak: its position, `[candidate]`.
        positions, activations: where the latent is active in the sequence and with which v, `[pair]`.
    """

    latent: Integers
    sequence: Integers
    key: Hashes
    value: npt.NDArray[np.float32]
    peak: npt.NDArray[np.int32]
    bounds: Integers
    positions: npt.NDArray[np.int32]
    activations: npt.NDArray[np.float32]

    @property
    def n_pairs(self) -> int:
        return len(self.positions)

    def take(self, chosen: Integers) -> Candidates:
        """The chosen candidates, in the order given."""
        lengths = (self.bounds[1:] - self.bounds[:-1])[chosen]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        pairs = np.arange(bounds[-1]) + np.repeat(self.bounds[chosen] - bounds[:-1], lengths)
        return Candidates(
            self.latent[chosen], self.sequence[chosen], self.key[chosen], self.value[chosen], self.peak[chosen],
            bounds, self.positions[pairs], self.activations[pairs],
        )  # fmt: skip

    @classmethod
    def none(cls) -> Candidates:
        integers, small, values = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
        return cls(integers, integers, np.empty(0, np.uint64), values, small, np.zeros(1, np.int64), small, values)

    @classmethod
    def joined(cls, parts: Sequence[Candidates]) -> Candidates:
        """One after the other; at least one part."""
        columns = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(cls)
            if field.name != "bounds"
        }
        lengths = np.concatenate([np.diff(part.bounds) for part in parts])
        return cls(**columns, bounds=np.concatenate([[0], np.cumsum(lengths)]))

    def __getitem__(self, candidate: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Positions and activations of one candidate."""
        pairs = slice(self.bounds[candidate], self.bounds[candidate + 1])
        return self.positions[pairs], self.activations[pairs]


def mixed(values: Hashes) -> Hashes:
    """A bijection of the 64-bit numbers whose results look random (the finaliser of SplitMix64; Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def context_hashes(token_ids: npt.NDArray[np.int32], rows: Integers, positions: Integers) -> Hashes:
    """A hash per row of its token and the `CONTEXT` tokens before it in its sequence; `positions` are those of the rows."""
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for back in range(CONTEXT, -1, -1):
        inside = positions >= back
        token = np.where(inside, token_ids[np.where(inside, rows - back, 0)].astype(np.int64) + 1, 0)
        hashes = mixed(hashes + token.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return hashes


def candidates_of(chunk: Chunk, v: Float[Tensor, " pair"], contexts: Hashes, positions: Integers, seed: int) -> Candidates:
    """Every latent on every sequence of a chunk where it is active.

    Args:
        v: of the chunk's active pairs; contexts, positions: hash and position of the chunk's tokens.
    """
    code = chunk.code
    # The chunk's tokens follow their sequences, so the pairs of a latent and a sequence lie together in the order by latent.
    order = code.by_latent[0].numpy()
    latent, token, ordered = code.latent.numpy()[order], code.token.numpy()[order], v.float().numpy()[order]
    sequence = chunk.sequence.numpy()[token]
    changes = (latent[1:] != latent[:-1]) | (sequence[1:] != sequence[:-1])
    bounds = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(latent)]])
    starts = bounds[:-1]
    value = np.maximum.reduceat(ordered, starts)
    index = np.arange(len(latent))
    first_largest = np.minimum.reduceat(np.where(ordered == np.repeat(value, np.diff(bounds)), index, len(index)), starts)
    latent, place = latent[starts], positions[token].astype(np.int32)
    stream = mixed(latent.astype(np.uint64) + (np.uint64(seed) << np.uint64(32)))
    return Candidates(
        latent, chunk.numbers[sequence[starts]], mixed(contexts[token[first_largest]] ^ stream), value,
        place[first_largest], bounds, place, ordered,
    )  # fmt: skip


def _place_in_run(values: Integers) -> Integers:
    """Of each entry of a sorted array, how many equal ones stand before it."""
    return np.arange(len(values)) - np.searchsorted(values, values)


@dataclass(frozen=True)
class Ranking:
    """The distinct contexts among some candidates, in their order.

    Attributes:
        candidate: index of the best candidate of each context (of equal ones that of the first sequence).
        by_value: rank of its value among those of its latent, 0 the largest (of equal values the smallest key); by_key: of its
            key, 0 the smallest.
    """

    candidate: Integers
    by_value: Integers
    by_key: Integers

    @classmethod
    def of(cls, candidates: Candidates) -> Ranking:
        order = np.lexsort((candidates.sequence, -candidates.value, candidates.key, candidates.latent))
        latent, key = candidates.latent[order], candidates.key[order]
        distinct = np.concatenate([[True], (latent[1:] != latent[:-1]) | (key[1:] != key[:-1])])[: len(order)]
        chosen = order[distinct]
        by_key = _place_in_run(latent[distinct])
        back = np.argsort(chosen)
        chosen, by_key = chosen[back], by_key[back]
        strongest = np.lexsort((candidates.key[chosen], -candidates.value[chosen], candidates.latent[chosen]))
        by_value = np.empty_like(by_key)
        by_value[strongest] = _place_in_run(candidates.latent[chosen][strongest])
        return cls(chosen, by_value, by_key)


@dataclass(frozen=True)
class Example:
    """One row of the database: `kind` is "top" (`quantile` None) or "quantile"; `rank` 0 is the strongest of its kind."""

    latent: int
    kind: str
    quantile: float | None
    rank: int
    candidate: int


class ExampleCollector:
    """Collects the candidates of every latent in bounded memory.

    After each selection a latent has at most `examples` + the sample's size of them; between selections at most as many pairs
    again are collected, of those only that could still be selected.
    """

    def __init__(self, store: Store, n_latents: int, config: AnalyzeConfig) -> None:
        self.n_top, self.n_per_quantile, self.seed = config.examples, config.examples_per_quantile, config.seed
        self.n_sampled = self.n_per_quantile * len(QUANTILES) * SAMPLED_PER_EXAMPLE
        self._token_ids, self._position = store.column("token_id"), store.column("position")
        self._parts = [Candidates.none()]
        self._n_pairs, self._limit = 0, ROOM
        self._least_value = np.zeros(n_latents, dtype=np.float32)
        self._largest_key = np.full(n_latents, np.iinfo(np.uint64).max if self.n_sampled else 0, dtype=np.uint64)

    def add(self, chunk: Chunk, norms: Float[Tensor, " latent"]) -> None:
        """Add a chunk of whole sequences; `norms` are the sums of the decoder norms."""
        if not len(chunk.code.values):
            return
        positions = self._position[chunk.rows].astype(np.int64)
        contexts = context_hashes(self._token_ids, chunk.rows, positions)
        found = candidates_of(chunk, chunk.code.values * norms[chunk.code.latent], contexts, positions, self.seed)
        hopeful = (found.value >= self._least_value[found.latent]) | (found.key <= self._largest_key[found.latent])
        self._parts.append(found.take(np.flatnonzero(hopeful)))
        self._n_pairs += self._parts[-1].n_pairs
        if self._n_pairs > self._limit:
            self._select()

    def _select(self) -> None:
        """Keep what is among the strongest or in the sample, and note what a candidate must beat from now on."""
        candidates = Candidates.joined(self._parts)
        ranking = Ranking.of(candidates)
        kept = (ranking.by_value < self.n_top) | (ranking.by_key < self.n_sampled)
        last_top, last_sampled = ranking.by_value == self.n_top - 1, ranking.by_key == self.n_sampled - 1
        for mask, bound, column in (
            (last_top, self._least_value, candidates.value), (last_sampled, self._largest_key, candidates.key),
        ):  # fmt: skip
            chosen = ranking.candidate[mask]
            bound[candidates.latent[chosen]] = column[chosen]
        self._parts = [candidates.take(ranking.candidate[kept])]
        self._n_pairs = self._parts[0].n_pairs
        self._limit = 2 * self._n_pairs + ROOM

    def over(self, ranks: Ranks) -> ExampleCollector:
        """Merge on the first rank what several have collected, however the sequences were dealt out."""
        if ranks.size > 1:
            self._select()
            self._parts = ranks.collect(self._parts[0]) or self._parts
        return self

    def finish(self) -> tuple[Candidates, list[Example]]:
        """The candidates, and the examples picked from them: per latent the strongest first, then those of the quantiles."""
        self._select()
        candidates, ranking = self._parts[0], Ranking.of(self._parts[0])
        examples = []
        for members in _of_each_latent(candidates.latent):
            # No context occurs twice any more, so that the ranking holds the candidates in their order.
            latent, by_value = int(candidates.latent[members[0]]), members[np.argsort(ranking.by_value[members])]
            examples += [Example(latent, "top", None, rank, int(c)) for rank, c in enumerate(by_value[: self.n_top])]
            sample = by_value[ranking.by_key[by_value] < self.n_sampled]
            picks = quantile_picks(candidates.value[sample], self.n_per_quantile)
            examples += [Example(latent, "quantile", q, rank, int(sample[i])) for rank, (q, i) in enumerate(picks)]
        return candidates, examples


def _of_each_latent(latent: Integers) -> Iterator[Integers]:
    """The candidates of each latent that has any."""
    order = np.argsort(latent, kind="stable")
    return (part for part in np.split(order, np.flatnonzero(np.diff(latent[order])) + 1) if len(part))


def quantile_picks(values: npt.NDArray[Any], per_quantile: int) -> list[tuple[float, int]]:
    """Indices of the values nearest to each quantile, each index used once: `(quantile, index)`, from the highest down."""
    order = np.argsort(values, kind="stable")
    free, picks = list(range(len(order))), []
    for quantile in reversed(QUANTILES):
        wanted = quantile * (len(order) - 1)
        for position in sorted(free, key=lambda place: (abs(place - wanted), place))[:per_quantile]:
            free.remove(position)
            picks.append((quantile, int(order[position])))
    return picks
