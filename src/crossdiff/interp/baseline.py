"""A baseline for the scores: predict from the words of a context alone whether a latent is active in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from crossdiff.interp.windows import Contexts, Window

FIT_CONTEXTS = 100
"""Training contexts of each kind."""
MIN_CONTEXTS = 5
"""Smallest number of contexts per class to fit on."""


def _bags(windows: Sequence[Window], n_tokens: int) -> Any:
    """Which tokens occur in each window, `[window, token]`."""
    ids = [np.unique(window.token_ids) for window in windows]
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    columns = np.concatenate([*ids, np.empty(0, np.int32)])
    return csr_matrix((np.ones(len(columns), np.float32), columns, bounds), shape=(len(windows), n_tokens))


def bag_of_words(train: Contexts, test: Contexts) -> npt.NDArray[np.float64] | None:
    """Log-odds of the test contexts, in order, by a logistic regression on token ids; None with too few contexts to fit."""
    train_items = list(train.items())
    test_items = list(test.items())
    active = np.array([kind == "active" for kind, _ in train_items], dtype=bool)
    if min(active.sum(), (~active).sum()) < MIN_CONTEXTS or not test_items:
        return None
    windows = [window for _, window in (*train_items, *test_items)]
    bags = _bags(windows, 1 + max(int(window.token_ids.max()) for window in windows))
    model = LogisticRegression(max_iter=1000, class_weight="balanced").fit(bags[: len(train_items)], active)
    odds: npt.NDArray[np.float64] = model.decision_function(bags[len(train_items) :]).astype(np.float64)
    return odds
