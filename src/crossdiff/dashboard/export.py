"""Cards of concepts and latents as one self-contained page: `crossdiff export`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from crossdiff.diff import Diff
from crossdiff.diff import open as open_run
from crossdiff.errors import UserError
from crossdiff.files import write_text
from crossdiff.report.cards import Card, card_of
from crossdiff.report.concept_cards import ConceptCard, concept_card
from crossdiff.report.concept_reading import COMMAND, concept_of, ranked, read_concepts
from crossdiff.report.examples import read_examples
from crossdiff.report.tables import read_behaviours
from crossdiff.report.templating import environment
from crossdiff.report.wording import predicted

MAX_EXPORTED = 500
REPLICATED = "replicated"
"""Word of `--concepts` for those that replicate."""


def export_page(
    run: Path, crosscoder: str | None, latents: Sequence[str], concepts: Sequence[str], path: Path
) -> tuple[int, int]:
    """Write cards as one self-contained page and return the number of concepts and of latents in it.

    Args:
        latents, concepts: numbers, ranges such as 3-9, or verdicts such as chat_specific; for concepts also `replicated`.
            Without both, the page has the concepts that replicate.
    """
    opened = open_run(run, crosscoder)
    wanted = concepts if concepts or latents else [REPLICATED]
    of_concepts = _concept_cards(opened, wanted) if wanted else []
    of_latents = _latent_cards(opened, latents) if latents else []
    about = f"{opened.config.chat} and {opened.config.base}"
    what = "Concepts" if not of_latents else f"Latents of {opened.name}" if not of_concepts else "Concepts and latents"
    page = environment().get_template("export.html.j2").render(
        title=f"{what}: {about}", concepts=of_concepts, cards=of_latents
    )  # fmt: skip
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path with -o") from None
    return len(of_concepts), len(of_latents)


def _concept_cards(opened: Diff, wanted: Sequence[str]) -> list[ConceptCard]:
    found = read_concepts(opened.path, with_examples=False)
    if found is None:
        raise UserError(f"{opened.path} has no concepts; run `crossdiff concepts {opened.path}` first, or name --latents")
    table = ranked(found)
    words = {word: table.filter(verdict=word)["concept"].to_list() for word in table["verdict"].unique()}
    words[REPLICATED] = table.filter(pl.col(REPLICATED))["concept"].to_list()
    numbers = _chosen("--concepts", wanted, table["concept"].to_list(), words)
    examples = read_examples(found.folder / "examples.sqlite", numbers, COMMAND)
    return [concept_card(concept_of(found, number, examples[number]), found) for number in numbers]


def _latent_cards(opened: Diff, wanted: Sequence[str]) -> list[Card]:
    table = opened.latents
    words = {word: table.filter(verdict=word)["latent"].to_list() for word in table["verdict"].unique()}
    latents = _chosen("--latents", wanted, table["latent"].to_list(), words)
    best = predicted(read_behaviours(opened.folder))
    return [card_of(opened.name, opened.latent(latent).record, best.get(latent, ())) for latent in latents]


def _chosen(option: str, wanted: Sequence[str], known: Sequence[int], words: Mapping[str, Sequence[int]]) -> list[int]:
    """The numbers that an option names, each once."""
    numbers = set(known)
    found = list(dict.fromkeys(number for word in wanted for number in _named(option, word, numbers, words)))
    if len(found) > MAX_EXPORTED:
        raise UserError(f"{option} names {len(found)} cards; a page holds at most {MAX_EXPORTED}, so name fewer")
    return found


def _named(option: str, word: str, known: set[int], words: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """The numbers that one word names."""
    if word in words:
        return words[word]
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
    if not found:
        names = ", ".join(sorted(words))
        raise UserError(f"{option} {word!r} is not a number, a range such as 3-9 or a verdict of this run ({names})")
    first, last = int(found[1]), int(found[2] or found[1])
    if not (first <= last and first in known and last in known):
        ends = f"expected {option[2:]} from {min(known)} to {max(known)}" if known else "this run has none"
        raise UserError(f"{option} {word}: {ends}")
    return range(first, last + 1)
