"""Do simple readings of the activations predict the behaviours? DiffMean and a logistic probe beside the bag of words.

A labelled conversation of one question and one answer is the mean activation over the tokens before the answer, in the base
model, the chat model, and their difference. DiffMean is the difference between the means of the conversations with and without
a behaviour (Marks & Tegmark 2023; Wu et al. 2025); both readings are fitted on the training conversations and scored on the
held-out ones, by the protocol of `crossdiff.latents.behaviours`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from crossdiff.latents.behaviours import before_answer, contrasts
from crossdiff.shapes import Float, Tensor

READ = ("base", "chat", "difference")
PROBE_COLUMNS = {
    "behaviour": pl.String, "reading": pl.String, "activations": pl.String, "auroc_train": pl.Float64, "auroc": pl.Float64,
    "auroc_low": pl.Float64, "auroc_high": pl.Float64, "n_positive": pl.Int64, "n_negative": pl.Int64,
}  # fmt: skip


def conversation_means(
    base: Float[Tensor, "token d_model"],
    chat: Float[Tensor, "token d_model"],
    flags: npt.NDArray[np.uint8],
    sequence: npt.NDArray[np.int64],
    document: npt.NDArray[np.int64],
) -> dict[str, Tensor]:
    """The mean activation of each sequence's tokens before the answer.

    Args:
        flags, sequence, document: of each token of whole sequences, numbered in ascending order.

    Returns:
        `conversation_mean`: `[sequence, read, d_model]`, as in `READ`; `conversation_document`: the document of each.
    """
    before = before_answer(flags, sequence)
    numbers, first, index = np.unique(sequence, return_index=True, return_inverse=True)
    weights = np.zeros((len(numbers), len(sequence)))
    weights[index[before], np.flatnonzero(before)] = 1
    weights /= np.maximum(1, weights.sum(1, keepdims=True))
    mean = torch.from_numpy(weights).float().to(base.device)
    of_base, of_chat = (mean @ h.float() for h in (base, chat))
    means = torch.stack([of_base, of_chat, of_chat - of_base], dim=1)
    return {"conversation_mean": means, "conversation_document": torch.from_numpy(document[first])}


def probe_table(means: dict[str, Tensor], documents: pl.DataFrame, seed: int) -> pl.DataFrame:
    """One row per behaviour, reading and model; empty without labelled conversations.

    Args:
        means: see `conversation_means`.
        documents: the table of the documents that were read; see `crossdiff.activations.texts`.
    """
    row_of = {int(document): row for row, document in enumerate(means["conversation_document"])}
    wanted = documents.filter(pl.col("label").is_not_null() & (pl.col("n_messages") == 2) & (pl.col("n_tokens") > 0))
    table = wanted.filter(pl.col("document").is_in(list(row_of)))
    if not table.height:
        return pl.DataFrame(schema=PROBE_COLUMNS)
    activations = means["conversation_mean"][[row_of[document] for document in table["document"]]].numpy()
    labels, prompts = table["label"].to_numpy(), table["prompt"].to_numpy()
    heldout = (table["split"] == "heldout").to_numpy()
    rows: list[dict[str, Any]] = []
    for behaviour, chosen, contrast in contrasts(labels, heldout, prompts):
        n_positive, n_negative = (contrast.size(positive=side, heldout=True) for side in (True, False))
        common = {"behaviour": behaviour, "n_positive": n_positive, "n_negative": n_negative}
        for index, read in enumerate(READ):
            x = activations[chosen, index].astype(np.float64)
            for reading, score in (("diffmean", _diffmean), ("probe", _probe)):
                scored = contrast.scored(score(x, contrast.positive, ~contrast.heldout), seed)
                rows.append(common | {"reading": reading, "activations": read} | scored)
        rows.append(common | {"reading": "bag_of_words", "activations": None} | contrast.scored(contrast.bag_of_words(), seed))
    return pl.DataFrame(rows, schema=PROBE_COLUMNS)


def _diffmean(
    x: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], train: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Each conversation along the difference of the two means of the training conversations."""
    direction = x[positive & train].mean(0) - x[~positive & train].mean(0)
    scores: npt.NDArray[np.float64] = x @ direction
    return scores


def _probe(
    x: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], train: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Log-odds of a logistic regression on standardised activations."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced", C=0.01))
    scores: npt.NDArray[np.float64] = model.fit(x[train], positive[train]).decision_function(x)
    return scores
