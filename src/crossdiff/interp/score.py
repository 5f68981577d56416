"""Scores with intervals, from judgements of held-out contexts or from a number per context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from crossdiff.interp.windows import Contexts
from crossdiff.latents.behaviours import auroc, bootstrap_interval
from crossdiff.statistics import UNDEFINED, Estimate, wilson

MIN_CONTEXTS = 5
"""Smallest number of contexts per class for a defined score."""


@dataclass(frozen=True)
class Score:
    """A score with its interval, and against each kind of contexts without activation; NaN where undefined."""

    estimate: Estimate[float] = UNDEFINED
    by_kind: dict[str, float] = field(default_factory=dict)


def balanced_accuracy(correct: npt.NDArray[np.bool_], active: npt.NDArray[np.bool_]) -> Estimate[float]:
    """Mean of two shares: of the active contexts that are judged correctly, and of the other contexts.

    The interval of the mean follows from the Wilson intervals of the shares (MOVER; Newcombe 1998, Zou and Donner 2008).
    Undefined with fewer than `MIN_CONTEXTS` contexts in a class.
    """
    classes = [correct[active], correct[~active]]
    if min(map(len, classes)) < MIN_CONTEXTS:
        return UNDEFINED
    a, b = (wilson(int(each.sum()), len(each)) for each in classes)
    value = (a.value + b.value) / 2
    low = value - math.hypot(a.value - a.low, b.value - b.low) / 2
    high = value + math.hypot(a.high - a.value, b.high - b.value) / 2
    return Estimate(value, low, high)


def judgement_score(kinds: Sequence[str], judgements: Sequence[bool | None]) -> Score:
    """Balanced accuracy of judgements of contexts of the given kinds; unanswered ones do not count."""
    answered = [(kind, judgement) for kind, judgement in zip(kinds, judgements, strict=True) if judgement is not None]
    kind = np.array([kind for kind, _ in answered], dtype=object)
    active = kind == "active"
    correct = np.array([judgement for _, judgement in answered], dtype=bool) == active
    by_kind = {}
    for other in sorted(set(kinds) - {"active"}):
        chosen = active | (kind == other)
        by_kind[other] = balanced_accuracy(correct[chosen], active[chosen]).value
    return Score(balanced_accuracy(correct, active), by_kind)


def ranking_score(contexts: Contexts, values: npt.NDArray[Any] | None, seed: int) -> Score:
    """AUROC of a number per context, with a bootstrap interval over documents."""
    items = list(contexts.items())
    kind = np.array([name for name, _ in items], dtype=object)
    active = kind == "active"
    if values is None or min(active.sum(), (~active).sum()) < MIN_CONTEXTS:
        return Score()
    documents = np.array([window.document for _, window in items])
    by_kind = {}
    for other in sorted(set(kind) - {"active"}):
        chosen = active | (kind == other)
        by_kind[other] = auroc(active[chosen], values[chosen]) if (kind == other).sum() >= MIN_CONTEXTS else math.nan
    low, high = bootstrap_interval(active, values, documents, seed)
    return Score(Estimate(auroc(active, values), low, high), by_kind)
