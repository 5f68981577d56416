"""The contexts in which each latent is active: the strongest ones, and a sample over the quantiles of its activation.

They are collected in the one pass over the store. For each latent, the collector keeps the contexts with the largest maxima and
a random sample of all contexts, each with the activation on every token of its sequence. Contexts are *distinct*: they differ
in the maximum's token or one of the `CONTEXT` tokens before it. Both selections are exact in any order of the sequences. A
context that falls behind `examples` better ones can only return with a larger maximum, and the sample holds the contexts with
the smallest hashes (Bar-Yossef et al. 2002), so a repeated context is recognised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig
from crossdiff.latents.stream import Coded
from crossdiff.ranks import Ranks

QUANTILES = (0.25, 0.5, 0.75, 0.95, 1.0)
SAMPLED_PER_EXAMPLE = 4
"""Size of the sample per quantile example picked from it; a larger sample has examples closer to the quantiles."""
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
        latent, sequence: the latent, and the sequence's index in the store, `[candidate]`.
        key: hash of the context before the maximum, the latent and the seed, `[candidate]`.
        value: largest v on the sequence; peak: its position, `[candidate]`.
        positions, activations: where in the sequence the latent is active, and v there, `[pair]`.
    """

    latent: Integers
    sequence: Integers
    key: Hashes
    value: npt.NDArray[np.float32]
    peak: npt.NDArray[np.int32]
    bounds: Integers
    positions: npt.NDArray[np.int32]
    activations: npt.NDArray[np.float32]

    def take(self, chosen: Integers) -> Candidates:
        """The chosen candidates, in the order given."""
        lengths = np.diff(self.bounds)[chosen]
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
        """The candidates of all parts, of which there is at least one, in order."""
        columns = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(cls)
            if field.name != "bounds"
        }
        lengths = np.concatenate([np.diff(part.bounds) for part in parts])
        return cls(**columns, bounds=np.concatenate([[0], np.cumsum(lengths)]))


def mixed(values: Hashes) -> Hashes:
    """A bijection of the 64-bit numbers whose results look random (the finaliser of SplitMix64; Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def context_hashes(token_ids: npt.NDArray[np.int32], rows: Integers, positions: Integers) -> Hashes:
    """A hash per row of its token and the `CONTEXT` tokens before it in its sequence.

    Args:
        positions: positions of the rows in their sequences.
    """
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for back in range(CONTEXT, -1, -1):
        inside = positions >= back
        token = np.where(inside, token_ids[np.where(inside, rows - back, 0)].astype(np.int64) + 1, 0)
        hashes = mixed(hashes + token.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return hashes


def candidates_of(chunk: Coded, contexts: Hashes, positions: Integers, seed: int) -> Candidates:
    """Every latent on every sequence of a chunk on which it is active.

    Args:
        contexts, positions: hash of the context and position of each of the chunk's tokens.
    """
    code = chunk.code
    # The chunk's tokens follow their sequences, so sorting by latent puts the pairs of a latent and a sequence together.
    order = code.by_latent[0]
    latent, token, v = (pairs[order].cpu().numpy() for pairs in (code.latent, code.token, chunk.v.float()))
    sequence = chunk.sequence.numpy()[token]
    changes = (latent[1:] != latent[:-1]) | (sequence[1:] != sequence[:-1])
    bounds = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(latent)]])
    starts = bounds[:-1]
    value = np.maximum.reduceat(v, starts)
    index = np.arange(len(latent))
    first_largest = np.minimum.reduceat(np.where(v == np.repeat(value, np.diff(bounds)), index, len(index)), starts)
    latent, position = latent[starts], positions[token].astype(np.int32)
    stream = mixed(latent.astype(np.uint64) + (np.uint64(seed) << np.uint64(32)))
    return Candidates(
        latent, chunk.numbers[sequence[starts]], mixed(contexts[token[first_largest]] ^ stream), value,
        position[first_largest], bounds, position, v,
    )  # fmt: skip


def _index_in_run(values: Integers) -> Integers:
    """For each entry of a sorted array, the number of equal entries before it."""
    return np.arange(len(values)) - np.searchsorted(values, values)


class Ranking(NamedTuple):
    """The distinct contexts among some candidates, in the candidates' order.

    Attributes:
        candidate: index of the best candidate of each context; of equal ones that of the first sequence.
        by_value: rank of its value within its latent, 0 the largest; of equal values the smallest key comes first.
        by_key: rank of its key within its latent, 0 the smallest.
    """

    candidate: Integers
    by_value: Integers
    by_key: Integers


def ranking_of(candidates: Candidates) -> Ranking:
    """Find and rank the distinct contexts."""
    order = np.lexsort((candidates.sequence, -candidates.value, candidates.key, candidates.latent))
    latent, key = candidates.latent[order], candidates.key[order]
    distinct = np.concatenate([[True], (latent[1:] != latent[:-1]) | (key[1:] != key[:-1])])[: len(order)]
    chosen = order[distinct]
    by_key = _index_in_run(latent[distinct])
    back = np.argsort(chosen)
    chosen, by_key = chosen[back], by_key[back]
    strongest = np.lexsort((candidates.key[chosen], -candidates.value[chosen], candidates.latent[chosen]))
    by_value = np.empty_like(by_key)
    by_value[strongest] = _index_in_run(candidates.latent[chosen][strongest])
    return Ranking(chosen, by_value, by_key)


class ExamplePick(NamedTuple):
    """An example of the database: `kind` is "top" (`quantile` None) or "quantile"; `rank` 0 is the strongest of its kind."""

    latent: int
    kind: str
    quantile: float | None
    rank: int
    candidate: int


class ExampleCollector:
    """Collects the candidates of every latent in bounded memory.

    A selection leaves each latent at most `examples` + the sample's size of them. Between selections at most as many pairs are
    added again, and only those that can still be selected.
    """

    def __init__(self, store: Store, n_latents: int, config: AnalyzeConfig) -> None:
        self.n_top = config.examples
        self.n_per_quantile = config.examples_per_quantile
        self.n_sampled = self.n_per_quantile * len(QUANTILES) * SAMPLED_PER_EXAMPLE
        self.seed = config.seed
        self._token_ids = store.column("token_id")
        self._position = store.column("position")
        self._parts = [Candidates.none()]
        self._n_pairs = 0
        self._limit = ROOM
        self._least_value = np.zeros(n_latents, dtype=np.float32)
        self._largest_key = np.full(n_latents, np.iinfo(np.uint64).max if self.n_sampled else 0, dtype=np.uint64)

    def add(self, chunk: Coded) -> None:
        """Add a chunk of whole sequences."""
        if not len(chunk.v):
            return
        positions = self._position[chunk.rows].astype(np.int64)
        contexts = context_hashes(self._token_ids, chunk.rows, positions)
        found = candidates_of(chunk, contexts, positions, self.seed)
        can_be_selected = (found.value >= self._least_value[found.latent]) | (found.key <= self._largest_key[found.latent])
        self._parts.append(found.take(np.flatnonzero(can_be_selected)))
        self._n_pairs += len(self._parts[-1].positions)
        if self._n_pairs > self._limit:
            self._select()

    def _select(self) -> None:
        """Keep the strongest candidates and the sample, and note what a later candidate must beat."""
        candidates = Candidates.joined(self._parts)
        ranking = ranking_of(candidates)
        last_top = ranking.candidate[ranking.by_value == self.n_top - 1]
        self._least_value[candidates.latent[last_top]] = candidates.value[last_top]
        last_sampled = ranking.candidate[ranking.by_key == self.n_sampled - 1]
        self._largest_key[candidates.latent[last_sampled]] = candidates.key[last_sampled]
        kept = (ranking.by_value < self.n_top) | (ranking.by_key < self.n_sampled)
        self._parts = [candidates.take(ranking.candidate[kept])]
        self._n_pairs = len(self._parts[0].positions)
        self._limit = 2 * self._n_pairs + ROOM

    def over(self, ranks: Ranks) -> ExampleCollector:
        """Merge the candidates of several ranks on the first one, however the sequences were distributed."""
        if ranks.size > 1:
            self._select()
            self._parts = ranks.collect(self._parts[0]) or self._parts
        return self

    def finish(self) -> tuple[Candidates, list[ExamplePick]]:
        """The candidates, and the examples picked from them: for each latent the strongest first, then those of quantiles."""
        self._select()
        candidates = self._parts[0]
        ranking = ranking_of(candidates)  # every context is distinct by now, so the ranking has the candidates' order
        order = np.lexsort((ranking.by_value, candidates.latent))
        picks = []
        for members in np.split(order, np.flatnonzero(np.diff(candidates.latent[order])) + 1):
            if not len(members):
                continue
            latent = int(candidates.latent[members[0]])
            picks += [ExamplePick(latent, "top", None, rank, int(c)) for rank, c in enumerate(members[: self.n_top])]
            sample = members[ranking.by_key[members] < self.n_sampled]
            quantiles = quantile_picks(candidates.value[sample], self.n_per_quantile)
            picks += [ExamplePick(latent, "quantile", q, rank, int(sample[i])) for rank, (q, i) in enumerate(quantiles)]
        return candidates, picks


def quantile_picks(values: npt.NDArray[Any], per_quantile: int) -> list[tuple[float, int]]:
    """Indices of the values nearest to each quantile, each used once: `(quantile, index)`, from the highest down."""
    order = np.argsort(values, kind="stable")
    free, picks = list(range(len(order))), []
    for quantile in reversed(QUANTILES):
        wanted = quantile * (len(order) - 1)
        for place in sorted(free, key=lambda place: (abs(place - wanted), place))[:per_quantile]:
            free.remove(place)
            picks.append((quantile, int(order[place])))
    return picks
