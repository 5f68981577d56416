"""Sentences about the concepts of a run, and the rungs of evidence of each, for every page, the terminal and the model card."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from crossdiff.latents.ranking import RECONSTRUCTIONS, bias_of
from crossdiff.report import wording
from crossdiff.report.concept_records import CHANGED, Concept, NullShare, Patched, Prediction, RunConcepts
from crossdiff.report.records import RunReport

HOW = "crossdiff concepts"
"""The command that finds the concepts of a run."""
PASSED, FAILED, NOT_MEASURED = "passed", "failed", "not measured"
CHANCE, CLEAR = 0.5, 0.8
"""AUROC of guessing, and lower end of the interval from which a concept clearly tells a behaviour."""
NULL_SHARE = 0.1
"""A verdict that the null diff gives to less than this share of what the run gives it to counts as absent there."""
KINDS = {
    "chat_specific": ("Only the chat model has them", "New in the chat model"),
    "rotated": (
        "Both models have them, in different directions",
        "Changed (rotated): both models have it, in another direction",
    ),
    "base_specific": ("Only the base model has them", "Lost in the chat model: only the base model has it"),
    "shared": ("Both models have them", "Shared: both models have it in the same way"),
    "complete_shrinkage": (
        "They look new, but the base model has them",
        "Looks new, but the base model has it too (complete shrinkage: its direction is in the base model's error)",
    ),
    "latent_decoupling": (
        "They look new, but the base model has them",
        "Looks new, but the base model has it too (latent decoupling: other latents carry it there)",
    ),
    "undecided": ("Undecided", "Undecided"),
}
"""Heading of a verdict's concepts, and the verdict of one of them in plain words."""
RUNGS = (
    ("differs between the models", "latent scaling gives the group a verdict that says so; numbers below"),
    ("replicates", "enough of the trainings, which start from different random numbers, have it"),
    ("absent from a null diff", "further training on plain text alone does not bring such concepts about"),
    (
        "acts on the output",
        "added to the base model alone, it brings the output closer to that of the chat model, in every training that has it: "
        "the interval of the change in KL, the distance between the two outputs, is above 0",
    ),
    ("predicts a behaviour", "it tells held-out conversations with a labelled behaviour from others"),
    ("explained", "a language model has said in words what it responds to"),
)
"""Name of each rung of evidence, and what it takes to pass it."""


class Rung(NamedTuple):
    """One rung of the evidence for a concept: passed, failed or not measured, and why."""

    name: str
    state: str
    why: str

    @property
    def glyph(self) -> str:
        return {PASSED: "\N{CHECK MARK}", FAILED: "\N{BALLOT X}", NOT_MEASURED: "\N{EN DASH}"}[self.state]


def lead(report: RunReport) -> str:
    """The first sentence of every page: that there is only one model, what the chat model has learned, or what to do first."""
    if report.same_model:
        return wording.SAME_MODEL
    return missing(report) if report.concepts is None else headline(report.concepts)


def missing(report: RunReport) -> str:
    """What to do where a run has no concepts."""
    if not any(coder.compares for coder in report.crosscoders):
        return "This run has no concepts, because none of its crosscoders reads both models."
    if set_aside(report.directory, "concepts"):
        return (
            f"The concepts of this run are out of date: made from an earlier analysis. The command {HOW} RUN finds them again."
        )
    return f"This run has no concepts yet, only single latents. The command {HOW} RUN groups them into concepts."


def set_aside(directory: Path, stage: str) -> bool:
    """Whether a run has replaced results of a stage, named as in the folder `old`, such as `concepts` or `causal-l1`."""
    return any(re.fullmatch(rf"[\d-]+-{re.escape(stage)}", path.name) for path in (directory / "old").glob("*"))


def headline(concepts: RunConcepts) -> str:
    """What the chat model has learned, in one plain sentence."""
    n, total, needed = concepts.count("chat_specific"), concepts.table.height, concepts.summary.needed
    if not total:
        return "No latent of any training says that the models differ, so there is no concept to report."
    has = f"The chat model has {counted(n)} that its base model lacks" if n else "No concept is specific to the chat model"
    if needed is None:
        return (
            f"{has}, among {counted(total)} that differ between the models or look like it; there is one training, so nobody "
            "knows which of them would be found again."
        )
    account = _account(concepts)
    rest = f", and together they {account}" if account else ""
    return (
        f"{has}: of {counted(total)} found in {concepts.n_trainings} independent trainings, {wording.whole(concepts.count())} "
        f"came back in at least {needed} of them{rest}."
    )


def _account(concepts: RunConcepts) -> str:
    """What the replicated concepts account for, with the range over trainings."""
    parts = []
    if explained := concepts.summary.explained("replicated"):
        parts.append(f"account for {spread(explained)} of the difference between the two models' activations")
    if concepts.together is not None and (closed := concepts.together.closed("replicated")):
        parts.append(f"close {spread(closed)} of the gap between their outputs when added to the base model")
    return " and ".join(parts)


def spread(values: Sequence[float]) -> str:
    """The range of shares: 15% to 22%."""
    defined = [value for value in values if not math.isnan(value)]
    if not defined:
        return wording.UNDEFINED
    low, high = wording.share(min(defined)), wording.share(max(defined))
    return low if low == high else f"{low} to {high}"


def counted(n: int) -> str:
    """A number of concepts."""
    return f"{wording.whole(n)} {'concept' if n == 1 else 'concepts'}"


def introduction(concepts: RunConcepts) -> list[str]:
    """What a concept is, and what else was found."""
    summary = concepts.summary
    sentences = [
        "A crosscoder explains the activations of both models as sums of a few latents, each with one direction per model. "
        "A concept is a group of latents, from several trainings of crosscoders, that are active on the same tokens (average "
        f"correlation of at least {summary.correlation:g})."
    ]
    if summary.needed is None:
        return [
            *sentences,
            "Several trainings would show which concepts replicate: `seeds` in the settings of a crosscoder, or beside a "
            "published one, crosscoders of your own.",
        ]
    changed = [(kind, concepts.count(kind)) for kind in ("rotated", "base_specific")]
    words = {"rotated": "both models have in different directions", "base_specific": "only the base model has"}
    others = [f"{wording.whole(n)} that {words[kind]}" for kind, n in changed if n]
    if others:
        sentences.append(f"Besides those new in the chat model, the ones that came back include {' and '.join(others)}.")
    if unconfirmed := concepts.table.height - concepts.count():
        sentences.append(
            f"The other {counted(unconfirmed)} came from too few trainings and {'is' if unconfirmed == 1 else 'are'} not "
            "confirmed; the table of concepts has them."
        )
    return sentences


def controls(concepts: RunConcepts) -> list[str]:
    """How far the answer can be trusted: what the controls found. Nothing with one training."""
    summary, found = concepts.summary, list[str]()
    if summary.needed is None:
        return found
    cut = next((cut for cut in summary.cuts if cut.correlation == summary.correlation), None)
    if cut is not None:
        control = "none comes" if cut.n_replicated_permuted == 0 else f"{wording.whole(cut.n_replicated_permuted)} come"
        found.append(f"As a control, with the documents of the trainings shuffled against each other, {control} back.")
    if summary.halves:
        again = spread([half.found.value for half in summary.halves])
        energy = spread([half.found_energy.value for half in summary.halves])
        found.append(
            f"Half of the trainings find {again} of the concepts of the other half again ({energy} by energy, the size of what "
            "their latents add to the activations)."
        )
    random, replicated = (summary.explained(key) for key in ("random", "replicated"))
    if random and replicated and not any(math.isnan(value) for value in random):
        found.append(
            f"For comparison, as many random latents account for {spread(random)} of the difference, and all latents that "
            f"differ between the models for {spread(summary.explained('candidates'))}."
        )
    if concepts.together is not None:
        random, whole = (concepts.together.closed(key) for key in ("random", "all_latents"))
        if random and whole:
            found.append(f"Random ones close {spread(random)} of the gap between the outputs, and all latents {spread(whole)}.")
    return found


def verdict_words(concept: Concept) -> str:
    """The verdict in plain words with its intervals."""
    words = KINDS.get(concept.verdict, ("", wording.words(concept.verdict).capitalize()))[1]
    if concept.verdict == "undecided":
        return f"{words}: {wording.reason(concept.verdict_reason)}."
    error = wording.interval(concept.nu_error)
    reconstruction, published = (f"{wording.interval(getattr(concept, nu))}" for nu in RECONSTRUCTIONS)
    judges, other = map(bias_of, RECONSTRUCTIONS)
    turned = f" (cosine of the two {wording.fixed(concept.decoder_cosine)})" if concept.verdict == "rotated" else ""
    return (
        f"{words}{turned}. Of its chat direction, the base model has {error} in what the crosscoder fails to explain "
        f"(nu_error) and {reconstruction} in what other latents explain (nu_reconstruction {judges}; {published} {other})."
    )


def replicated_words(concept: Concept, n_trainings: int) -> str:
    """In how many of the trainings the concept is."""
    if concept.replicated is None:
        return "one training only"
    state = "replicated in" if concept.replicated else "not replicated: in"
    return f"{state} {concept.n_trainings} of {n_trainings} trainings"


def prediction_words(prediction: Prediction) -> str:
    """A behaviour with its AUROC, and from which part of the conversation it is told."""
    when = {"before_answer": "before the answer", "whole_conversation": "from the whole conversation"}
    told = when.get(prediction.question, wording.words(prediction.question))
    return f"{wording.words(prediction.behaviour)} {told}, AUROC {wording.interval(prediction.auroc)}"


def told(concept: Concept) -> tuple[Prediction, ...]:
    """The behaviours that it tells better than chance, each once: before the answer, the harder question, if it can."""
    found: dict[str, Prediction] = {}
    for prediction in concept.predictions:
        better = prediction.auroc.low > CHANCE
        if better and (prediction.behaviour not in found or prediction.question == "before_answer"):
            found[prediction.behaviour] = prediction
    return tuple(found.values())


def in_order(concepts: Iterable[Concept]) -> list[Concept]:
    """Concepts in the order in which they are shown: first those that clearly tell a labelled behaviour, which says most about
    their meaning, the surest first; then all others in the order given."""

    def place(concept: Concept) -> float:
        lows = [prediction.auroc.low for prediction in told(concept) if prediction.auroc.low >= CLEAR]
        return -max(lows, default=0.0)

    return sorted(concepts, key=place)


def leading(concepts: RunConcepts) -> list[Concept]:
    """The concepts that a short list shows: those that only the chat model has, or all if there are none."""
    specific = [concept for concept in concepts.shown if concept.verdict == "chat_specific"]
    return in_order(specific or concepts.shown)


def rungs(concept: Concept, concepts: RunConcepts) -> tuple[Rung, ...]:
    """The rungs of evidence of a concept, in the order of `RUNGS`."""
    found = (
        _differs(concept), _replicates(concept, concepts), _absent(concept, concepts.null), _acts(concept.patched, concept),
        _predicts(concept, concepts), _explained(concept),
    )  # fmt: skip
    return tuple(Rung(name, state, why) for (name, _), (state, why) in zip(RUNGS, found, strict=True))


def _differs(concept: Concept) -> tuple[str, str]:
    words = wording.words(concept.verdict)
    return (PASSED, words) if concept.verdict in CHANGED else (FAILED, words)


def _replicates(concept: Concept, concepts: RunConcepts) -> tuple[str, str]:
    if concept.replicated is None:
        return NOT_MEASURED, "there is one training"
    found = f"in {concept.n_trainings} of {concepts.n_trainings} trainings, {concepts.summary.needed} needed"
    return (PASSED if concept.replicated else FAILED), found


def _absent(concept: Concept, null: Mapping[str, Sequence[NullShare]] | None) -> tuple[str, str]:
    if null is None:
        return NOT_MEASURED, "needs a null diff (crossdiff null)"
    shares = null.get(concept.verdict)
    if not shares:
        return NOT_MEASURED, "the null diff does not count this verdict"
    absent = all(share.there <= NULL_SHARE * share.here for share in shares)
    here, there = spread([share.here for share in shares]), spread([share.there for share in shares])
    return (PASSED if absent else FAILED), f"{there} of latents get this verdict there, {here} here"


def _acts(patched: Sequence[Patched], concept: Concept) -> tuple[str, str]:
    if not patched:
        return NOT_MEASURED, "needs the causal test (crossdiff causal)"
    positive = sum(one.reduction.low > 0 for one in patched)
    closed = f"alone it closes {spread([one.closed for one in patched])} of the gap"
    if positive < len(patched):
        return FAILED, f"{closed}; interval above 0 in {positive} of {len(patched)} trainings"
    if len(patched) < concept.n_trainings:
        return NOT_MEASURED, f"{closed}, but only {len(patched)} of its {concept.n_trainings} trainings were tested"
    return PASSED, closed


def _predicts(concept: Concept, concepts: RunConcepts) -> tuple[str, str]:
    if not concepts.behaviours:
        return NOT_MEASURED, "no text is labelled with a behaviour"
    if not concept.predictions:
        return NOT_MEASURED, "another concept predicts each behaviour better in training; only the best is tested"
    if passed := told(concept):
        return PASSED, "; ".join(prediction_words(prediction) for prediction in passed)
    return FAILED, f"{prediction_words(concept.predictions[0])}, not above chance (0.5)"


def _explained(concept: Concept) -> tuple[str, str]:
    if concept.explanation is None:
        return NOT_MEASURED, "needs a language model (crossdiff interpret)"
    return PASSED, "by a language model"
