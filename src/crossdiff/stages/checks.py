"""The checks of a command's settings before anything is written: those that need no store, and those that need it.

A setting that the run already has was checked when it was written, perhaps on a machine with other devices. It is checked again
only where the command needs it.
"""

from __future__ import annotations

from importlib.util import find_spec

from crossdiff.config import RunConfig
from crossdiff.corpus import check_texts
from crossdiff.errors import UserError
from crossdiff.stages.definitions import analyze_stage, base_sae, causal_stage, train_stage
from crossdiff.stages.session import Session

STAGES = {
    "look": ("look",),
    "harvest": ("harvest",),
    "train": ("harvest", "train"),
    "compare": ("harvest", "train", "compare"),
    "analyze": ("harvest", "train", "analyze"),
    "concepts": ("harvest", "train", "analyze", "concepts"),
    "causal": ("harvest", "train", "analyze", "concepts", "causal"),
    "report": ("harvest", "train", "analyze", "concepts", "overlap", "report"),
    "run": ("look", "harvest", "train", "analyze", "concepts", "overlap", "report"),
}
"""The stages that lead to each stage, itself included."""


def check_settings(session: Session, last: str) -> None:
    """Check what can be checked without a store, for a command that runs the stages up to `last`.

    Raises:
        UserError: a setting cannot be used.
    """
    config, stages = session.config, STAGES[last]
    if session.run_directory.record("truth") is not None:
        raise UserError(f"{session.path} holds a benchmark of `crossdiff truth`, not a diff; choose another run directory")
    if last == "look" and not config.look.max_tokens:
        raise UserError("look.max_tokens is 0, which leaves the look out of `crossdiff run`; give the number of tokens to read")
    check_texts(config)
    if {"analyze", "compare"} & set(stages) and not any(dataset.heldout_share for dataset in config.dataset):
        raise UserError(
            "every dataset has a heldout_share of 0, so nothing would be held out to measure on: set it above 0 for one of them"
        )
    if "compare" in stages and (read := [name for name in session.names if name in config.published]):
        raise UserError(
            f"compare trains crosscoders on the same batches, and {', '.join(read)} is published: it cannot be trained again. "
            "Name the others with --only; the report of `crossdiff run` shows published ones beside them"
        )
    trained = [name for name in needed_trainings(session, last) if name not in config.published]
    if trained and all(dataset.heldout_share == 1 for dataset in config.dataset):
        raise UserError(
            f"every dataset has a heldout_share of 1, so nothing would be left to train {', '.join(trained)} on: set it "
            "below 1 for one of them"
        )
    if session.changes("device"):
        from crossdiff.models.loading import choose_device

        choose_device(config.device)
    if session.changes("trackers"):
        _check_trackers(config)
    if session.changes("latent_ranks"):
        from crossdiff.crosscoder.mesh import number_of_latent_ranks

        number_of_latent_ranks(session.ranks, config.latent_ranks)
    if session.changes("harvest") and config.harvest.store is not None:
        from crossdiff.activations.locations import open_folder

        open_folder(config.harvest.store)
    if session.changes("causal") or "causal" in stages:
        from crossdiff.causal.causal_test import load_experiment

        load_experiment(config.causal)


def _check_trackers(config: RunConfig) -> None:
    if "wandb" in config.trackers and find_spec("wandb") is None:
        raise UserError("trackers: wandb is not installed; pip install 'crossdiff[wandb]', or remove it from the trackers")


def needed_trainings(session: Session, last: str) -> tuple[str, ...]:
    """The trainings that a command needs: those to work on, and the SAE that their analyses compare them with."""
    stages = STAGES[last]
    if "train" not in stages:
        return ()
    saes = [base_sae(session.config, name) for name in session.names] if "analyze" in stages else []
    # A comparison of kinds needs no repetitions.
    trainings = session.names if "compare" in stages else session.trainings
    return tuple(dict.fromkeys((*trainings, *filter(None, saes))))


def check_with_store(session: Session, last: str, was_harvested: bool) -> None:
    """Check what needs the harvested store, before the stages up to `last` are run.

    Args:
        was_harvested: whether the store was there before this command. If so, settings that the command changes are checked
            although it does not need them.

    Raises:
        UserError: a crosscoder does not fit the store or the memory, or the store lacks what a later stage needs.
    """
    config, is_done = session.config, session.run_directory.is_done
    to_train = [name for name in needed_trainings(session, last) if not is_done(train_stage(config, name))]
    analyses = "analyze" in STAGES[last] and not all(is_done(analyze_stage(config, name)) for name in session.trainings)
    if was_harvested and any(name in config.published for name in to_train):
        store = session.columns()
        session.check_published(store.pair, store.d_model, store.layer)
    to_train = [name for name in to_train if name not in config.published]
    coders = {name: config.trainings[name] for name in to_train}
    if was_harvested and session.changes("crosscoders"):
        coders = {name: coder for name, coder in config.trainings.items() if coder.published is None}
    if coders:
        from crossdiff.crosscoder.cost import check_memory
        from crossdiff.crosscoder.mesh import number_of_latent_ranks
        from crossdiff.crosscoder.train import check_trainings
        from crossdiff.models.loading import choose_device

        store = session.columns()
        if to_train:
            waiting = {name: coders[name] for name in to_train}
            n_latent_ranks = number_of_latent_ranks(session.ranks, config.latent_ranks)
            check_memory(waiting, store.d_model, choose_device(config.device), n_latent_ranks, store.sources)
        check_trainings(coders, store)
    if analyses or (was_harvested and session.changes("analyze")):
        from crossdiff.latents.analyze import check_store

        check_store(session.columns(), config.analyze)
    patched = [name for name in session.names if config.trainings[name].inputs.kind != "single"]
    if "causal" in STAGES[last] and not all(is_done(causal_stage(config, name)) for name in patched):
        from crossdiff.causal.conversations import read_conversations

        settings = config.causal
        read_conversations(session.columns(), settings.split, settings.max_conversations, settings.seed)
