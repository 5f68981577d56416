"""The stage `concepts`: group the latents of all trainings that say that the models differ, and describe each group."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crossdiff.stages.definitions import concepts_stage
from crossdiff.stages.session import Session

if TYPE_CHECKING:
    from crossdiff.models.pair import Pair


def concepts(session: Session, pair: Pair | None = None) -> None:
    """Write the folder `concepts` of the run; a run without a crosscoder that reads both models has none.

    Args:
        pair: the models, if they are loaded.
    """
    names = session.paired_trainings
    if not names:
        session.console.print("concepts: skipped, since no crosscoder of this run reads both models")
        return
    for name in names:
        session.check_analysed(name)

    def work(folder: Path) -> None:
        from crossdiff.concepts.candidates import read_training
        from crossdiff.concepts.find import Settings, find_concepts

        config, store = session.config, session.store()
        trainings = [read_training(session.path, name, session.device) for name in names]
        target = folder / "concepts"
        target.mkdir(exist_ok=True)
        with session.progress("concepts, tokens", 2 * store.n_tokens) as advance:
            settings = Settings(config.concepts, config.analyze)
            find_concepts(target, trainings, store, pair or session.load_pair(), settings, advance, session.ranks)

    session.run(concepts_stage(session.config, names), work)
