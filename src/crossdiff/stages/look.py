"""The stage `look`: a first comparison of the two models, which trains nothing."""

from __future__ import annotations

from pathlib import Path

from crossdiff.corpus import resolve
from crossdiff.models.pair import Pair
from crossdiff.stages.definitions import look_stage
from crossdiff.stages.harvest import load_checked_pair
from crossdiff.stages.session import Session


def look(session: Session, pair: Pair | None = None, in_full: bool = True) -> None:
    """Write `look/` and print what it shows.

    Args:
        pair: the run's models, if they are loaded and checked already.
        in_full: print the tables, not only the main sentences.
    """
    from crossdiff.look.terminal import print_look

    if not session.skips(look_stage(session.config)):
        _make(session, pair or load_checked_pair([session]))
    if session.ranks.is_first:
        print_look(session.path / "look", session.console, in_full)


def _make(session: Session, pair: Pair) -> None:
    from crossdiff.look.look import Look
    from crossdiff.report.look import write_look_page

    config = session.config
    session.begin()

    def work(folder: Path) -> None:
        target = folder / "look"
        target.mkdir(exist_ok=True)
        datasets = tuple(resolve(dataset) for dataset in config.dataset)
        with session.progress("look, tokens", config.look.max_tokens) as advance:
            found = Look(pair, pair.check_layer(config.layer), datasets, config.look, config.harvest, advance)
            parts = found.read(folder, session.ranks)
        if session.ranks.is_first:
            found.write(parts, target)
            write_look_page(folder, config.base, config.chat)

    session.run(look_stage(config), work)
