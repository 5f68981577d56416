"""The contexts that each latent is explained and scored on: its examples, and windows with and without activation."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from crossdiff.activations.store import Store
from crossdiff.errors import UserError
from crossdiff.files import open_sqlite
from crossdiff.integrity import intact, read_parquet
from crossdiff.interp.baseline import FIT_CONTEXTS
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.windows import Contexts, LatentActivations, Occurrences, TextSample, Window, find_activations
from crossdiff.latents.example_schema import FORMAT
from crossdiff.latents.stream import Coder


@dataclass(frozen=True)
class LatentContexts:
    """A latent with all contexts that it is interpreted from.

    Attributes:
        row: its row of the latent table.
        shown: the examples shown to the explainer.
        train, test: contexts from the training and the held-out split.
    """

    latent: int
    row: dict[str, Any]
    shown: list[Window]
    train: Contexts
    test: Contexts


def latent_contexts(
    coder: Coder,
    store: Store,
    table: pl.DataFrame,
    folder: Path,
    latents: list[int],
    config: InterpretConfig,
    advance: Callable[..., None],
) -> list[LatentContexts]:
    """The contexts of the given latents (or concepts); `folder` has their examples and neighbours."""
    neighbours = _read_neighbours(folder / "neighbours.parquet", latents)
    needed = np.unique(np.array([*latents, *(other for row in neighbours.values() for other in row)], dtype=np.int64))
    sizes = {"train": FIT_CONTEXTS, "heldout": config.contexts}
    samples = {split: TextSample.draw(store, split, config) for split in sizes}
    shown = _read_examples(folder / "examples.sqlite", samples["heldout"], latents)
    advance(0, total=sum(sample.n_tokens for sample in samples.values()))
    contexts: dict[str, dict[int, Contexts]] = {}
    for split, sample in samples.items():
        activations = find_activations(coder, sample, needed, config.batch_tokens, advance)
        finder = ContextFinder(sample, activations, config.seed)
        contexts[split] = {j: finder.contexts(j, neighbours.get(j, []), sizes[split], shown[j]) for j in latents}
    rows = {row["latent"]: row for row in table.filter(pl.col("latent").is_in(latents)).iter_rows(named=True)}
    return [LatentContexts(j, rows[j], shown[j], contexts["train"][j], contexts["heldout"][j]) for j in latents]


def _read_neighbours(path: Path, latents: list[int]) -> dict[int, list[int]]:
    """The neighbours of each latent, the nearest first."""
    table = read_parquet(path, "crossdiff analyze").sort("latent", "rank").filter(pl.col("latent").is_in(latents))
    return {latent: list(others) for latent, others in table.group_by("latent").agg("neighbour").iter_rows()}


def _read_examples(path: Path, sample: TextSample, latents: Sequence[int]) -> dict[int, list[Window]]:
    """Windows around each latent's quantile examples (or its strongest ones, if it has none), the strongest first."""
    if not path.is_file():
        raise UserError(f"{path} is missing; run `crossdiff analyze` to write it")
    query = "SELECT kind, sequence, position, positions, activations FROM examples WHERE latent = ? ORDER BY activation DESC"
    found = {}
    try:
        with closing(open_sqlite(intact(path))) as database:
            version = dict(database.execute("SELECT key, value FROM metadata")).get("format")
            if version != FORMAT:
                raise UserError(f"{path} has format {version!r}, expected {FORMAT!r}; run `crossdiff analyze` again")
            for latent in latents:
                rows = database.execute(query, (latent,)).fetchall()
                kind = "quantile" if any(row[0] == "quantile" for row in rows) else "top"
                found[latent] = _windows_of_rows(path, sample, [row[1:] for row in rows if row[0] == kind])
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} cannot be read ({error}); run `crossdiff analyze` again") from None
    return found


def _windows_of_rows(path: Path, sample: TextSample, rows: Sequence[tuple[int, int, bytes, bytes]]) -> list[Window]:
    """One window per sequence."""
    windows: dict[int, Window] = {}
    for sequence, position, positions, activations in rows:
        if not 0 <= sequence < len(sample.document):
            raise UserError(
                f"{path} has an example in sequence {sequence}, which the store lacks; run `crossdiff analyze` again"
            )
        window = sample.window(sequence, position, np.frombuffer(positions, "<i4"), np.frombuffer(activations, "<f4"))
        windows.setdefault(sequence, window)
    return list(windows.values())


class ContextFinder:
    """Finds the contexts of a latent: at most one per document, no text twice, no document of the shown examples."""

    def __init__(self, sample: TextSample, activations: LatentActivations, seed: int) -> None:
        self.sample = sample
        self.activations = activations
        self.seed = seed

    def contexts(self, latent: int, neighbours: list[int], size: int, shown: list[Window]) -> Contexts:
        """Up to `size` windows of each kind; the neighbours take turns, the nearest first."""
        generator = np.random.default_rng([self.seed, latent])
        active = self.activations.of_latent(latent)
        shown_documents = {window.document for window in shown}
        seen = {window.token_ids.tobytes() for window in shown}
        kinds: dict[str, list[Window]] = {}
        for kind, candidates in (
            ("active", self._around_maxima(active, generator)),
            ("similar", self._around_maxima_of(neighbours, generator)),
            ("random", self._anywhere(generator)),
        ):
            used = set(shown_documents)
            chosen: list[Window] = []
            for window in candidates:
                if len(chosen) == size:
                    break
                text = window.token_ids.tobytes()
                is_new = window.document not in used and text not in seen
                if is_new and (kind == "active" or not _is_active(active, window)):
                    used.add(window.document)
                    seen.add(text)
                    chosen.append(window)
            kinds[kind] = chosen
        return Contexts(kinds)

    def _around_maxima(self, active: Occurrences, generator: np.random.Generator) -> Iterator[Window]:
        for sequence in generator.permutation(sorted(active)).tolist():
            positions, values = active[sequence]
            yield self.sample.window(sequence, int(positions[values.argmax()]), positions, values)

    def _around_maxima_of(self, neighbours: list[int], generator: np.random.Generator) -> Iterator[Window]:
        waiting = [self._around_maxima(self.activations.of_latent(neighbour), generator) for neighbour in neighbours]
        while waiting:
            for candidates in list(waiting):
                window = next(candidates, None)
                if window is None:
                    waiting.remove(candidates)
                else:
                    yield window

    def _anywhere(self, generator: np.random.Generator) -> Iterator[Window]:
        lengths = np.diff(self.sample.bounds)
        for sequence in generator.permutation(self.sample.numbers).tolist():
            position = int(generator.integers(lengths[sequence]))
            yield self.sample.window(sequence, position, np.empty(0, np.int32), np.empty(0, np.float32))


def _is_active(active: Occurrences, window: Window) -> bool:
    if window.sequence not in active:
        return False
    positions, _ = active[window.sequence]
    return bool(((positions >= window.start) & (positions < window.stop)).any())
