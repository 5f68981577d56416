"""Do the chat-specific latents predict what the chat model was taught? (docs/method.md#behaviours)

Each labelled conversation of one question and one answer gets one score per latent: the latent's largest activation on the
tokens before the answer, or on all tokens, which is the easier question. Within a pool of latents chosen without labels, the
latent with the best AUROC on the training conversations is scored on the held-out ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from scipy.stats import rankdata
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from crossdiff.activations.store import Store
from crossdiff.activations.transfer import CPU
from crossdiff.config import AnalyzeConfig
from crossdiff.crosscoder.crosscoder import Crosscoder, Part
from crossdiff.errors import check_latents
from crossdiff.latents.stream import Coded, encode
from crossdiff.ranks import Ranks
from crossdiff.statistics import bootstrap
from crossdiff.text.chat import Flag

BOOTSTRAPS = 1000
BEFORE_ANSWER, WHOLE_CONVERSATION = "before_answer", "whole_conversation"
CONTRASTS = {"knowledge_gap": ("helpful",), "refusal": ("list_format",), "list_format": ("refusal",)}
"""Labels whose conversations serve as negatives: questions of the same form that call for another behaviour.
A label without an entry is contrasted with all other labels."""
MIN_CONVERSATIONS = 8
BASE_SAE_POOL = "base_sae"
"""Pool of latents of an SAE on the base model: what it knew before the tuning can predict a behaviour as well."""
LIVE_POOL = "living"
"""Pool of a coder with one decoder: latents that are active often enough to be judged."""
SAMPLE_TOKENS = 16384
TABLE_SCHEMA = {
    "behaviour": pl.String, "question": pl.String, "pool": pl.String, "pool_size": pl.Int64, "latent": pl.Int64,
    "auroc_train": pl.Float64, "auroc": pl.Float64, "auroc_low": pl.Float64, "auroc_high": pl.Float64,
    "n_positive": pl.Int64, "n_negative": pl.Int64,
}  # fmt: skip


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


class Pool(NamedTuple):
    """Latents of one coder, chosen without labels, and the labelled conversations with their scores."""

    latents: list[int]
    conversations: Conversations


class ConversationScores:
    """Collects the largest v of each latent on each labelled conversation of two messages."""

    def __init__(self, store: Store, n_latents: int, device: torch.device = CPU) -> None:
        facts = store.documents
        table = facts.filter(pl.col("label").is_not_null() & (pl.col("n_messages") == 2) & (pl.col("n_tokens") > 0))
        self._table = table
        self._document, self._flags = store.column("document"), store.column("flags")
        self._index_of = np.full(int(facts["document"].to_numpy().max(initial=0)) + 1, -1, dtype=np.int64)
        self._index_of[table["document"].to_numpy()] = np.arange(table.height)
        shape, names = (table.height, n_latents), (BEFORE_ANSWER, WHOLE_CONVERSATION)
        self._scores = {name: torch.zeros(shape, device=device) for name in names}

    @property
    def found_any(self) -> bool:
        """Whether the store has labelled conversations."""
        return self._table.height > 0

    def sequences(self, store: Store) -> npt.NDArray[np.int64]:
        """The sequences of the labelled conversations."""
        return np.flatnonzero(self._index_of[self._document[store.sequences()[:-1]]] >= 0)

    def add(self, chunk: Coded) -> None:
        """Add a chunk of whole sequences; unlabelled documents are passed over."""
        conversation = self._index_of[self._document[chunk.rows]]
        token, latent, v = chunk.code.token, chunk.code.latent, chunk.v.float()
        before = torch.from_numpy(before_answer(self._flags[chunk.rows], chunk.sequence.numpy())).to(token.device)
        row = torch.from_numpy(conversation).to(token.device)[token]
        for name, kept in ((WHOLE_CONVERSATION, row >= 0), (BEFORE_ANSWER, (row >= 0) & before[token])):
            scores = self._scores[name]
            flat = row[kept] * scores.shape[1] + latent[kept]
            scores.view(-1).scatter_reduce_(0, flat, v[kept], "amax")

    def over(self, ranks: Ranks) -> ConversationScores:
        """Merge the passes of several ranks, in place."""
        for scores in self._scores.values():
            ranks.maximum(scores)
        return self

    def finish(self) -> Conversations:
        """The conversations with their scores."""
        return Conversations(
            labels=self._table["label"].to_numpy(),
            prompts=self._table["prompt"].to_numpy(),
            heldout=(self._table["split"] == "heldout").to_numpy(),
            scores={question: values.cpu().numpy() for question, values in self._scores.items()},
        )


def conversation_scores(crosscoder: Crosscoder, store: Store, latents: list[int], batch_tokens: int) -> Conversations | None:
    """Score the labelled conversations by the given latents; None if the store has no labelled conversations."""
    check_latents(latents, crosscoder.n_latents)
    scores = ConversationScores(store, len(latents), crosscoder.encoder.device)
    if not scores.found_any:
        return None
    part = Part(crosscoder, torch.tensor(latents, dtype=torch.int64))
    counted = store.counted
    for batch in store.batches_of_sequences(scores.sequences(store), batch_tokens):
        keep = counted[batch.rows]
        rows, sequence = batch.rows[keep], torch.from_numpy(batch.sequence[keep])
        if len(rows):
            code = encode(part, crosscoder.inputs(store, rows))
            v = part.crosscoder.v(code)
            scores.add(Coded(block=0, rows=rows, sequence=sequence, numbers=batch.numbers, code=code, v=v))
    return scores.finish()


def live_latents(crosscoder: Crosscoder, store: Store, size: int, config: AnalyzeConfig) -> list[int]:
    """A seeded sample of the latents that are active often enough to be judged, measured on a sample of the store's tokens."""
    counted = np.flatnonzero(store.counted)
    rows = np.sort(np.random.default_rng(config.seed).permutation(counted)[:SAMPLE_TOKENS])
    n_active = torch.zeros(crosscoder.n_latents, dtype=torch.int64, device=crosscoder.encoder.device)
    for start in range(0, len(rows), config.batch_tokens):
        n_active += encode(crosscoder, crosscoder.inputs(store, rows[start : start + config.batch_tokens])).counts()
    live = np.flatnonzero(n_active.cpu().numpy() / len(rows) >= config.min_active / len(counted))
    return sorted(np.random.default_rng(config.seed).permutation(live)[:size].tolist())


def before_answer(flags: npt.NDArray[np.uint8], sequence: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Tokens before the assistant's first content token in their sequence."""
    content = (flags & Flag.ASSISTANT) != 0
    seen = np.cumsum(content)
    start = np.searchsorted(sequence, sequence, side="left")
    before_start = seen[start] - content[start]
    result: npt.NDArray[np.bool_] = seen == before_start
    return result


def aurocs(positive: npt.NDArray[np.bool_], scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Area under the ROC curve of each column, from the ranks of the positives; NaN if there is only one class."""
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
    """95% percentile interval of the AUROC over resampled groups (distinct prompts), positives and negatives apart.

    The AUROC is the share of (positive, negative) pairs in the right order, so one table of the pairs won between groups gives
    the AUROC of every resample.
    """
    positives, negatives = (np.unique(groups[positive == side], return_inverse=True)[1] for side in (True, False))
    of_positives, of_negatives = score[positive][:, None], score[~positive]
    ahead = (of_positives > of_negatives) + 0.5 * (of_positives == of_negatives)
    won = np.zeros((positives.max() + 1, negatives.max() + 1))
    np.add.at(won, (positives[:, None], negatives), ahead)
    generator = np.random.default_rng(seed)
    drawn_positives, drawn_negatives = (_resamples(generator, n) for n in won.shape)
    n_pairs = (drawn_positives @ np.bincount(positives)) * (drawn_negatives @ np.bincount(negatives))
    resamples = np.einsum("bp,pn,bn->b", drawn_positives, won, drawn_negatives, optimize=True) / n_pairs
    found = bootstrap(auroc(positive, score), resamples)
    return found.low, found.high


def _resamples(generator: np.random.Generator, n: int) -> npt.NDArray[np.int64]:
    """How often each of `n` groups is drawn, `[resample, group]`."""
    drawn = generator.integers(n, size=(BOOTSTRAPS, n)) + n * np.arange(BOOTSTRAPS)[:, None]
    return np.bincount(drawn.ravel(), minlength=BOOTSTRAPS * n).reshape(BOOTSTRAPS, n)


class Contrast(NamedTuple):
    """The conversations with a behaviour (`positive`) and their negatives, per conversation."""

    positive: npt.NDArray[np.bool_]
    heldout: npt.NDArray[np.bool_]
    prompts: npt.NDArray[Any]

    def size(self, *, positive: bool, heldout: bool) -> int:
        return int(((self.positive == positive) & (self.heldout == heldout)).sum())

    def best(self, scores: npt.NDArray[np.float32]) -> int:
        """The column with the best AUROC on the training half."""
        return int(np.argmax(aurocs(self.positive[~self.heldout], scores[~self.heldout])))

    def bag_of_words(self) -> npt.NDArray[Any]:
        """Log-odds of a logistic regression on the words of the prompt, fitted on the training half."""
        vectorizer = CountVectorizer(lowercase=True, token_pattern=r"(?u)\b\w+\b", binary=True)
        train = vectorizer.fit_transform(self.prompts[~self.heldout])
        model = LogisticRegression(max_iter=1000, class_weight="balanced").fit(train, self.positive[~self.heldout])
        scores: npt.NDArray[Any] = model.decision_function(vectorizer.transform(self.prompts))
        return scores

    def scored(self, score: npt.NDArray[Any], seed: int) -> dict[str, float]:
        """AUROC on both halves, with its interval on the held-out one."""
        positive, heldout = self.positive, self.heldout
        low, high = bootstrap_interval(positive[heldout], score[heldout], self.prompts[heldout], seed)
        return {
            "auroc_train": auroc(positive[~heldout], score[~heldout]),
            "auroc": auroc(positive[heldout], score[heldout]),
            "auroc_low": low,
            "auroc_high": high,
        }


def contrasts(
    labels: npt.NDArray[Any], heldout: npt.NDArray[np.bool_], prompts: npt.NDArray[Any]
) -> Iterator[tuple[str, npt.NDArray[np.bool_], Contrast]]:
    """Each behaviour with enough conversations on both sides and in both halves: its name, which conversations, and these."""
    for behaviour in sorted(set(labels)):
        negatives = CONTRASTS.get(behaviour, tuple(set(labels) - {behaviour}))
        chosen = np.isin(labels, (behaviour, *negatives))
        contrast = Contrast(labels[chosen] == behaviour, heldout[chosen], prompts[chosen])
        sizes = [contrast.size(positive=side, heldout=half) for side in (True, False) for half in (True, False)]
        if min(sizes) >= MIN_CONVERSATIONS:
            yield behaviour, chosen, contrast


def behaviour_table(pools: dict[str, Pool], seed: int) -> pl.DataFrame:
    """One row per behaviour, question and pool: the latent picked on the training half, scored on the held-out half.

    The pools may come from several coders, scored on the conversations of one store; empty pools have no rows.
    """
    if not pools:
        return pl.DataFrame(schema=TABLE_SCHEMA)
    conversations = next(iter(pools.values())).conversations
    rows: list[dict[str, Any]] = []
    for behaviour, chosen, contrast in contrasts(conversations.labels, conversations.heldout, conversations.prompts):
        n_positive, n_negative = (contrast.size(positive=side, heldout=True) for side in (True, False))
        common = {"behaviour": behaviour, "n_positive": n_positive, "n_negative": n_negative}
        for question in (BEFORE_ANSWER, WHOLE_CONVERSATION):
            for name, pool in pools.items():
                if pool.latents:
                    scores = pool.conversations.scores[question][chosen]
                    best = contrast.best(scores)
                    names = {"question": question, "pool": name, "pool_size": len(pool.latents), "latent": pool.latents[best]}
                    rows.append(common | names | contrast.scored(scores[:, best], seed))
        names = {"question": BEFORE_ANSWER, "pool": "bag_of_words", "pool_size": 1, "latent": None}
        rows.append(common | names | contrast.scored(contrast.bag_of_words(), seed))
    return pl.DataFrame(rows, schema=TABLE_SCHEMA)
