"""The stage `train`: one for each crosscoder; those with the same batches share one pass. Published ones are only read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossdiff.run import Stage
from crossdiff.stages.definitions import train_stage
from crossdiff.stages.session import Session, run_together


def train(session: Session, names: Sequence[str]) -> None:
    """Train the crosscoders that are not trained yet, each into its folder, and read the published ones."""
    stages = {name: train_stage(session.config, name) for name in dict.fromkeys(names)}
    wanted = {name: stage for name, stage in stages.items() if not session.skips(stage)}
    for name in [name for name in wanted if name in session.config.published]:
        _adopt(session, name, wanted.pop(name))
    if not wanted:
        return
    from crossdiff.crosscoder.train import Job, train_together

    config, store = session.config, session.store()

    def work(folders: list[Path]) -> None:
        jobs = []
        for (name, stage), folder in zip(wanted.items(), folders, strict=True):
            (folder / name).mkdir(exist_ok=True)
            shown_in = session.path / "tensorboard" / f"{name}-{stage.fingerprint}"
            jobs.append(Job(folder / name, config.trainings[name], shown_in))
        with session.progress(f"train {', '.join(wanted)}, steps", None) as advance:
            last = 0

            def report(step: int, n_steps: int, records: dict[str, Any]) -> None:
                nonlocal last
                advance(max(0, step - last), _note(records), n_steps)
                last = step

            train_together(jobs, store, session.device, config.trackers, report, session.ranks, config.latent_ranks)

    run_together([(session, stage) for stage in wanted.values()], work)


def _adopt(session: Session, name: str, stage: Stage) -> None:
    """Write a published crosscoder into its folder, as if it had been trained on the store."""
    from crossdiff.crosscoder.checkpoint import save
    from crossdiff.crosscoder.train import origin_of
    from crossdiff.published.in_run import read_in_run

    def work(folder: Path) -> None:
        config, store = session.config.crosscoders[name], session.columns()
        if session.ranks.is_first:
            coder = read_in_run(name, config, store.pair, store.d_model, store.layer)
            coder.origin = coder.origin | origin_of(store, config, coder.origin["training_tokens"])
            (folder / name).mkdir(exist_ok=True)
            save(coder, folder / name)

    run_together([(session, stage)], lambda folders: work(folders[0]))


def _note(records: dict[str, Any]) -> str:
    """The last record of each crosscoder, short enough for one line."""
    notes = []
    for name, record in records.items():
        fve = " ".join(f"{value:.2f}" for key, value in record.items() if key.startswith("fve_"))
        if record:
            notes.append(f"{name}: loss {record['loss']:.3g} FVE {fve} L0 {record['l0']:.0f} dead {record['dead_share']:.0%}")
    return "; ".join(notes)
