"""The model card of a published run: contents, training, quality, how to load it, and its limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from crossdiff.config import AnalyzeConfig, CrosscoderConfig, HarvestConfig, merge, validate
from crossdiff.latents.settings import analysis_settings
from crossdiff.report import concept_wording, wording
from crossdiff.report.concept_cards import plain_title
from crossdiff.report.concept_records import Concept, RunConcepts
from crossdiff.report.overview import caveats, short, title
from crossdiff.report.records import CrosscoderReport, RunReport
from crossdiff.report.templating import environment

VERDICT_ROWS = {
    "chat_specific": "verdict chat-specific", "chat_specific_paper": "chat-specific by the paper's rule",
    "complete_shrinkage": "verdict complete shrinkage", "latent_decoupling": "verdict latent decoupling",
    "rotated": "verdict rotated", "verdict_shared": "verdict shared", "base_specific": "verdict base-specific",
    "undecided": "verdict undecided", "dead": "never active on the analysed tokens", "chat_only": "chat-only by decoder norms",
    "base_only": "base-only by decoder norms", "shared": "shared by decoder norms",
}  # fmt: skip
"""Counts of health.json with their names; each latent has one verdict, and one class by its decoder norms."""
N_CONCEPTS = 12
"""Concepts that the card lists."""
ALWAYS = (
    "A latent that is specific to the chat model may still not affect what the model says; only a causal test shows that.",
    "The results cover one layer of one pair, and only concepts that occur in the analysed texts.",
    "The examples suggest what a latent means, but nobody has tested a reading of them here.",
)
"""Limits of every run."""


def model_card(
    report: RunReport, repository: str, licence: str, harvest: HarvestConfig, trained: Mapping[str, dict[str, Any]]
) -> str:
    """The card as Markdown with the front matter that the Hub reads.

    Args:
        harvest: the settings that the activations were harvested with.
        trained: the training settings of each crosscoder.
    """
    primary = report.primary
    models = [name for name in (report.base, report.chat) if name is not None]
    return environment().overlay(autoescape=False).get_template("model_card.md.j2").render(
        licence_identifier=licence if re.fullmatch(r"[a-z0-9.-]+", licence) and licence != "unknown" else "other",
        licence=licence,
        hub_models=[name for name in models if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)],
        title=title(report),
        base=short(report.base, "the base model"),
        chat=short(report.chat, "the chat model"),
        layer=report.layer,
        version=version("crossdiff"),
        headline=concept_wording.lead(report) if report.concepts else "",
        introduction=concept_wording.introduction(report.concepts) if report.concepts else [],
        concepts=_concepts(report),
        answer=" ".join(wording.answer(report)),
        tokens=wording.whole(report.n_tokens) if report.n_tokens else "",
        datasets=report.datasets,
        settings=_settings(harvest, analysis_settings(report.directory / primary.name), trained),
        crosscoders=[coder.title for coder in report.crosscoders],
        rows=_rows(report.crosscoders),
        repository=repository,
        primary=primary.name,
        example=primary.top.latents[0].latent if primary.top.latents else 0,
        limits=[*caveats(report), *ALWAYS],
        whole=wording.whole,
    )  # fmt: skip


def _concepts(report: RunReport) -> list[tuple[int, str, str]]:
    """Number, text and evidence of the first concepts, those of the chat model alone first."""
    if report.concepts is None:
        return []
    found = concept_wording.leading(report.concepts)[:N_CONCEPTS]
    return [(concept.number, _name(concept), _evidence(concept, report.concepts)) for concept in found]


def _name(concept: Concept) -> str:
    if concept.explanation is not None:
        return markdown(concept.explanation)
    if not concept.examples:
        return "never active on the analysed text"
    before, token, after = (markdown(part) for part in plain_title(concept.examples[0]))
    return f"… {before}**«{token}»**{after} …"


def _evidence(concept: Concept, concepts: RunConcepts) -> str:
    predicts = [f"predicts {concept_wording.prediction_words(each)}" for each in concept_wording.told(concept)]
    found = [wording.words(concept.verdict), concept_wording.replicated_words(concept, concepts.n_trainings), *predicts]
    return markdown("; ".join(found))


def markdown(text: str) -> str:
    """A text in which nothing is markup: every character that Markdown or HTML may read is escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#|!~&$])", r"\\\1", text)


def _settings(harvest: HarvestConfig, analysis: AnalyzeConfig, trained: Mapping[str, dict[str, Any]]) -> str:
    """The settings that produced the crosscoders, as YAML, without the models and texts, which the card names above."""
    sections = {"harvest": harvest, "analyze": analysis}
    values = {name: section.model_dump(mode="json", exclude_defaults=True) for name, section in sections.items()}
    values = {name: section for name, section in values.items() if section}
    coders = {name: validate(CrosscoderConfig, settings, name) for name, settings in trained.items() if settings}
    values["crosscoders"] = {
        name: merge({"sparsity": {"kind": coder.sparsity.kind}}, coder.model_dump(mode="json", exclude_defaults=True))
        for name, coder in coders.items()
    }
    return yaml.safe_dump(values, sort_keys=False)


def _rows(coders: tuple[CrosscoderReport, ...]) -> list[tuple[str, list[str]]]:
    sources = dict.fromkeys(source for coder in coders for source in coder.health.heldout.fve)
    rows = [("latents", [wording.whole(coder.health.n_latents) for coder in coders])]
    rows += [(f"FVE, {source}", [wording.fve(coder, source) for coder in coders]) for source in sources]
    rows += [
        ("L0", [wording.number(coder.health.heldout.l0) for coder in coders]),
        ("never active on the held-out tokens", [wording.share(coder.health.heldout.dead_share) for coder in coders]),
        ("held-out tokens", [wording.whole(coder.health.heldout.n_tokens) for coder in coders]),
        ("tokens trained on", [wording.trained_on(coder.health.training_tokens) for coder in coders]),
    ]
    return rows + [(name, [wording.count(coder, key) for coder in coders]) for key, name in VERDICT_ROWS.items()]
