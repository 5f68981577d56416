"""Do the chat-specific latents predict what the chat model was taught? (METHOD: ground truth, planted behaviours)

Each labelled conversation with one question and one answer gets one score per latent: the largest activation on the tokens
before the answer (or on all of it, the easier question). Within a pool of latents that was chosen without labels, the
latent with the best AUROC on the training conversations is scored on the held-out ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from scipy.stats import rankdata
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store, consecutive
from crossdiff.config import AnalyzeConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.stream import check_latents, encode
from crossdiff.text.chat import Flag

BOOTSTRAPS = 1000
QUESTIONS = ("before_answer", "whole_conversation")
CONTRASTS = {"knowledge_gap": ("helpful",), "refusal": ("list_format",), "list_format": ("refusal",)}
"""Negatives of a label, where a contrast was built in: questions of the same form that call for something else. A label
without an entry is contrasted with all other labels."""
MIN_CONVERSATIONS = 8
REFERENCE = "base_sae"
"""Pool of latents of an SAE on the base model: what was there before the tuning can predict a behaviour as well."""
LIVING = "living"
"""Pool of a coder with one decoder: latents that fire often enough to be judged."""
SAMPLE_TOKENS = 16384


@dataclass(frozen=True)
class Conversations:
    """Labelled conversations of two messages, sorted by document.

    Attributes:
        scores: question -> largest v per conversation and pool latent, `[conversation, pool latent]`.
    """

    labels: npt.NDArray[Any]
    prompts: npt.NDArray[Any]
    heldout: npt.NDArray[np.bool_]
    scores: dict[str, npt.NDArray[np.float32]]


def conversation_scores(crosscoder: Crosscoder, store: Store, latents: list[int], batch_tokens: int) -> Conversations | None:
    """Scores of the given latents on the labelled conversations; None when there are none. Only these latents are encoded."""
    check_latents(latents, crosscoder.n_latents)
    table = store.documents.filter(pl.col("label").is_not_null() & (pl.col("n_messages") == 2) & (pl.col("n_tokens") > 0))
    if table.height == 0:
        return None
    index_of = {document: index for index, document in enumerate(table["document"].to_list())}
    bounds, document = store.sequences(), store.column("document")
    flags, position = store.column("flags"), store.column("position")
    members = np.array([i for i, row in enumerate(bounds[:-1]) if int(document[row]) in index_of], dtype=np.int64)
    chosen, source_index = torch.tensor(latents, dtype=torch.int64), source_indices(store, crosscoder.view.reads)
    encoder, bias = crosscoder.encoder[chosen], crosscoder.encoder_bias[chosen]
    norms = crosscoder.norms()[chosen].sum(1)
    scores = {question: torch.zeros(table.height, len(latents)) for question in QUESTIONS}
    lengths = bounds[members + 1] - bounds[members]
    for first, last in consecutive(np.concatenate([[0], np.cumsum(lengths)]), batch_tokens):
        rows = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in members[first:last]])
        x = crosscoder.normalise(store.gather(rows)[:, source_index]).flatten(1)
        v = torch.addmm(bias, x, encoder.T).clamp(min=0) * norms
        v = torch.where(v > crosscoder.threshold, v, 0.0)
        v[torch.from_numpy(position[rows] < store.leave_out)] = 0
        conversation = torch.tensor([index_of[int(number)] for number in document[rows]])
        before = _before_answer(flags[rows], np.repeat(np.arange(last - first), lengths[first:last]))
        for question, keep in zip(QUESTIONS, (torch.from_numpy(before), torch.ones(len(rows), dtype=torch.bool)), strict=True):
            target = conversation[keep].unsqueeze(1).expand(-1, len(latents))
            scores[question].scatter_reduce_(0, target, v[keep], "amax")
    return Conversations(
        labels=table["label"].to_numpy(),
        prompts=table["prompt"].to_numpy(),
        heldout=(table["split"] == "heldout").to_numpy(),
        scores={question: values.numpy() for question, values in scores.items()},
    )


def living_latents(crosscoder: Crosscoder, store: Store, size: int, config: AnalyzeConfig) -> list[int]:
    """A seeded sample of the latents that fire often enough to be judged, measured on some tokens of the whole store."""
    counted = np.flatnonzero(store.column("position") >= store.leave_out)
    rows = np.sort(np.random.default_rng(config.seed).permutation(counted)[:SAMPLE_TOKENS])
    index, active = source_indices(store, crosscoder.view.reads), torch.zeros(crosscoder.n_latents, dtype=torch.int64)
    for start in range(0, len(rows), config.batch_tokens):
        h = store.gather(rows[start : start + config.batch_tokens])[:, index]
        active += encode(crosscoder, crosscoder.normalise(h)).counts()
    living = np.flatnonzero(active.numpy() / len(rows) >= config.min_active / len(counted))
    return sorted(np.random.default_rng(config.seed).permutation(living)[:size].tolist())


def _before_answer(flags: npt.NDArray[np.uint8], sequence: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Tokens before the first one of the assistant's content in their sequence."""
    content = (flags & Flag.ASSISTANT) != 0
    seen = np.cumsum(content)
    start = np.searchsorted(sequence, sequence, side="left")
    before_start = seen[start] - content[start]
    result: npt.NDArray[np.bool_] = seen == before_start
    return result


def aurocs(positive: npt.NDArray[np.bool_], scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Area under the ROC curve of each column, from the ranks of the positives; NaN with one class only."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive == 0 or n_negative == 0:
        return np.full(scores.shape[1], np.nan)
    ranks = rankdata(scores, axis=0)[positive].sum(0)
    areas: npt.NDArray[np.float64] = (ranks - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
    return areas


def auroc(positive: npt.NDArray[np.bool_], score: npt.NDArray[Any]) -> float:
    """Area under the ROC curve of one score."""
    return float(aurocs(positive, score[:, None])[0])


def bootstrap_interval(
    positive: npt.NDArray[np.bool_], score: npt.NDArray[Any], groups: npt.NDArray[Any], seed: int
) -> tuple[float, float]:
    """95% percentile interval over resampled groups (distinct prompts), positives and negatives apart.

    The AUROC is the share of (positive, negative) pairs in the right order, so one table of pairs won between groups gives
    that of every resample.
    """
    sides = [np.unique(groups[positive == side], return_inverse=True)[1] for side in (True, False)]
    won = (score[positive][:, None] > score[~positive]) + 0.5 * (score[positive][:, None] == score[~positive])
    sizes = [np.bincount(side) for side in sides]
    rows = np.zeros((len(sizes[0]), won.shape[1]))
    np.add.at(rows, sides[0], won)
    table = np.zeros((len(sizes[1]), len(sizes[0])))
    np.add.at(table, sides[1], rows.T)
    generator = np.random.default_rng(seed)
    drawn = [_resamples(generator, len(size)) for size in sizes]
    values = np.einsum("bp,np,bn->b", drawn[0], table, drawn[1], optimize=True) / (
        (drawn[0] @ sizes[0]) * (drawn[1] @ sizes[1])
    )
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _resamples(generator: np.random.Generator, n: int) -> npt.NDArray[np.int64]:
    """How often each of `n` groups is drawn, `[resample, group]`."""
    drawn = generator.integers(n, size=(BOOTSTRAPS, n)) + n * np.arange(BOOTSTRAPS)[:, None]
    return np.bincount(drawn.ravel(), minlength=BOOTSTRAPS * n).reshape(BOOTSTRAPS, n)


def _bag_of_words(
    prompts: npt.NDArray[Any], positive: npt.NDArray[np.bool_], heldout: npt.NDArray[np.bool_]
) -> npt.NDArray[Any]:
    """Log-odds of a logistic regression on the words of the prompt, fitted on the training conversations."""
    counts = CountVectorizer(lowercase=True, token_pattern=r"(?u)\b\w+\b", binary=True)
    train = counts.fit_transform(prompts[~heldout])
    model = LogisticRegression(max_iter=1000, class_weight="balanced").fit(train, positive[~heldout])
    scores: npt.NDArray[Any] = model.decision_function(counts.transform(prompts))
    return scores


def _scored(
    positive: npt.NDArray[np.bool_],
    heldout: npt.NDArray[np.bool_],
    prompts: npt.NDArray[Any],
    score: npt.NDArray[Any],
    seed: int,
) -> dict[str, float]:
    """AUROC on both halves, with an interval on the held-out one."""
    low, high = bootstrap_interval(positive[heldout], score[heldout], prompts[heldout], seed)
    return {
        "auroc_train": auroc(positive[~heldout], score[~heldout]),
        "auroc": auroc(positive[heldout], score[heldout]),
        "auroc_low": low,
        "auroc_high": high,
    }


@dataclass(frozen=True)
class Pool:
    """Latents of one coder, chosen without labels.

    Attributes:
        conversations: the labelled conversations with the scores of these latents, in their order.
    """

    latents: list[int]
    conversations: Conversations


def behaviour_table(pools: dict[str, Pool], seed: int) -> pl.DataFrame:
    """One row per behaviour, question and pool: the latent picked on the training half, scored on the other.

    The pools may be of several coders, scored on the conversations of one store; empty ones are left out.
    """
    rows: list[dict[str, Any]] = []
    conversations = next((pool.conversations for pool in pools.values()), None)
    found = {name: pool for name, pool in pools.items() if pool.latents}
    for behaviour in sorted(set(conversations.labels)) if conversations is not None else ():
        assert conversations is not None
        negatives = CONTRASTS.get(behaviour, tuple(sorted(set(conversations.labels) - {behaviour})))
        chosen = np.isin(conversations.labels, (behaviour, *negatives))
        positive, heldout = conversations.labels[chosen] == behaviour, conversations.heldout[chosen]
        prompts = conversations.prompts[chosen]
        sizes = {
            (side, held): int(((positive == side) & (heldout == held)).sum())
            for side in (True, False)
            for held in (True, False)
        }
        if min(sizes.values()) < MIN_CONVERSATIONS:
            continue
        common = {"behaviour": behaviour, "n_positive": sizes[True, True], "n_negative": sizes[False, True]}
        for question in QUESTIONS:
            for name, pool in found.items():
                scores = pool.conversations.scores[question][chosen]
                best = int(np.argmax(aurocs(positive[~heldout], scores[~heldout])))
                names = {"question": question, "pool": name, "pool_size": len(pool.latents), "latent": pool.latents[best]}
                rows.append(common | names | _scored(positive, heldout, prompts, scores[:, best], seed))
        words = _bag_of_words(prompts, positive, heldout)
        names = {"question": "before_answer", "pool": "bag_of_words", "pool_size": 1, "latent": None}
        rows.append(common | names | _scored(positive, heldout, prompts, words, seed))
    schema = {
        "behaviour": pl.String, "question": pl.String, "pool": pl.String, "pool_size": pl.Int64, "latent": pl.Int64,
        "auroc_train": pl.Float64, "auroc": pl.Float64, "auroc_low": pl.Float64, "auroc_high": pl.Float64,
        "n_positive": pl.Int64, "n_negative": pl.Int64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema)
