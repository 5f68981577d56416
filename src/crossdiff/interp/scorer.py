"""From contexts and responses to the rows of `interpretation.parquet` and `interpretation_contexts.parquet`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from crossdiff.interp.baseline import bag_of_words
from crossdiff.interp.contexts import LatentContexts
from crossdiff.interp.embedding import Encoder, similarity
from crossdiff.interp.explanation_table import CONTEXT_SCHEMA, KINDS, SCHEMA, SCORES
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.prompts import Renderer
from crossdiff.interp.responses import Responses
from crossdiff.interp.score import MIN_CONTEXTS, Score, judgement_score, ranking_score


class Scorer:
    """Scores latents, and writes the tables of latents and of contexts.

    Args:
        training: fingerprint of the crosscoder's training, for the table.
    """

    def __init__(self, renderer: Renderer, encoder: Encoder | None, config: InterpretConfig, training: str | None) -> None:
        self.renderer = renderer
        self.encoder = encoder
        self.config = config
        self.training = training

    def tables(
        self, latents: Sequence[LatentContexts], responses: Sequence[Responses], advance: Callable[..., None]
    ) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The tables of latents and of contexts, with the columns in `explanation_table`."""
        latent_rows, context_rows = [], []
        for contexts, of_latent in zip(latents, responses, strict=True):
            row, rows = self._rows(contexts, of_latent)
            latent_rows.append(row)
            context_rows += rows
            advance(1)
        return pl.DataFrame(latent_rows, schema=SCHEMA), pl.DataFrame(context_rows, schema=CONTEXT_SCHEMA)

    def _rows(self, contexts: LatentContexts, responses: Responses) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The latent's row, and one row per context."""
        items = list(contexts.test.items())
        texts = [self.renderer.plain(window) for _, window in items]
        values: dict[str, npt.NDArray[Any] | None] = {"bag_of_words": bag_of_words(contexts.train, contexts.test)}
        values |= self._similarities(contexts, responses.explanation, texts)
        seed = self.config.seed + contexts.latent
        scores = {name: ranking_score(contexts.test, each, seed) for name, each in values.items()}
        scores["detection"] = judgement_score([kind for kind, _ in items], responses.detection)
        scores["fuzzing"] = judgement_score([excerpt.kind for excerpt in responses.fuzzed], responses.fuzzing)
        # An active context is fuzzed twice; the table has the judgement of the right marks.
        fuzzing = {
            id(excerpt.window): judgement
            for excerpt, judgement in zip(responses.fuzzed, responses.fuzzing, strict=True)
            if excerpt.kind != "random"
        }
        rows = []
        for index, (kind, window) in enumerate(items):
            numbers = {name: None if each is None else float(each[index]) for name, each in values.items()}
            rows.append({
                "latent": contexts.latent, "kind": kind, "document": window.document, "sequence": window.sequence,
                "start": window.start, "stop": window.stop, "text": texts[index],
                "activation": float(window.values.max()) if kind == "active" else 0.0,
                "detection": responses.detection[index], "fuzzing": fuzzing.get(id(window)), **numbers,
            })  # fmt: skip
        return self._latent_row(contexts, responses, scores), rows

    def _similarities(
        self, contexts: LatentContexts, explanation: str | None, texts: list[str]
    ) -> dict[str, npt.NDArray[np.float32] | None]:
        if self.encoder is None or not texts:
            return {"embedding_examples": None, "embedding_explanation": None}
        vectors = self.encoder.encode(texts)
        examples = [self.renderer.plain(window) for window in contexts.shown]
        return {
            "embedding_examples": similarity(vectors, self.encoder.encode(examples).mean(0)) if examples else None,
            "embedding_explanation": similarity(vectors, self.encoder.encode([explanation])[0]) if explanation else None,
        }

    def _latent_row(self, contexts: LatentContexts, responses: Responses, scores: dict[str, Score]) -> dict[str, Any]:
        counts = {kind: len(windows) for kind, windows in contexts.test.kinds.items()}
        n_train = len(contexts.train.kinds["active"])
        reasons = list(responses.reasons)
        if counts["active"] < MIN_CONTEXTS:
            reasons.append(
                f"active in only {counts['active']} held-out contexts besides the examples shown, fewer than {MIN_CONTEXTS}"
            )
        elif counts["random"] + counts["similar"] < MIN_CONTEXTS:
            reasons.append(f"fewer than {MIN_CONTEXTS} held-out contexts without activation")
        elif n_train < MIN_CONTEXTS:
            reasons.append(f"bag_of_words: active in only {n_train} training contexts")
        row: dict[str, Any] = {
            "latent": contexts.latent, "explanation": responses.explanation, "n_shown": len(contexts.shown),
            **{f"contexts_{kind}": counts[kind] for kind in ("active", *KINDS)},
            "interpretation_reason": "; ".join(reasons) or None,
            "explainer": self.config.model if self.config.server else None, "crosscoder": self.training,
        }  # fmt: skip
        for name in SCORES:
            estimate = scores[name].estimate
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            row |= {f"{name}_{kind}": scores[name].by_kind.get(kind, np.nan) for kind in KINDS}
        return row
