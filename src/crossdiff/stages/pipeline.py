"""Commands that go through several stages; what is done already is skipped."""

from __future__ import annotations

from collections.abc import Sequence

from crossdiff.stages.analyze import analyze
from crossdiff.stages.causal import causal
from crossdiff.stages.checks import STAGES, check_settings, check_with_store, needed_trainings
from crossdiff.stages.compare import compare
from crossdiff.stages.concepts import concepts
from crossdiff.stages.definitions import harvest_stage
from crossdiff.stages.harvest import harvest_layers, pin_template_date, prepare_harvest
from crossdiff.stages.look import look
from crossdiff.stages.overlap import overlap
from crossdiff.stages.promoted import promoted
from crossdiff.stages.report import report
from crossdiff.stages.session import Session
from crossdiff.stages.train import train


def begin(sessions: Sequence[Session], last: str = "harvest") -> None:
    """Check the settings of runs that differ only in the layer, harvest them unless that is done, and write the settings.

    A first look, where `last` needs one, comes between the checks of the harvest and the harvest itself. A run gets its
    settings once all checks have passed that can be made before its next long work. So a refused command leaves the run as it
    was.
    """
    for session in sessions:
        session.check_models_exist()
    pin_template_date(sessions)
    for session in sessions:
        check_settings(session, last)
    if last == "look":
        look(sessions[0])
        return
    were_harvested = [session.run_directory.is_done(harvest_stage(session.config)) for session in sessions]
    harvesting = prepare_harvest(sessions)
    if "look" in STAGES[last] and sessions[0].config.look.max_tokens:
        look(sessions[0], harvesting.pair if harvesting else None, in_full=False)
    if harvesting is not None:
        harvest_layers(harvesting)
    for session, was_harvested in zip(sessions, were_harvested, strict=True):
        check_with_store(session, last, was_harvested)
    for session in sessions:
        session.begin()


def run_until(session: Session, last: str = "report") -> None:
    """Run every stage up to `last`, a key of `STAGES`, that is not done yet."""
    begin([session], last)
    stages = STAGES[last]
    if "train" in stages:
        train(session, needed_trainings(session, last))
    if "compare" in stages:
        compare(session)
    if "analyze" in stages:
        analyze(session, session.trainings)
        pair = promoted(session)
        if "concepts" in stages:
            concepts(session, pair)
        del pair  # the memory of two models
    if "overlap" in stages:
        overlap(session)
    if "causal" in stages:
        causal(session)
    if "report" in stages:
        report(session)
