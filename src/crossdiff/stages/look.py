"""The stage `look`: a first comparison of the two models, which trains nothing."""

from __future__ import annotations

from pathlib import Path

from crossdiff.corpus import resolve
from crossdiff.errors import UserError
from crossdiff.stages.definitions import look_stage
from crossdiff.stages.session import Session


def look(session: Session) -> None:
    """Write `look/` and print what it shows."""
    from crossdiff.look.terminal import print_look

    config = session.config
    if session.ranks.size > 1:
        raise UserError(f"crossdiff look runs in one process, found {session.ranks.size}; start it without torchrun")
    if not session.skips(look_stage(config)):
        _make(session)
    print_look(session.path / "look", session.console)


def _make(session: Session) -> None:
    from crossdiff.look.look import Look
    from crossdiff.models.names import fetch_adapter
    from crossdiff.text.documents import check_datasets

    config = session.config
    for name in (config.base, config.chat):
        fetch_adapter(name)  # its digest is part of the fingerprint
    datasets = tuple(resolve(dataset) for dataset in config.dataset)
    check_datasets(datasets)
    pair = session.load_pair()
    layer = pair.check_layer(config.layer)
    for remark in (*pair.remarks, *pair.check_max_length(config.harvest.max_length)):
        session.remark(remark)
    session.begin()

    def work(folder: Path) -> None:
        target = folder / "look"
        target.mkdir()
        with session.progress("look, tokens", config.look.max_tokens) as advance:
            found = Look(pair, layer, datasets, config.look, config.harvest, advance)
            found.read()
        found.write(target)

    session.run(look_stage(config), work)
