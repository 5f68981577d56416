"""The concepts of a run by the latents of one training: names for its latents, and what a list of concepts offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from crossdiff.report.concept_reading import ranked
from crossdiff.report.concept_records import RunConcepts
from crossdiff.report.examples import visible

MOST_CHOICES = 200
"""Concepts that a list offers."""


class ConceptChoice(NamedTuple):
    """A concept with its name, its verdict and its members in one training; its activation there is the sum of theirs."""

    number: int
    name: str
    verdict: str
    members: tuple[int, ...]


def concept_name(explanation: str | None, tokens: Sequence[str]) -> str:
    """What is known of a concept in a few words: its explanation, or the tokens on which it is most active."""
    return explanation or f"most active on {', '.join(f'«{visible(token)}»' for token in tokens)}"


def choices(concepts: RunConcepts | None, training: str) -> list[ConceptChoice]:
    """The concepts that have members in a training, those first that replicate and that only the chat model has."""
    if concepts is None:
        return []
    members: dict[int, list[int]] = {}
    for latent, concept in concepts.of_latents(training).items():
        members.setdefault(concept, []).append(latent)
    rows = ranked(concepts).select("concept", "explanation", "tokens", "verdict")
    return [
        ConceptChoice(number, concept_name(explanation, tokens), verdict, tuple(members[number]))
        for number, explanation, tokens, verdict in rows.iter_rows()
        if number in members
    ][:MOST_CHOICES]


def concept_labels(concepts: RunConcepts | None, training: str) -> dict[int, str]:
    """A name for each latent of a training that is a member of a concept."""
    if concepts is None:
        return {}
    rows = concepts.table.select("concept", "explanation", "tokens")
    names = {number: concept_name(explanation, tokens) for number, explanation, tokens in rows.iter_rows()}
    return {latent: f"concept {number}: {names[number]}" for latent, number in concepts.of_latents(training).items()}
