"""Commands that go through several stages; what is done already is skipped."""

from __future__ import annotations

from crossdiff.corpus import check_texts
from crossdiff.errors import UserError
from crossdiff.stages.analyze import analyze
from crossdiff.stages.causal import causal
from crossdiff.stages.compare import compare
from crossdiff.stages.concepts import concepts
from crossdiff.stages.definitions import analyze_stage, base_sae
from crossdiff.stages.harvest import harvest_layers, pin_template_date
from crossdiff.stages.report import report
from crossdiff.stages.session import Session
from crossdiff.stages.train import train

STAGES = {
    "harvest": ("harvest",),
    "train": ("harvest", "train"),
    "compare": ("harvest", "train", "compare"),
    "analyze": ("harvest", "train", "analyze"),
    "concepts": ("harvest", "train", "analyze", "concepts"),
    "causal": ("harvest", "train", "analyze", "concepts", "causal"),
    "report": ("harvest", "train", "analyze", "concepts", "report"),
}
"""The stages that lead to each stage, itself included."""


def begin(session: Session) -> None:
    """Write the settings to the run directory, if they name texts."""
    check_texts(session.config)
    session.run_directory.write_config(session.config.model_dump(mode="json"))


def run_until(session: Session, last: str = "report") -> None:
    """Run every stage up to `last`, a key of `STAGES`, that is not done yet."""
    pin_template_date([session])
    stages, config, names = STAGES[last], session.config, session.names
    analyses = "analyze" in stages
    if analyses and config.dataset and not any(dataset.heldout_share for dataset in config.dataset):
        raise UserError(
            "every dataset has a heldout_share of 0, so nothing would be held out for the analysis: set it above 0 for one of "
            "them"
        )
    begin(session)
    harvest_layers([session])
    if analyses and not all(session.run_directory.is_done(analyze_stage(config, name)) for name in session.trainings):
        from crossdiff.latents.analyze import check_store

        check_store(session.store(), config.analyze)  # before the training, which takes long
    if "train" in stages:
        saes = [base_sae(config, name) for name in names] if analyses else []
        train(session, also=[sae for sae in saes if sae is not None])
    if "compare" in stages:
        compare(session)
    if analyses:
        analyze(session, session.trainings)
    if "concepts" in stages:
        concepts(session)
    if "causal" in stages:
        causal(session)
    if "report" in stages:
        report(session)
