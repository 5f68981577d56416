"""From answers and similarities on held-out contexts to scores with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from crossdiff.interp.asker import Asker, Unanswered
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.prompts import DETECT, FUZZ, Renderer, judge_request
from crossdiff.interp.windows import Contexts, Window
from crossdiff.latents.behaviours import auroc, bootstrap_interval

FEWEST = 5
"""Contexts of a kind below which a score on them is undefined."""


@dataclass(frozen=True)
class Score:
    """A score with its 95% interval, and against each kind of contexts without activation; NaN where undefined."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    by_kind: dict[str, float] = field(default_factory=dict)


def share(hits: int, n: int) -> tuple[float, float, float]:
    """A share with Wilson's 95% interval."""
    ends = binomtest(hits, n).proportion_ci(method="wilson")
    return hits / n, float(ends.low), float(ends.high)


def balanced_accuracy(right: npt.NDArray[np.bool_], active: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """Mean of the shares of active and of other contexts that are judged rightly, with its 95% interval.

    The interval of the mean comes from Wilson's of both shares (MOVER; Newcombe 1998, Zou and Donner 2008). NaN with fewer than
    `FEWEST` contexts on a side.
    """
    sides = [right[active], right[~active]]
    if min(map(len, sides)) < FEWEST:
        return math.nan, math.nan, math.nan
    (a, a_low, a_high), (b, b_low, b_high) = (share(int(side.sum()), len(side)) for side in sides)
    value = (a + b) / 2
    return value, value - math.hypot(a - a_low, b - b_low) / 2, value + math.hypot(a_high - a, b_high - b) / 2


def judged(kinds: Sequence[str], answers: Sequence[bool | None]) -> Score:
    """The score of yes-or-no answers; contexts without an answer do not count."""
    answered = np.array([answer is not None for answer in answers], dtype=bool)
    kind, answer = np.array(kinds, dtype=object)[answered], np.array([a for a in answers if a is not None], dtype=bool)
    active = kind == "active"
    right = answer == active
    by_kind = {}
    for other in sorted(set(kinds) - {"active"}):
        chosen = active | (kind == other)
        by_kind[other] = balanced_accuracy(right[chosen], active[chosen])[0]
    return Score(*balanced_accuracy(right, active), by_kind)


def ranked(contexts: Contexts, values: npt.NDArray[Any] | None, seed: int) -> Score:
    """AUROC of a number a context, with a bootstrap interval over documents."""
    items = list(contexts.items())
    kind = np.array([name for name, _ in items], dtype=object)
    active = kind == "active"
    if values is None or min(active.sum(), (~active).sum()) < FEWEST:
        return Score()
    documents = np.array([window.document for _, window in items])
    by_kind = {}
    for other in sorted(set(kind) - {"active"}):
        chosen = active | (kind == other)
        by_kind[other] = auroc(active[chosen], values[chosen]) if (kind == other).sum() >= FEWEST else math.nan
    return Score(auroc(active, values), *bootstrap_interval(active, values, documents, seed), by_kind)


@dataclass(frozen=True)
class Excerpt:
    """A context as the judge sees it. `kind` says whether it is right to call it active."""

    kind: str
    window: Window
    text: str


def detection_excerpts(contexts: Contexts, renderer: Renderer) -> list[Excerpt]:
    """Every context, without marks."""
    nothing = np.empty(0, np.int64)
    return [Excerpt(kind, window, renderer.line(window, nothing)) for kind, window in contexts.items()]


def fuzzing_excerpts(contexts: Contexts, renderer: Renderer, seed: int) -> list[Excerpt]:
    """Active contexts with the right marks; again with as many marks elsewhere (kind random); those of the nearest latents
    with the marks of those (kind similar)."""
    generator = np.random.default_rng(seed)
    excerpts = []
    for kind in ("active", "similar"):
        excerpts += [Excerpt(kind, w, renderer.line(w, w.marked)) for w in contexts.kinds[kind]]
    for window in contexts.kinds["active"]:
        silent = np.setdiff1d(np.arange(len(window.token_ids)), window.marked)
        if len(silent):
            moved = generator.permutation(silent)[: len(window.marked)]
            excerpts.append(Excerpt("random", window, renderer.line(window, np.sort(moved))))
    return excerpts


async def judge(
    asker: Asker, task: str, explanation: str, excerpts: Sequence[Excerpt], config: InterpretConfig, seed: int
) -> tuple[list[bool | None], str | None]:
    """The model's answer to each excerpt, None where it gave none, and the reason of the first of these.

    The excerpts are shuffled, so that neither the order nor a batch gives a kind away.
    """
    answers: list[bool | None] = [None] * len(excerpts)
    reasons = []
    order = np.random.default_rng(seed).permutation(len(excerpts)).tolist()
    for first in range(0, len(order), config.batch):
        batch = order[first : first + config.batch]
        try:
            found = await asker.ask(judge_request(task, explanation, [excerpts[i].text for i in batch]))
        except Unanswered as trouble:
            reasons.append(str(trouble))
            continue
        for index, answer in zip(batch, found.active, strict=True):
            answers[index] = answer
    missing = sum(answer is None for answer in answers)
    name = {DETECT: "detection", FUZZ: "fuzzing"}[task]
    return answers, f"{name}: {missing} of {len(answers)} unanswered, {reasons[0]}" if reasons else None
