"""One latent's card outside the dashboard: inline in a notebook, and many of them in one self-contained page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from crossdiff.diff import open as open_run
from crossdiff.errors import UserError
from crossdiff.report.cards import LEVELS, Card, card_of
from crossdiff.report.environment import environment
from crossdiff.report.inline import OPEN_EXAMPLES, fragment
from crossdiff.report.reading import read_behaviours
from crossdiff.report.records import behaviour_results
from crossdiff.report.wording import predicted

MAX_EXPORTED = 500


def latent_html(run: Path, crosscoder: str | None, latent: int) -> str:
    """The card of one latent as a fragment of HTML that needs no script, no file and no host.

    Raises:
        UserError: there is no such run, crosscoder or latent.
    """
    return fragment(cards=list(_cards(run, crosscoder, [latent])[1]))


def export_page(run: Path, crosscoder: str | None, wanted: Sequence[str], path: Path) -> int:
    """Write the cards of latents as one self-contained page; returns how many.

    Args:
        wanted: numbers, ranges such as 3-9, or verdicts such as chat_specific.

    Raises:
        UserError: a word that is none of these, a latent that does not exist, too many, or a path that cannot be written.
    """
    table = open_run(run, crosscoder).latents
    verdicts = dict(table.select("latent", "verdict").iter_rows())
    latents = list(dict.fromkeys(latent for word in wanted for latent in _latents(word, verdicts)))
    if len(latents) > MAX_EXPORTED:
        raise UserError(f"{len(latents)} latents are asked for; a page holds at most {MAX_EXPORTED}: name fewer")
    title, cards = _cards(run, crosscoder, latents)
    page = environment().get_template("export.html.j2").render(
        title=title, cards=list(cards), open_examples=OPEN_EXAMPLES, levels=range(1, LEVELS + 1)
    )  # fmt: skip
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return len(latents)


def _cards(run: Path, crosscoder: str | None, latents: Sequence[int]) -> tuple[str, Iterator[Card]]:
    opened = open_run(run, crosscoder)
    best = predicted(behaviour_results(read_behaviours(opened.folder)))
    title = f"Latents of {opened.name}: {opened.config.chat} and {opened.config.base}"
    return title, (card_of(opened.name, opened.latent(latent).record, best.get(latent, ())) for latent in latents)


def _latents(word: str, verdicts: dict[int, str]) -> list[int]:
    """The latents that one word of `--latents` names."""
    if word in set(verdicts.values()):
        return [latent for latent, verdict in verdicts.items() if verdict == word]
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
    if not found:
        names = ", ".join(sorted(set(verdicts.values())))
        raise UserError(f"--latents {word!r} is no number, no range such as 3-9 and no verdict of this run ({names})")
    first, last = int(found[1]), int(found[2] or found[1])
    if not (first <= last and first in verdicts and last in verdicts):
        raise UserError(f"--latents {word}: there are latents from {min(verdicts)} to {max(verdicts)}")
    return list(range(first, last + 1))
