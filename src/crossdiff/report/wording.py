"""Numbers and sentences that the page and the terminal summary share."""

import math
from collections.abc import Sequence

from crossdiff.report.reading import CANDIDATE_DELTA_NORM, FEW_SPECIFIC
from crossdiff.report.records import BehaviourResult, CrosscoderReport, Estimate, Limits, PoolScore, RunReport

CLEAR_GAIN = 0.1
"""A difference of AUROC from which one pool is said to be ahead of another."""
UNDEFINED = "undefined"
ONE_DECODER = "delta_norm and the verdicts need a crosscoder, which has a decoder for each model."

QUESTIONS = {
    "before_answer": "Before the answer",
    "whole_conversation": "Whole conversation",
}
POOLS = {
    "chat_specific": "specific pool",
    "shared": "shared pool",
    "base_sae": "SAE on the base model",
    "living": "living latents",
    "bag_of_words": "bag of words on the prompt",
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
    """A name from a file as words."""
    return VERDICTS.get(name) or name.replace("_", " ")


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
    return f"{coder.count(key):,}" if coder.compares else "one decoder"


NULL_RATES = ("chat_specific", "chat_specific_paper")
"""What is set beside the null diff."""


def null_rate(report: RunReport, coder: CrosscoderReport, key: str) -> str:
    """A share of the live latents, beside that of the null diff."""
    if not coder.compares:
        return "one decoder"
    null = report.null.get(coder.name)
    return f"{share(coder.rate(key))}, null {share(None if null is None else null.rates.get(key))}"


def whole(value: int | None) -> str:
    """A count with thousands separated."""
    return UNDEFINED if value is None else f"{value:,}"


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
    """A share as a percentage of two or three digits; shares that are not 0 do not round to it."""
    if value is None or math.isnan(value):
        return UNDEFINED
    if 0 < value < 0.0001:
        return "< 0.01%"
    decimals = 0 if value == 0 or value >= 0.1 else 1 if value >= 0.01 else 2
    return f"{100 * value:.{decimals}f}%"


def fixed(value: float, decimals: int = 2) -> str:
    """A number between about -1 and 1 with a fixed number of decimals."""
    return UNDEFINED if math.isnan(value) else _minus(f"{value:.{decimals}f}")


def interval(estimate: Estimate, decimals: int = 2) -> str:
    """0.86 [0.79, 0.92]; the value alone when it has no interval."""
    if math.isnan(estimate.value) or math.isnan(estimate.low) or math.isnan(estimate.high):
        return fixed(estimate.value, decimals)
    ends = (fixed(end, decimals) if math.isfinite(end) else number(end) for end in (estimate.low, estimate.high))
    return f"{fixed(estimate.value, decimals)} [{', '.join(ends)}]"


def fve(coder: CrosscoderReport, source: str) -> str:
    """Fraction of variance explained on held-out tokens, with its interval where the file has one."""
    heldout = coder.health.heldout
    value = heldout.fve.get(source)
    return interval(Estimate(math.nan if value is None else value, *heldout.fve_interval.get(source, ())), 3)


def answer(report: RunReport) -> list[str]:
    """The page's answer as plain sentences, about the primary crosscoder first."""
    if not report.primary.compares:
        return [f"The coder {report.primary.title} has one decoder, which cannot tell whose a latent is. {ONE_DECODER}"]
    sentences = [*_specific_sentences(report.primary, report.limits), *_null_sentences(report)]
    for coder in report.crosscoders:
        if coder is not report.primary and coder.compares:
            named, specific = coder.count("chat_only"), coder.count("chat_specific")
            sentences.append(
                f"In the {coder.title} crosscoder delta_norm alone names {whole(named)} of "
                f"{whole(coder.health.n_latents)}, latent scaling {whole(specific)}."
            )
    sentences.extend(_behaviour_sentences(report.primary))
    return sentences


def _specific_sentences(coder: CrosscoderReport, limits: Limits) -> list[str]:
    n_latents, specific, named = coder.health.n_latents, coder.count("chat_specific"), coder.count("chat_only")
    subject = "none is" if specific == 0 else f"{whole(specific)} {'is' if specific == 1 else 'are'}"
    sentences = [
        f"Of {whole(n_latents)} latents of the {coder.title} crosscoder, {subject} specific to the chat model by "
        f"latent scaling (nu_error < {limits.nu_error:g}, nu_reconstruction < {limits.nu_reconstruction:g}, upper ends "
        f"of the 95% intervals, base decoder norm at most {_norm_ratio(limits)} the chat one)."
    ]
    if named == 0:
        sentences.append("delta_norm alone would have named none (0.9 or above).")
    else:
        both = coder.latents.filter(coder.latents["delta_norm_class"] == "chat_only")["chat_specific"].sum()
        sentences.append(
            f"delta_norm alone would have named {whole(named)} (0.9 or above), of which {whole(int(both))} "
            f"{'passes' if both == 1 else 'pass'} latent scaling as well."
        )
    shrunk, decoupled = coder.count("complete_shrinkage"), coder.count("latent_decoupling")
    if shrunk or decoupled:
        sentences.append(
            f"Of the others the base model has the concept too: {whole(shrunk)} by complete shrinkage (it is in the base "
            f"model's error), {whole(decoupled)} by latent decoupling (other latents carry it there)."
        )
    rotated, dead = coder.count("rotated"), coder.health.heldout.n_dead
    if rotated:
        sentences.append(
            f"{whole(rotated)} {'other has' if rotated == 1 else 'others have'} a low nu although the decoder norms "
            f"are alike: both models hold the concept, in different directions (rotated)."
        )
    if dead >= n_latents:
        sentences.append("Every latent is dead on the held-out tokens, so this crosscoder says nothing about the pair.")
    return sentences


def _null_sentences(report: RunReport) -> list[str]:
    coder = report.primary
    null = report.null.get(coder.name)
    if null is None:
        return []
    return [
        f"The specific ones are {share(coder.rate('chat_specific'))} of its live latents; in the null diff, where the second "
        f"model was only trained further on plain text, {share(null.rates.get('chat_specific'))} of {whole(null.n_live)}."
    ]


def _norm_ratio(limits: Limits) -> str:
    """The base norm over the chat norm at the limit of delta_norm, which is 1 - ratio / 2 for a longer chat norm."""
    ratio = 2 * (1 - limits.delta_norm)
    return "half" if ratio == 0.5 else f"{ratio:.2g} times"


def _behaviour_sentences(coder: CrosscoderReport) -> list[str]:
    results = [result for result in coder.behaviour_results() if result.question == "before_answer"]
    if not results:
        return []
    if not any("chat_specific" in result.scores for result in results):
        return ["No latent leans to the chat model enough to be tested on the labelled behaviours."]
    ahead = [result.behaviour for result in results if gain(result) >= CLEAR_GAIN]
    names = f" ({', '.join(words(name) for name in ahead)})" if ahead else ""
    return [
        f"On held-out conversations, read only up to where the answer begins, the best latent of the specific pool "
        f"predicts the behaviour better than the best of the shared pool, by at least {CLEAR_GAIN} AUROC, for "
        f"{len(ahead)} of {len(results)} labelled behaviours{names}."
    ]


def predicted(results: Sequence[BehaviourResult]) -> dict[int, tuple[str, ...]]:
    """Which behaviours each latent predicts best of the specific pool, before the answer, in words."""
    found: dict[int, tuple[str, ...]] = {}
    for result in results:
        score = result.scores.get("chat_specific")
        if result.question == "before_answer" and score is not None and score.latent is not None:
            found[score.latent] = (*found.get(score.latent, ()), f"{words(result.behaviour)}, AUROC {interval(score.auroc)}")
    return found


def gain(result: BehaviourResult) -> float:
    """AUROC of the best specific latent minus that of the best shared one; NaN when either was not scored."""
    specific, shared = result.scores.get("chat_specific"), result.scores.get("shared")
    if specific is None or shared is None:
        return math.nan
    # Rounded so that 0.61 - 0.51 is 0.1 and not a little less.
    return round(specific.auroc.value - shared.auroc.value, 9)


def judgement(result: BehaviourResult) -> str:
    """What a behaviour's scores show, failures included."""
    living, shared = result.scores.get("living"), result.scores.get("shared")
    specific = result.scores.get("chat_specific", living)
    if specific is None or math.isnan(specific.auroc.value):
        return "No latent of the specific pool to test."
    parts = [_against_shared(specific, shared, gain(result))] if living is None else []
    if specific.auroc.high < 0.5:
        parts.append("It does worse than chance (0.5).")
    elif specific.auroc.low <= 0.5:
        parts.append("The interval includes chance (0.5).")
    sae = result.scores.get("base_sae")
    if sae is not None and sae.auroc.value >= specific.auroc.value:
        parts.append(f"An SAE on the base model predicts it as well or better ({fixed(sae.auroc.value)}).")
    prompt = result.scores.get("bag_of_words")
    if prompt is not None and prompt.auroc.value >= specific.auroc.value:
        parts.append(f"The words of the prompt predict it as well or better ({fixed(prompt.auroc.value)}).")
    return " ".join(parts)


def _against_shared(specific: PoolScore, shared: PoolScore | None, difference: float) -> str:
    if shared is None or math.isnan(difference):
        return "No shared pool to compare with."
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
    specific, candidates = coder.top.n_specific, len(coder.top.latents) - coder.top.n_specific
    if not coder.top.latents:
        return f"No latent has both nu defined and delta_norm of at least {CANDIDATE_DELTA_NORM:g}, so none is shown."
    if not candidates and specific >= FEW_SPECIFIC:
        return f"The {specific} chat-specific latents with the lowest sum of ranks of nu_error and nu_reconstruction."
    found = "No latent is" if specific == 0 else f"Only {latents(specific)} {'is' if specific == 1 else 'are'}"
    if not candidates:
        return f"{found} chat-specific, and no other has both nu and delta_norm of at least {CANDIDATE_DELTA_NORM:g}."
    return (
        f"{found} chat-specific. {'After those come' if specific else 'Shown are'} the nearest candidates, by the "
        f"lowest sum of ranks among the other latents with delta_norm of at least {CANDIDATE_DELTA_NORM:g} and enough "
        f"activations; each card has its own verdict."
    )


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}") if text.strip("-0.,") else text.lstrip("-")
