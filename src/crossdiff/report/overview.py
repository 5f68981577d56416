"""A run at a glance: title, facts, the health table and caveats, for the page, the dashboard and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import NamedTuple

from pydantic import JsonValue

from crossdiff.report import wording
from crossdiff.report.records import CrosscoderReport, HeldOut, Massive, RunReport
from crossdiff.text.sequences import LOST_SHARE

DEAD_LIMIT = 0.2
"""Share of dead latents above which the page warns."""
LOW_FVE = 0.7
"""Fraction of variance explained below which the page warns."""
NORMS = (
    "length of the latents' decoder directions; they all start at the same length, and an L1 penalty can shrink them to nothing"
)
COUNTS = {
    "chat_only": ("chat-only by delta_norm", "the base direction is at most a fifth as long as the chat one"),
    "base_only": ("base-only by delta_norm", "the chat direction is at most a fifth as long as the base one"),
    "shared": ("shared by delta_norm", "the two directions are about equally long: at most a fifth apart"),
    "other": ("other by delta_norm", "between these classes"),
    "chat_specific": (
        "chat-specific",
        "latent scaling finds next to nothing of the chat direction in the base model's reconstruction and error",
    ),
    "chat_specific_paper": (
        "chat-specific, paper's rule",
        "nu_error and nu_reconstruction (with bias) under their limits without regard to their intervals, and chat-only by "
        "delta_norm",
    ),
    "template_only": ("chat-specific, template tokens only", "almost all of its active tokens belong to the chat template"),
    "complete_shrinkage": (
        "complete shrinkage",
        "looks chat-only by delta_norm, but the base model has the concept: its direction is in the base model's error",
    ),
    "latent_decoupling": (
        "latent decoupling",
        "looks chat-only by delta_norm, but the base model has the concept: other latents carry it there",
    ),
    "rotated": ("rotated", "both models have the concept, in directions of similar length that point different ways"),
    "base_specific": ("base-specific", "latent scaling finds next to nothing of the base direction in the chat model"),
}
"""Counts of health.json with their name in tables and their meaning."""


class Row(NamedTuple):
    """One row of a table with a value per crosscoder, and what it means."""

    name: str
    values: list[str]
    meaning: str = ""


def title(report: RunReport) -> str:
    return f"What {short(report.chat, 'the chat model')} has that {short(report.base, 'its base')} lacks"


def short(model: str | None, otherwise: str) -> str:
    """A model's name; of a local path only the last two parts, since the rest describes a disk and not a model."""
    if model is None:
        return otherwise
    path = PurePath(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


def facts(report: RunReport) -> list[str]:
    """The layer, the size and names of the texts, and the crosscoders."""
    facts = [f"residual stream after layer {report.layer}"]
    if report.n_tokens is not None:
        facts.append(f"{wording.compact(report.n_tokens)} tokens")
    if datasets := dict.fromkeys(share.dataset for share in report.datasets):
        facts.append(", ".join(datasets))
    return [*facts, " and ".join(coder.title for coder in report.crosscoders)]


def health_rows(report: RunReport) -> list[Row]:
    """The health table: quality, size, counts by class and verdict, and decoder norms of each crosscoder."""
    coders = report.crosscoders

    heldouts = [coder.health.heldout for coder in coders]
    size = "number of latents, width of the models, and the k of TopK or BatchTopK: active latents per token"
    fve = "fraction of variance explained; 1 is perfect; 95% interval"
    massive = "left out of every number here, because a few of them would dominate it"
    null = "of the live latents; in brackets the share in the null diff, whose second model was only trained further"
    rows = [Row("latents", [_latents_words(coder) for coder in coders], size)]
    for source in dict.fromkeys(source for heldout in heldouts for source in heldout.fve):
        rows.append(Row(f"FVE, {source}", [wording.fve(coder, source) for coder in coders], fve))
    rows += [
        Row("L0, active latents per token", [wording.number(heldout.l0) for heldout in heldouts]),
        Row("never active on held-out tokens", [_dead_words(heldout) for heldout in heldouts], "latents, as a share of all"),
        Row("held-out tokens", [wording.whole(heldout.n_tokens) for heldout in heldouts]),
        Row("tokens of massive norm", [_massive_words(report, heldout.massive) for heldout in heldouts], massive),
        Row("tokens trained on", [wording.trained_on(coder.health.training_tokens) for coder in coders]),
        Row("tokens analysed", [wording.whole(coder.health.analysed_tokens) for coder in coders]),
    ]
    never = "latents; these tokens are the ones that the verdicts rest on, so they get the verdict dead"
    rows.append(Row("never active on analysed tokens", [f"{coder.count('dead'):,}" for coder in coders], never))
    for key, (name, meaning) in COUNTS.items():
        rows.append(Row(name, [wording.count(coder, key) for coder in coders], meaning))
    for key in wording.NULL_RATES if report.null else ():
        name = f"{COUNTS[key][0]}, share"
        rows.append(Row(name, [wording.null_rate(report, coder, key) for coder in coders], null))
    movements = [_flat(coder.health.decoder_norm_movement) for coder in coders]
    return rows + [row._replace(name=f"decoder norms, {row.name}", meaning=NORMS) for row in _side_by_side(movements)]


def _latents_words(coder: CrosscoderReport) -> str:
    k = "" if coder.health.k is None else f", k {coder.health.k}"
    return f"{coder.health.n_latents:,} in d {coder.health.d_model:,}{k}"


def _dead_words(heldout: HeldOut) -> str:
    return f"{wording.share(heldout.dead_share)} ({heldout.n_dead:,})"


def _massive_words(report: RunReport, massive: Massive) -> str:
    """Those that the harvest left out, or held-out ones that are only kept out of the FVE."""
    if report.massive is not None and report.massive.n_tokens:
        return wording.whole(report.massive.n_tokens)
    if massive.n_tokens == 0:
        return "none"
    values = ", ".join(f"FVE {source} {wording.number(value)}" for source, value in massive.fve.items())
    return f"{massive.n_tokens:,}" + (f" ({values})" if values else "")


def control_rows(report: RunReport) -> list[Row]:
    """The controls of latent scaling."""
    return _side_by_side([_flat(coder.health.controls) for coder in report.crosscoders])


def _side_by_side(columns: list[dict[str, str]]) -> list[Row]:
    keys = dict.fromkeys(key for column in columns for key in column)
    return [Row(wording.words(key), [column.get(key, "") for column in columns]) for key in keys]


def _flat(record: Mapping[str, JsonValue], prefix: str = "") -> dict[str, str]:
    """A nested record with one entry per value, its keys joined by a comma; `quantiles` names those of its lists."""
    quantiles = record.get("quantiles")
    of = ""
    if isinstance(quantiles, list):
        of = f" (quantiles {', '.join(f'{at:.3g}' for at in quantiles if isinstance(at, int | float))})"
    rows: dict[str, str] = {}
    for key, value in record.items():
        name = f"{prefix}, {key}" if prefix else key
        if isinstance(value, dict):
            rows |= _flat(value, name)
        elif key != "quantiles":
            rows[name + of if isinstance(value, list) else name] = _value_words(value)
    return rows


def _value_words(value: JsonValue) -> str:
    if isinstance(value, list):
        return ", ".join(_value_words(part) for part in value)
    if isinstance(value, int):
        return f"{value:,}"
    return wording.number(value, 2) if isinstance(value, float) else wording.UNDEFINED


def caveats(report: RunReport) -> list[str]:
    """What weakens this run's results; limits of every run are in the template."""
    found = [wording.SAME_MODEL] if report.same_model else []
    if (massive := wording.massive(report)) is not None:
        found.append(massive)
    found += [
        f"{name} was analysed with other limits or by other nus since its null diff, which is left out; run `crossdiff null` "
        "again."
        for name in report.null_outdated
    ]
    found += [f"{name} is trained but not analysed, so it is not on this page." for name in report.not_analysed]
    found += [
        f"{wording.share(texts.lost_share)} of the assistant's tokens of {texts.name} were beyond harvest.max_length and left "
        "out, so concepts of late answer tokens are missing."
        for texts in report.texts
        if texts.lost_share >= LOST_SHARE
    ]
    for coder in report.crosscoders:
        heldout = coder.health.heldout
        if heldout.dead_share > DEAD_LIMIT:
            found.append(
                f"{wording.share(heldout.dead_share)} of the {coder.title} latents are never active on the held-out tokens."
            )
        low = {source: value for source, value in heldout.fve.items() if value < LOW_FVE}
        if low:
            parts = ", ".join(f"{wording.number(value)} of {source}" for source, value in low.items())
            found.append(
                f"{coder.title} explains little of the variance ({parts}); concepts in the rest are missing from every count."
            )
        if not coder.compares:
            found.append(f"{coder.title} has one decoder: {wording.ONE_DECODER}")
            continue
        if undecided := coder.count("undecided"):
            found.append(
                f"{coder.title}: {wording.latents(undecided)} undecided, because of too few active tokens, an undefined nu or "
                f"an interval that includes its limit; the latent table gives the reason for each."
            )
        if coder.count("chat_only") == 0:
            found.append(
                f"No {coder.title} latent has delta_norm of 0.9 or above. All decoder norms start equal and a short training "
                f"leaves them little time to part, so this alone does not rule out chat-only concepts."
            )
        if not coder.behaviours:
            found.append(f"{coder.title} was not compared with labelled behaviours.")
    return found
