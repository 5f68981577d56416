"""The language model's responses: an explanation of each latent, and its judgement of the latent's contexts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossdiff.interp.contexts import LatentContexts
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.language_model import LanguageModel, Unanswered
from crossdiff.interp.prompts import DETECT, FUZZ, Explanation, Renderer, Request, explain_request, judge_request
from crossdiff.interp.score import MIN_CONTEXTS
from crossdiff.interp.windows import Contexts, Window
from crossdiff.latents.groups import GROUPS
from crossdiff.latents.verdict import VERDICTS


@dataclass(frozen=True)
class Excerpt:
    """A context as the judge sees it; the right judgement is "active" exactly for kind `active`."""

    kind: str
    window: Window
    text: str


@dataclass
class Responses:
    """A model's responses about one latent.

    Attributes:
        detection: judgement of each held-out context, None if unanswered.
        fuzzing: judgement of each excerpt in `fuzzed`.
        reasons: why something is missing.
    """

    explanation: str | None
    detection: list[bool | None]
    fuzzing: list[bool | None]
    fuzzed: list[Excerpt]
    reasons: list[str]


def no_responses(contexts: LatentContexts) -> Responses:
    """The responses if no model is asked."""
    return Responses(None, [None] * sum(1 for _ in contexts.test.items()), [], [], [])


def facts_of(row: Mapping[str, Any]) -> str:
    """The analysis of a latent in words, for the explainer; `row` is the latent's row of the latent table."""
    lines = [
        f"Verdict of the comparison: {row['verdict'].replace('_', '-')} ({VERDICTS[row['verdict']]}).",
        f"Relative decoder norm {row['delta_norm']:.2f} (0: in the base model only, 1: in the chat model only); cosine of its "
        f"directions in the two models {row['decoder_cosine']:.2f}.",
    ]
    shares = sorted(((row[f"share_{group}"], group) for group in GROUPS if row[f"share_{group}"] > 0), reverse=True)
    places = ", ".join(f"{share:.0%} on {group} tokens" for share, group in shares)
    lines.append(f"Of its activations, {places or 'none are counted'}.")
    return "\n".join(lines)


def explanation_request(contexts: LatentContexts, renderer: Renderer) -> Request[Explanation]:
    """The request to explain a latent from its examples and its row of the latent table."""
    largest = max(float(window.values.max()) for window in contexts.shown)
    excerpts = [(renderer.line(window, window.marked), renderer.listed(window, largest)) for window in contexts.shown]
    return explain_request(excerpts, facts_of(contexts.row))


def detection_excerpts(contexts: Contexts, renderer: Renderer) -> list[Excerpt]:
    """Every context, without marks."""
    unmarked = np.empty(0, np.int64)
    return [Excerpt(kind, window, renderer.line(window, unmarked)) for kind, window in contexts.items()]


def fuzzing_excerpts(contexts: Contexts, renderer: Renderer, seed: int) -> list[Excerpt]:
    """Three kinds of marked contexts.

    active: active contexts with the right tokens marked; similar: contexts of the neighbours with the neighbours' tokens
    marked; random: active contexts with the same number of other tokens marked.
    """
    generator = np.random.default_rng(seed)
    excerpts = [
        Excerpt(kind, window, renderer.line(window, window.marked))
        for kind in ("active", "similar")
        for window in contexts.kinds[kind]
    ]
    for window in contexts.kinds["active"]:
        unmarked = np.setdiff1d(np.arange(len(window.token_ids)), window.marked)
        if len(unmarked):
            moved = generator.permutation(unmarked)[: len(window.marked)]
            excerpts.append(Excerpt("random", window, renderer.line(window, np.sort(moved))))
    return excerpts


async def judge(
    model: LanguageModel, task: str, explanation: str, excerpts: Sequence[Excerpt], config: InterpretConfig, seed: int
) -> tuple[list[bool | None], str | None]:
    """The model's judgement of each excerpt (None if unanswered), and the first reason for a missing one.

    The excerpts are shuffled, so that neither their order nor their batch reveals their kind.
    """
    judgements: list[bool | None] = [None] * len(excerpts)
    reasons = []
    order = np.random.default_rng(seed).permutation(len(excerpts)).tolist()
    for first in range(0, len(order), config.batch):
        batch = order[first : first + config.batch]
        try:
            answer = await model.ask(judge_request(task, explanation, [excerpts[i].text for i in batch]))
        except Unanswered as failure:
            reasons.append(str(failure))
            continue
        for index, judgement in zip(batch, answer.active, strict=True):
            judgements[index] = judgement
    if not reasons:
        return judgements, None
    name = {DETECT: "detection", FUZZ: "fuzzing"}[task]
    missing = sum(judgement is None for judgement in judgements)
    return judgements, f"{name}: {missing} of {len(judgements)} unanswered, {reasons[0]}"


async def ask_about(contexts: LatentContexts, model: LanguageModel, renderer: Renderer, config: InterpretConfig) -> Responses:
    """Ask for an explanation, then for detection and fuzzing by it. A failure is recorded and does not affect the rest."""
    seed = config.seed + contexts.latent
    detected = detection_excerpts(contexts.test, renderer)
    fuzzed = fuzzing_excerpts(contexts.test, renderer, seed)
    responses = Responses(None, [None] * len(detected), [None] * len(fuzzed), fuzzed, [])
    if not contexts.shown:
        responses.reasons.append("no examples to explain")
        return responses
    try:
        explanation = (await model.ask(explanation_request(contexts, renderer))).explanation
    except Unanswered as failure:
        responses.reasons.append(f"explanation: {failure}")
        return responses
    responses.explanation = explanation
    if len(contexts.test.kinds["active"]) < MIN_CONTEXTS:
        return responses
    responses.detection, no_detection = await judge(model, DETECT, explanation, detected, config, seed)
    responses.fuzzing, no_fuzzing = await judge(model, FUZZ, explanation, fuzzed, config, seed)
    responses.reasons += [reason for reason in (no_detection, no_fuzzing) if reason]
    return responses


async def ask_all(
    latents: Iterable[LatentContexts],
    model: LanguageModel,
    renderer: Renderer,
    config: InterpretConfig,
    advance: Callable[..., None],
) -> list[Responses]:
    """Ask about every latent, `concurrency` of them at a time."""
    slots = asyncio.Semaphore(config.concurrency)

    async def ask_one(contexts: LatentContexts) -> Responses:
        async with slots:
            responses = await ask_about(contexts, model, renderer, config)
        advance(1)
        return responses

    tasks = [asyncio.ensure_future(ask_one(contexts)) for contexts in latents]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
