"""The stage `causal`: patch latents into the base model and measure how much closer it comes to the chat model."""

from __future__ import annotations

from pathlib import Path

from crossdiff.files import read_json
from crossdiff.integrity import intact, read_parquet
from crossdiff.stages.definitions import causal_stage, concept_causal_stage
from crossdiff.stages.session import Session


def causal(session: Session) -> None:
    """Run the causal test of every coder that reads both models; a coder of one model is skipped with a message."""
    for name in session.names:
        if session.config.trainings[name].inputs.kind == "single":
            session.console.print(f"{name}: skipped, since it reads only one model and has nothing to patch")
        else:
            _causal_test(session, name)
    if session.paired_trainings:
        _concept_test(session, session.paired_trainings)


def _causal_test(session: Session, name: str) -> None:
    def work(folder: Path) -> None:

        from crossdiff.causal.causal_test import causal_test

        store = session.store()
        crosscoder = session.crosscoder(name)
        table = read_parquet(session.path / name / "latents.parquet") if name in session.paired_names else None
        pair = session.load_pair()
        (folder / name).mkdir(exist_ok=True)
        with session.progress(f"causal {name}, conversations", None) as advance:
            causal_test(
                folder / name, folder / "parts", pair, store, crosscoder, table, session.config.causal, advance, session.ranks
            )

    session.run(causal_stage(session.config, name), work)
    if session.ranks.is_first:
        from crossdiff.causal.terminal import print_causal

        print_causal(read_json(intact(session.path / name / "causal.json")), name, session.console)


def _concept_test(session: Session, names: tuple[str, ...]) -> None:
    """Patch each replicated concept of the run alone, and all of them together, in every training."""
    folder = session.path / "concepts"

    def work(target: Path) -> None:

        from crossdiff.causal.concept_test import concept_test
        from crossdiff.concepts.candidates import read_training

        config, store = session.config, session.store()
        trainings = {}
        for name in names:
            found = read_training(session.path, name, session.device)
            trainings[name] = (found.crosscoder, found.others.tolist())
        concepts, members = (read_parquet(folder / file) for file in ("concepts.parquet", "members.parquet"))
        (target / "concepts").mkdir(exist_ok=True)
        with session.progress("causal concepts, conversations", None) as advance:
            concept_test(
                target / "concepts", target / "parts", session.load_pair(), store, trainings, concepts, members, config.causal,
                advance, session.ranks,
            )  # fmt: skip

    session.run(concept_causal_stage(session.config, names), work)
    if session.ranks.is_first:
        from crossdiff.causal.terminal import print_concept_causal

        print_concept_causal(folder, session.console)
