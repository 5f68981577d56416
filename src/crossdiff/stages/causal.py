"""The stage `causal`: patch the latents of each coder into the base model and measure what they do."""

from __future__ import annotations

from pathlib import Path

from crossdiff.files import read_json
from crossdiff.stages.definitions import causal_stage
from crossdiff.stages.session import Session


def causal(session: Session) -> None:
    """The causal test of every coder that describes the models' difference; those of one model alone are named and skipped."""
    for name in session.names:
        if session.config.crosscoders[name].inputs.kind == "single":
            session.console.print(f"{name}: reads only one model, so it has nothing to patch")
        else:
            _causal_test(session, name)


def _causal_test(session: Session, name: str) -> None:
    """Patch the latents of one coder, write what they do, and print it."""

    def work(folder: Path) -> None:
        import polars as pl

        from crossdiff.causal.causal_test import causal_test

        store, crosscoder, config = session.store(), session.crosscoder(name), session.config.causal
        table = pl.read_parquet(session.path / name / "latents.parquet") if name in session.paired_names else None
        pair = session.load_pair()
        (folder / name).mkdir(exist_ok=True)
        with session.progress(f"causal {name}, conversations", None) as advance:
            causal_test(
                folder / name, folder / "parts", pair, store, crosscoder, table, config, advance, session.ranks
            )  # fmt: skip

    session.run(causal_stage(session.config, name), work)
    if session.ranks.is_first:
        from crossdiff.causal.terminal import print_causal

        print_causal(read_json(session.path / name / "causal.json"), name, session.console)
