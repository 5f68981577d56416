"""The interpretation of one crosscoder: contexts, explanations, and every score, latent by latent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.activations.store import Store
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.interp.asker import Asker, Unanswered
from crossdiff.interp.baseline import FIT_CONTEXTS, bag_of_words
from crossdiff.interp.embedding import Encoder, similarity
from crossdiff.interp.explain import explanation_request, shown_windows
from crossdiff.interp.explanation_table import CONTEXT_SCHEMA, KINDS, SCHEMA, SCORES
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.prompts import DETECT, FUZZ, Renderer
from crossdiff.interp.score import (
    FEWEST,
    Excerpt,
    Score,
    detection_excerpts,
    fuzzing_excerpts,
    judge,
    judged,
    ranked,
)
from crossdiff.interp.windows import Contexts, Finder, Texts, Window, activations_of
from crossdiff.latents.stream import check_fits

Advance = Callable[..., None]


@dataclass(frozen=True)
class LatentContexts:
    """A latent with all that is asked about it.

    Attributes:
        row: its row of the latent table; shown: its examples; train, test: contexts of the two splits.
    """

    latent: int
    row: dict[str, Any]
    shown: list[Window]
    train: Contexts
    test: Contexts


@dataclass
class Responses:
    """What a model said of a latent. `detection` and `fuzzing` are parallel to their excerpts; reasons name what is missing."""

    explanation: str | None
    detection: list[bool | None]
    fuzzing: list[bool | None]
    fuzzed: list[Excerpt]
    reasons: list[str]


def latent_contexts(
    crosscoder: Crosscoder,
    store: Store,
    table: pl.DataFrame,
    folder: Path,
    latents: list[int],
    config: InterpretConfig,
    advance: Advance,
) -> list[LatentContexts]:
    """Contexts of the given latents; `folder` holds the crosscoder's examples and neighbours.

    Raises:
        UserError: these files are missing or damaged, or the store has no text in a split.
    """
    check_fits(crosscoder, store)
    nearest = _neighbours(folder / "neighbours.parquet", latents)
    looked_for = np.unique(np.array([*latents, *(other for row in nearest.values() for other in row)], dtype=np.int64))
    sizes = {"train": FIT_CONTEXTS, "heldout": config.contexts}
    texts = {split: Texts.of(store, split, config) for split in sizes}
    shown = shown_windows(folder / "examples.sqlite", texts["heldout"], latents)
    contexts: dict[str, dict[int, Contexts]] = {}
    total = sum(int(np.diff(part.bounds)[part.numbers].sum()) for part in texts.values())
    advance(0, total=total)
    for split, part in texts.items():
        found = activations_of(crosscoder, part, looked_for, config.batch_tokens, advance)
        finder = Finder(part, found, config.seed)
        contexts[split] = {j: finder.contexts(j, nearest.get(j, []), sizes[split], shown[j]) for j in latents}
    rows = {row["latent"]: row for row in table.filter(pl.col("latent").is_in(latents)).iter_rows(named=True)}
    return [LatentContexts(j, rows[j], shown[j], contexts["train"][j], contexts["heldout"][j]) for j in latents]


def _neighbours(path: Path, latents: list[int]) -> dict[int, list[int]]:
    """The nearest latents of each, the nearest first."""
    try:
        table = pl.read_parquet(path).sort("latent", "rank").filter(pl.col("latent").is_in(latents))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} cannot be read ({error}): run `crossdiff analyze` again") from None
    return {latent: list(others) for latent, others in table.group_by("latent").agg("neighbour").iter_rows()}


async def ask_about(subject: LatentContexts, asker: Asker, renderer: Renderer, config: InterpretConfig) -> Responses:
    """Explanation, detection and fuzzing. What fails is named and leaves the rest standing."""
    seed = config.seed + subject.latent
    detected = detection_excerpts(subject.test, renderer)
    fuzzed = fuzzing_excerpts(subject.test, renderer, seed)
    said = Responses(None, [None] * len(detected), [None] * len(fuzzed), fuzzed, [])
    if not subject.shown:
        said.reasons.append("no examples to explain")
        return said
    try:
        request = explanation_request(subject.shown, subject.row, renderer)
        said.explanation = (await asker.ask(request)).explanation
    except Unanswered as trouble:
        said.reasons.append(f"explanation: {trouble}")
        return said
    if len(subject.test.kinds["active"]) < FEWEST:
        return said
    said.detection, problem = await judge(asker, DETECT, said.explanation, detected, config, seed)
    said.fuzzing, other = await judge(asker, FUZZ, said.explanation, fuzzed, config, seed)
    said.reasons += [reason for reason in (problem, other) if reason]
    return said


async def ask_all(
    found: Iterable[LatentContexts], asker: Asker, renderer: Renderer, config: InterpretConfig, advance: Advance
) -> list[Responses]:
    """Ask about every latent, as many at a time as there may be calls."""
    free = asyncio.Semaphore(config.concurrency)

    async def one(subject: LatentContexts) -> Responses:
        async with free:
            said = await ask_about(subject, asker, renderer, config)
        advance(1)
        return said

    tasks = [asyncio.ensure_future(one(subject)) for subject in found]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def no_responses(subject: LatentContexts) -> Responses:
    """Where no model is asked."""
    n = sum(1 for _ in subject.test.items())
    return Responses(None, [None] * n, [], [], [])


class Scorer:
    """Rows of the two tables from contexts and from what was said."""

    def __init__(self, renderer: Renderer, encoder: Encoder | None, config: InterpretConfig, training: str | None) -> None:
        self.renderer, self.encoder, self.config, self.training = renderer, encoder, config, training

    def rows(self, subject: LatentContexts, said: Responses) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The latent's row, and one of each of its contexts."""
        items = list(subject.test.items())
        kinds = [kind for kind, _ in items]
        texts = [self.renderer.plain(window) for _, window in items]
        seed = self.config.seed + subject.latent
        values: dict[str, npt.NDArray[Any] | None] = {"bag_of_words": bag_of_words(subject.train, subject.test)}
        values |= self._similarities(subject, said.explanation, texts)
        scores = {name: ranked(subject.test, found, seed) for name, found in values.items()}
        scores["detection"] = judged(kinds, said.detection)
        scores["fuzzing"] = judged([excerpt.kind for excerpt in said.fuzzed], said.fuzzing)
        # An active context is fuzzed twice; its answer in the table is the one with the right marks.
        fuzzed = {id(e.window): a for e, a in zip(said.fuzzed, said.fuzzing, strict=True) if e.kind != "random"}
        contexts = []
        for index, (kind, window) in enumerate(items):
            numbers = {name: None if found is None else float(found[index]) for name, found in values.items()}
            contexts.append({
                "latent": subject.latent, "kind": kind, "document": window.document, "sequence": window.sequence,
                "start": window.start, "stop": window.stop, "text": texts[index],
                "activation": float(window.values.max()) if kind == "active" else 0.0,
                "detection": said.detection[index], "fuzzing": fuzzed.get(id(window)), **numbers,
            })  # fmt: skip
        return self._row(subject, said, scores), contexts

    def _similarities(
        self, subject: LatentContexts, explanation: str | None, texts: list[str]
    ) -> dict[str, npt.NDArray[np.float32] | None]:
        if self.encoder is None or not texts:
            return {"embedding_examples": None, "embedding_explanation": None}
        vectors = self.encoder.encode(texts)
        examples = [self.renderer.plain(window) for window in subject.shown]
        return {
            "embedding_examples": similarity(vectors, self.encoder.encode(examples).mean(0)) if examples else None,
            "embedding_explanation": similarity(vectors, self.encoder.encode([explanation])[0]) if explanation else None,
        }

    def _row(self, subject: LatentContexts, said: Responses, scores: dict[str, Score]) -> dict[str, Any]:
        counts = {kind: len(windows) for kind, windows in subject.test.kinds.items()}
        reasons = list(said.reasons)
        if counts["active"] < FEWEST:
            reasons.append(f"active in {counts['active']} held-out contexts that were not shown, fewer than {FEWEST}")
        elif counts["random"] + counts["similar"] < FEWEST:
            reasons.append("hardly any held-out context in which it is silent")
        elif len(subject.train.kinds["active"]) < FEWEST:
            reasons.append(f"bag_of_words: active in {len(subject.train.kinds['active'])} training contexts")
        row: dict[str, Any] = {
            "latent": subject.latent, "explanation": said.explanation, "n_shown": len(subject.shown),
            **{f"contexts_{kind}": counts[kind] for kind in ("active", *KINDS)},
            "interpretation_reason": "; ".join(reasons) or None,
            "explainer": self.config.model if self.config.server else None, "crosscoder": self.training,
        }  # fmt: skip
        for name in SCORES:
            score = scores[name]
            row |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
            row |= {f"{name}_{kind}": score.by_kind.get(kind, np.nan) for kind in KINDS}
        return row


def tables(
    scorer: Scorer, found: list[LatentContexts], said: list[Responses], advance: Advance
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The tables of latents and of contexts, in the columns of `crossdiff.interp.explanation_table`."""
    latents, contexts = [], []
    for subject, words in zip(found, said, strict=True):
        row, lines = scorer.rows(subject, words)
        latents.append(row)
        contexts += lines
        advance(1)
    return pl.DataFrame(latents, schema=SCHEMA), pl.DataFrame(contexts, schema=CONTEXT_SCHEMA)
