"""Numbers and sentences that the page and the terminal summary share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from crossdiff.latents.ranking import PLAUSIBLE, RANKED, title
from crossdiff.report.reading import CANDIDATE_DELTA_NORM, FEW_SPECIFIC
from crossdiff.report.records import BehaviourResult, CrosscoderReport, Limits, PoolScore, RunReport
from crossdiff.statistics import Estimate

CLEAR_GAIN = 0.1
"""Difference of AUROC from which one pool counts as ahead of another."""
UNDEFINED = "undefined"
NOT_READ = "not read"
"""Cell of a coder in a row about a source that it does not read."""
NO_PAIR = "needs two decoders"
"""Cell of a coder with one decoder in a row about both models."""
SAME_MODEL = (
    "The base and the chat model are the same model: their activations are equal on every token, so nothing here is a "
    "difference between two models. Was the right model given, and was it saved after its training?"
)
ONE_DECODER = "delta_norm and the verdicts need a crosscoder, which has one decoder per model."
NULL_RATES = ("chat_specific", "chat_specific_paper")
"""Sets whose share of the live latents is compared with the null diff."""
QUESTIONS = {
    "before_answer": "Before the answer",
    "whole_conversation": "Whole conversation",
}
POOLS = {
    "chat_specific": "specific pool",
    "shared": "shared pool",
    "base_sae": "SAE on the base model",
    "living": "live latents",
    "bag_of_words": "words of the prompt",
}
VERDICTS = {
    "chat_specific": "chat-specific",
    "complete_shrinkage": "complete shrinkage",
    "latent_decoupling": "latent decoupling",
    "rotated": "rotated",
    "shared": "shared",
    "base_specific": "base-specific",
    "undecided": "undecided",
    "dead": "dead",
}


def words(name: str) -> str:
    """A name from a file as words; a nu_reconstruction in it says which variant it is."""
    said = re.sub("nu_reconstruction(?!_nobias)", "nu_reconstruction_(with_bias)", name).replace("_nobias", "_(without_bias)")
    return VERDICTS.get(name) or said.replace("_", " ")


def pool(name: str) -> str:
    """A pool of the behaviours table as words."""
    return POOLS.get(name, words(name))


def question(name: str) -> str:
    """A question of the behaviours table as words."""
    return QUESTIONS.get(name, words(name).capitalize())


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, thousands separated; "undefined" for NaN and None."""
    if value is None or math.isnan(value):
        return UNDEFINED
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    if value == 0:
        return "0"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    exponent = int(power)
    if exponent < -4:
        return _minus(f"{mantissa}e{exponent}")
    decimals = digits - 1 - exponent
    return _minus(f"{round(value, decimals):,.{max(0, decimals)}f}")


def count(coder: CrosscoderReport, key: str) -> str:
    """Number of latents of a class, verdict or set, which a coder with one decoder cannot have."""
    return f"{coder.count(key):,}" if coder.compares else NO_PAIR


def null_rate(report: RunReport, coder: CrosscoderReport, key: str) -> str:
    """A share of the live latents, followed in brackets by that of the null diff, if it has this crosscoder."""
    if not coder.compares:
        return NO_PAIR
    null = report.null.get(coder.name)
    own = share(coder.rate(key))
    return own if null is None else f"{own} (null {share(null.rates.get(key))})"


def whole(value: int | None) -> str:
    """A count with thousands separated."""
    return UNDEFINED if value is None else f"{value:,}"


def trained_on(n_tokens: int | None) -> str:
    """The number of tokens that a crosscoder was trained on; published files do not tell it."""
    return "not known" if n_tokens is None else whole(n_tokens)


def latents(count: int) -> str:
    """A number of latents."""
    return f"{count:,} {'latent' if count == 1 else 'latents'}"


def compact(value: int) -> str:
    """A count to three digits: 395k, 1.27M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return str(value)


def share(value: float | None) -> str:
    """A share as a percentage of two or three digits; a share above 0 never rounds to 0."""
    if value is None or math.isnan(value):
        return UNDEFINED
    if 0 < value < 0.0001:
        return "< 0.01%"
    decimals = 0 if value == 0 or value >= 0.1 else 1 if value >= 0.01 else 2
    return _minus(f"{100 * value:.{decimals}f}%")


def fixed(value: float, decimals: int = 2) -> str:
    """A number between about -1 and 1 with a fixed number of decimals."""
    return UNDEFINED if math.isnan(value) else _minus(f"{value:.{decimals}f}")


def reason(text: str) -> str:
    """The stored reason of a verdict with true minus signs, and without a sign before 0."""
    return re.sub(r"(?<![\w.])-\d[\d,]*(?:\.\d+)?", lambda found: _minus(found[0]), text)


def interval(estimate: Estimate[float], decimals: int = 2) -> str:
    """0.86 [0.79, 0.92]; the value alone when it has no interval."""
    if math.isnan(estimate.value) or math.isnan(estimate.low) or math.isnan(estimate.high):
        return fixed(estimate.value, decimals)
    ends = (fixed(end, decimals) if math.isfinite(end) else number(end) for end in (estimate.low, estimate.high))
    return f"{fixed(estimate.value, decimals)} [{', '.join(ends)}]"


def fve_value(values: Mapping[str, float], source: str) -> str:
    """Fraction of variance explained without its interval; "not read" for a source that the coder does not read."""
    return number(values[source]) if source in values else NOT_READ


def fve(coder: CrosscoderReport, source: str) -> str:
    """Fraction of variance explained on held-out tokens with its interval; "not read" for a source that it does not read."""
    heldout = coder.health.heldout
    if source not in heldout.fve:
        return NOT_READ
    return interval(Estimate(heldout.fve[source], *heldout.fve_interval.get(source, (math.nan, math.nan))), 3)


def massive(report: RunReport) -> str | None:
    """How many tokens were left out because of their massive norm; None if there are none."""
    found = report.massive
    if found is None or not found.n_tokens or not report.n_tokens:
        return None
    often = ", ".join(f"{token!r} ({whole(count)})" for token, count in found.most_often)
    return (
        f"{whole(found.n_tokens)} of {whole(report.n_tokens)} tokens ({share(found.n_tokens / report.n_tokens)}) have "
        f"activations of more than {found.multiple:g} times the median norm. They are left out, so no number here includes "
        f"them; most often they are {often}."
    )


def one_decoder(report: RunReport) -> list[str]:
    """What the rows about both models cannot say of coders with one decoder."""
    return [
        f"{coder.title} reads one model and has one decoder, so it has no direction to compare: {ONE_DECODER}"
        for coder in report.crosscoders
        if not coder.compares
    ]


def answer(report: RunReport) -> list[str]:
    """What the counts of latents say, in plain sentences; the primary crosscoder comes first."""
    coder = report.primary
    same = [SAME_MODEL] if report.same_model else []
    if not coder.compares:
        return [*same, f"{coder.title} has one decoder, so it cannot tell which model a latent belongs to. {ONE_DECODER}"]
    sentences = [*same, *_specific_sentences(coder), *_null_sentences(report)]
    for other in report.crosscoders:
        if other is not coder and other.compares:
            named, specific = other.count("chat_only"), other.count("chat_specific")
            sentences.append(
                f"In the {other.title} crosscoder, delta_norm alone names {whole(named)} of {latents(other.health.n_latents)} "
                f"and latent scaling {whole(specific)}."
            )
    return sentences + _behaviour_sentences(coder)


def _specific_sentences(coder: CrosscoderReport) -> list[str]:
    limits = coder.limits
    n_latents, specific, named = coder.health.n_latents, coder.count("chat_specific"), coder.count("chat_only")
    dead = coder.health.heldout.n_dead
    subject = "none is" if specific == 0 else f"{whole(specific)} {'is' if specific == 1 else 'are'}"
    sentences = [
        f"Of the {latents(n_latents)} of the {coder.title} crosscoder, {subject} specific to the chat model by latent scaling.",
        "A crosscoder explains the activations of both models as sums of a few latents, each with one direction per model.",
        "Latent scaling measures how much of a latent's chat direction the base model has. Its two measures are 0 for nothing: "
        f"{title(RANKED[0])} must be below {limits.nu_error:g} and {title(RANKED[1])} below {limits.nu_reconstruction:g}, each "
        f"at the upper end of its 95% interval, and the base direction at most {_norm_ratio(limits)} as long as the chat one.",
    ]
    if named == 0:
        sentences.append("The lengths of the two directions alone (delta_norm of 0.9 or above) would have named none.")
    else:
        both = int(coder.latents.filter(coder.latents["delta_norm_class"] == "chat_only")["chat_specific"].sum())
        sentences.append(
            f"The lengths of the two directions alone (delta_norm of 0.9 or above) would have named {whole(named)}, of which "
            f"{whole(both)} also {'passes' if both == 1 else 'pass'} latent scaling."
        )
    shrunk, decoupled = coder.count("complete_shrinkage"), coder.count("latent_decoupling")
    if shrunk or decoupled:
        sentences.append(
            f"Some only look chat-only, because the base model has the concept too: {whole(shrunk)} by complete shrinkage (the "
            f"direction is in the base model's error), {whole(decoupled)} by latent decoupling (other latents carry it there)."
        )
    if rotated := coder.count("rotated"):
        sentences.append(
            f"{whole(rotated)} {'is' if rotated == 1 else 'are'} rotated: both models have the concept, in directions of "
            f"similar length that point different ways."
        )
    if dead >= n_latents:
        sentences.append("Every latent is dead on the held-out tokens, so this crosscoder says nothing about the two models.")
    return sentences


def _null_sentences(report: RunReport) -> list[str]:
    coder = report.primary
    null = report.null.get(coder.name)
    if null is None:
        return []
    return [
        f"The chat-specific latents are {share(coder.rate('chat_specific'))} of the live ones. In the null diff, whose "
        f"second model was only trained further on plain text, they are {share(null.rates.get('chat_specific'))} of "
        f"{whole(null.n_live)}."
    ]


def _norm_ratio(limits: Limits) -> str:
    """The base norm over the chat norm at the limit of delta_norm, which is 1 - ratio / 2 for a longer chat norm."""
    ratio = 2 * (1 - limits.delta_norm)
    return "half" if ratio == 0.5 else f"{ratio:.2g} times"


def _behaviour_sentences(coder: CrosscoderReport) -> list[str]:
    results = [result for result in coder.behaviours if result.question == "before_answer"]
    if not results:
        return []
    if not any("chat_specific" in result.scores for result in results):
        return ["No latent leans enough to the chat model to be tested on the labelled behaviours."]
    ahead = [result.behaviour for result in results if gain(result) >= CLEAR_GAIN]
    names = f" ({', '.join(words(name) for name in ahead)})" if ahead else ""
    return [
        f"For {len(ahead)} of {len(results)} labelled behaviours{names}, the best of the most chat-specific latents predicts "
        f"the behaviour better than the best shared latent, by at least {CLEAR_GAIN} AUROC on held-out conversations read only "
        f"up to where the answer begins."
    ]


def predicted(results: Sequence[BehaviourResult]) -> dict[int, tuple[str, ...]]:
    """The behaviours that each latent predicts best of the specific pool before the answer, in words."""
    found: dict[int, tuple[str, ...]] = {}
    for result in results:
        score = result.scores.get("chat_specific")
        if result.question == "before_answer" and score is not None and score.latent is not None:
            found[score.latent] = (*found.get(score.latent, ()), f"{words(result.behaviour)}, AUROC {interval(score.auroc)}")
    return found


def cases(result: BehaviourResult) -> str:
    """Number of held-out conversations with and without the behaviour."""
    first = next(iter(result.scores.values()))
    return f"{first.n_positive:,} with, {first.n_negative:,} without"


def gain(result: BehaviourResult) -> float:
    """AUROC of the best specific latent minus that of the best shared one; NaN when either was not scored."""
    specific, shared = result.scores.get("chat_specific"), result.scores.get("shared")
    if specific is None or shared is None:
        return math.nan
    # Rounded so that 0.61 - 0.51 is 0.1 and not a little less.
    return round(specific.auroc.value - shared.auroc.value, 9)


def judgement(result: BehaviourResult) -> str:
    """What a behaviour's scores show, failures included."""
    live, shared = result.scores.get("living"), result.scores.get("shared")
    specific = result.scores.get("chat_specific", live)
    if specific is None or math.isnan(specific.auroc.value):
        return "The specific pool has no latent to test."
    parts = [_against_shared(specific, shared, gain(result))] if live is None else []
    if specific.auroc.high < 0.5:
        parts.append("It does worse than chance (0.5).")
    elif specific.auroc.low <= 0.5:
        parts.append("The interval includes chance (0.5).")
    sae = result.scores.get("base_sae")
    if sae is not None and sae.auroc.value >= specific.auroc.value:
        parts.append(f"An SAE on the base model predicts it at least as well ({fixed(sae.auroc.value)}).")
    prompt = result.scores.get("bag_of_words")
    if prompt is not None and prompt.auroc.value >= specific.auroc.value:
        parts.append(f"The words of the prompt predict it at least as well ({fixed(prompt.auroc.value)}).")
    return " ".join(parts)


def _against_shared(specific: PoolScore, shared: PoolScore | None, difference: float) -> str:
    if shared is None or math.isnan(difference):
        return "There is no shared pool to compare with."
    if difference <= 0:
        scores = f"{fixed(specific.auroc.value)} against {fixed(shared.auroc.value)}"
        return f"Fails: the specific pool does not beat the shared pool ({scores})."
    if difference < CLEAR_GAIN:
        return f"No clear gain: {fixed(difference)} above the shared pool."
    overlap = specific.auroc.low <= shared.auroc.high and shared.auroc.low <= specific.auroc.high
    return f"Ahead of the shared pool by {fixed(difference)}{', but the intervals overlap' if overlap else ''}."


def selection(coder: CrosscoderReport) -> str:
    """How the latents that are shown in full were chosen."""
    if not coder.compares:
        return f"It has one decoder, so no latent is ranked or shown: {ONE_DECODER}"
    by = " and by ".join(map(title, RANKED))
    specific, candidates = coder.top.n_specific, len(coder.top.latents) - coder.top.n_specific
    if not coder.top.latents:
        return f"No latent has both nu defined and delta_norm of at least {CANDIDATE_DELTA_NORM:g}, so none is shown."
    if not candidates and specific >= FEW_SPECIFIC:
        return (
            f"These are the {specific} chat-specific latents with the lowest sum of their ranks by {by}, among those with both "
            f"between {PLAUSIBLE[0]:g} and {PLAUSIBLE[1]:g}."
        )
    followed = "Shown are" if specific == 0 else "It is followed by" if specific == 1 else "They are followed by"
    found = "No latent is" if specific == 0 else f"Only {latents(specific)} {'is' if specific == 1 else 'are'}"
    if not candidates:
        return f"{found} chat-specific, and no other has both nu and delta_norm of at least {CANDIDATE_DELTA_NORM:g}."
    return (
        f"{found} chat-specific. {followed} the nearest candidates: among the other "
        f"latents with delta_norm of at least {CANDIDATE_DELTA_NORM:g} and enough activations, those with the lowest sum of "
        f"ranks by {by}. Each card gives the latent's own verdict."
    )


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}") if text.strip("-0.,") else text.lstrip("-")
