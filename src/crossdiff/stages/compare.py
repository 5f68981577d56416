"""The stage `compare`: the crosscoders of a run side by side."""

from __future__ import annotations

from pathlib import Path

from crossdiff.files import read_json, write_json
from crossdiff.integrity import intact
from crossdiff.stages.definitions import compare_stage
from crossdiff.stages.session import Session


def compare(session: Session) -> None:
    """Write `comparison.json` and print it."""
    from crossdiff.compare.terminal import comparison_table

    def work(folder: Path) -> None:
        from crossdiff.compare.coders import compare_coders

        store, config = session.store(), session.config.compare
        crosscoders = {name: session.crosscoder(name) for name in session.names}
        if session.ranks.is_first:
            with session.progress("compare, tokens", config.max_tokens) as advance:
                write_json(folder / "comparison.json", compare_coders(crosscoders, store, session.load_pair(), config, advance))

    session.run(compare_stage(session.config, session.names), work)
    if session.ranks.is_first:
        session.console.print(comparison_table(read_json(intact(session.path / "comparison.json"))))
