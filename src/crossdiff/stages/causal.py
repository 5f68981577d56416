"""The stage `causal`: patch latents into the base model and measure how much closer it comes to the chat model."""

from __future__ import annotations

from pathlib import Path

from crossdiff.files import read_json
from crossdiff.stages.definitions import causal_stage
from crossdiff.stages.session import Session


def causal(session: Session) -> None:
    """Run the causal test of every coder that reads both models; a coder of one model is skipped with a message."""
    for name in session.names:
        if session.config.crosscoders[name].inputs.kind == "single":
            session.console.print(f"{name}: skipped, since it reads only one model and has nothing to patch")
        else:
            _causal_test(session, name)


def _causal_test(session: Session, name: str) -> None:
    def work(folder: Path) -> None:
        import polars as pl

        from crossdiff.causal.causal_test import causal_test

        store = session.store()
        crosscoder = session.crosscoder(name)
        table = pl.read_parquet(session.path / name / "latents.parquet") if name in session.paired_names else None
        pair = session.load_pair()
        (folder / name).mkdir(exist_ok=True)
        with session.progress(f"causal {name}, conversations", None) as advance:
            causal_test(
                folder / name, folder / "parts", pair, store, crosscoder, table, session.config.causal, advance, session.ranks
            )

    session.run(causal_stage(session.config, name), work)
    if session.ranks.is_first:
        from crossdiff.causal.terminal import print_causal

        print_causal(read_json(session.path / name / "causal.json"), name, session.console)
