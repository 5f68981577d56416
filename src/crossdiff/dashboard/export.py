"""Cards of latents as one self-contained page: `crossdiff export`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from crossdiff.diff import open as open_run
from crossdiff.errors import UserError
from crossdiff.files import write_text
from crossdiff.report.cards import card_of
from crossdiff.report.tables import read_behaviours
from crossdiff.report.templating import environment
from crossdiff.report.wording import predicted

MAX_EXPORTED = 500


def export_page(run: Path, crosscoder: str | None, wanted: Sequence[str], path: Path) -> int:
    """Write the cards of latents as one self-contained page and return their number.

    Args:
        wanted: numbers, ranges such as 3-9, or verdicts such as chat_specific.
    """
    opened = open_run(run, crosscoder)
    verdicts = dict(opened.latents.select("latent", "verdict").iter_rows())
    latents = list(dict.fromkeys(latent for word in wanted for latent in _latents(word, verdicts)))
    if len(latents) > MAX_EXPORTED:
        raise UserError(f"--latents names {len(latents)} latents; a page holds at most {MAX_EXPORTED}, so name fewer")
    best = predicted(read_behaviours(opened.folder))
    page = environment().get_template("export.html.j2").render(
        title=f"Latents of {opened.name}: {opened.config.chat} and {opened.config.base}",
        cards=[card_of(opened.name, opened.latent(latent).record, best.get(latent, ())) for latent in latents],
    )  # fmt: skip
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path with -o") from None
    return len(latents)


def _latents(word: str, verdicts: dict[int, str]) -> list[int]:
    """The latents that one word of `--latents` names."""
    if word in set(verdicts.values()):
        return [latent for latent, verdict in verdicts.items() if verdict == word]
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
    if not found:
        names = ", ".join(sorted(set(verdicts.values())))
        raise UserError(f"--latents {word!r} is not a number, a range such as 3-9 or a verdict of this run ({names})")
    first, last = int(found[1]), int(found[2] or found[1])
    if not (first <= last and first in verdicts and last in verdicts):
        raise UserError(f"--latents {word}: expected latents from {min(verdicts)} to {max(verdicts)}")
    return list(range(first, last + 1))
