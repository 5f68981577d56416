"""What a latent is about, in two lines of a table: its label, its strongest tokens, and one snippet with the token marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from crossdiff.dashboard.catalogue import Coder
from crossdiff.dashboard.search import CONTEXTS, ranges, spans
from crossdiff.report.concept_cards import Title, title_of
from crossdiff.report.examples import TOKENS_AFTER, TOKENS_BEFORE, Example, joined, strongest_text, visible

TOKENS = 4
"""Strongest tokens that are shown."""
BEFORE, AFTER = 12, 6
"""Tokens of a snippet on either side of the marked one."""


class Brief(NamedTuple):
    """A latent in two lines.

    Attributes:
        label: its explanation, or that of its concept; None without one.
        tokens: the different tokens on which its strongest examples have their maximum.
        snippet: its strongest example, or the one with the words of a search; None if no example is stored.
        matches: the marked token is one of the search's words, and not necessarily the strongest.
    """

    label: str | None
    tokens: tuple[str, ...]
    snippet: Title | None
    matches: bool


def briefs(coder: Coder, latents: Sequence[int], search: str = "") -> dict[int, Brief]:
    """The latents of a page in brief; with `search`, each snippet shows the words where the latent is most active on them."""
    examples = coder.database.strongest(latents, CONTEXTS)
    return {latent: _brief(coder.label(latent), examples.get(latent, ()), search) for latent in latents}


def _brief(label: str | None, examples: Sequence[Example], search: str) -> Brief:
    tokens = dict.fromkeys(visible(strongest_text(example)) for example in examples)
    shown = tuple(tokens)[:TOKENS]
    if matched := _match(examples, search):
        return Brief(label, shown, title_of(matched, BEFORE, AFTER), True)
    return Brief(label, shown, title_of(examples[0], BEFORE, AFTER) if examples else None, False)


def _match(examples: Sequence[Example], search: str) -> Example | None:
    """The example with one of the words, at the word's token on which the latent is most active; None if none has one."""
    wanted, best = ranges(search), None
    for example in examples if wanted else ():
        first = max(0, example.position - TOKENS_BEFORE)
        tokens = example.tokens[first : example.position + TOKENS_AFTER + 1]
        groups = list(joined(tokens))
        where = spans([text for _, text in groups])
        hits = {at for at, word in enumerate(where.words) if any(low <= word < end for low, end in wanted)}
        for at, (own, text) in enumerate(groups) if hits else ():
            activation, position = max((tokens[each].activation, -each) for each in range(own.start, own.stop))
            is_better = best is None or activation > best.activation
            if is_better and not hits.isdisjoint(where.at(at, len(text))):
                best = replace(example, position=first - position, activation=activation)
    return best
