"""The stage `interpret`: explain concepts and latents with a language model and score the explanations."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdiff.errors import UserError
from crossdiff.files import read_json, write_json
from crossdiff.integrity import intact
from crossdiff.interp.explanation_table import CONCEPTS
from crossdiff.stages.definitions import interpret_stage
from crossdiff.stages.session import Session, run_together

if TYPE_CHECKING:
    import polars as pl

    from crossdiff.activations.store import Store
    from crossdiff.interp.cache import Cache
    from crossdiff.interp.contexts import LatentContexts
    from crossdiff.interp.interpret_config import InterpretConfig
    from crossdiff.interp.prompts import Renderer
    from crossdiff.interp.responses import Responses
    from crossdiff.latents.stream import Coder

CACHE = "interpretation/answers.sqlite"


def interpret(session: Session, config: InterpretConfig, dry_run: bool = False) -> None:
    """Interpret the concepts of a run, then the latents that were asked for, or only print the calls that this would take.

    Raises:
        UserError: there is nothing to interpret, or it is not analysed.
    """
    from crossdiff.interp.cache import Cache
    from crossdiff.interp.language_model import check_server
    from crossdiff.interp.terminal import print_summary

    if config.server is not None or config.model is not None or dry_run:
        check_server(config)
    names = _subjects(session, config)
    cache = Cache(session.path / CACHE)
    try:
        for name in names:
            stage = interpret_stage(session.config, name, config)
            summary = session.path / name / "interpretation.json"
            # A finished stage is repeated if requests were unanswered; the cache has the others.
            if dry_run or not session.run_directory.is_done(stage) or read_json(intact(summary))["n_unanswered"]:
                _interpret(session, name, config, cache, dry_run)
            else:
                session.skips(stage)
            if not dry_run and summary.is_file():
                print_summary(read_json(intact(summary)), name, session.console)
    finally:
        cache.close()


def _subjects(session: Session, config: InterpretConfig) -> tuple[str, ...]:
    """The folders to interpret: that of the concepts, and those of crosscoders."""
    names = session.paired_names if config.latents else ()
    for name in names:
        session.check_analysed(name)
    if not config.chosen_concepts:
        return names
    if session.run_directory.record("concepts") is None:
        raise UserError(
            f"{session.path} has no concepts; run `crossdiff concepts {session.path}` first, or choose latents with --latents, "
            "such as --latents verdict=chat_specific"
        )
    return (CONCEPTS, *names)


def _coder(session: Session, name: str, store: Store) -> Coder:
    """What encodes the concepts, or a crosscoder."""
    from crossdiff.concepts.coder import ConceptCoder
    from crossdiff.latents.stream import check_fits

    if name != CONCEPTS:
        crosscoder = session.crosscoder(name)
        check_fits(crosscoder, store)
        return crosscoder
    coder = ConceptCoder.load(session.path, session.device)
    for each in coder.crosscoders:
        check_fits(each, store)
    return coder


def _interpret(session: Session, name: str, config: InterpretConfig, cache: Cache, dry_run: bool) -> None:
    from crossdiff.interp.chosen_latents import select
    from crossdiff.interp.contexts import latent_contexts
    from crossdiff.interp.embedding import Encoder
    from crossdiff.interp.explanation_table import read_latent_table
    from crossdiff.interp.prompts import Renderer
    from crossdiff.interp.responses import no_responses
    from crossdiff.interp.terminal import print_explanations
    from crossdiff.models.loading import load_tokenizer

    folder = session.path / name
    store = session.store()
    coder = _coder(session, name, store)
    table = read_latent_table(folder)
    option, wanted = ("--concepts", config.chosen_concepts) if name == CONCEPTS else ("--latents", config.latents)
    latents = select(table, wanted, config.per_selection, config.seed, option)
    if not latents:
        what = "concept" if name == CONCEPTS else "active latent"
        session.console.print(f"{name}: no {what} has {' or '.join(wanted)}", highlight=False)
        return
    encoder = None if config.embedding == "none" or dry_run else Encoder(config.embedding, session.device)
    renderer = Renderer(load_tokenizer(session.config.chat, session.config.base))
    with session.progress(f"interpret {name}, tokens", None) as advance:
        contexts = latent_contexts(coder, store, table, folder, latents, config, advance)
    if config.server is None:
        responses = [no_responses(each) for each in contexts]
    else:
        responses = _ask(session, contexts, renderer, config, cache, dry_run)
    if dry_run:
        return
    explanations: list[pl.DataFrame] = []

    def work(folders: list[Path]) -> None:
        from crossdiff.interp.explanation_table import training_fingerprint, write_tables
        from crossdiff.interp.scorer import Scorer
        from crossdiff.interp.summary import summarise
        from crossdiff.latents.settings import verdict_settings

        target = folders[0] / name
        target.mkdir(exist_ok=True)
        scorer = Scorer(renderer, encoder, config, training_fingerprint(folder))
        with session.progress(f"score {name}, latents", len(contexts)) as advance:
            rows, context_rows = scorer.tables(contexts, responses, advance)
        explanations.append(rows)
        interpretation = write_tables(target, rows, context_rows, folder)
        summary = summarise(table.select("latent", "verdict").join(interpretation, on="latent"), config.seed)
        n_unanswered = sum(bool(each.reasons) for each in responses)
        record: dict[str, Any] = {"n_unanswered": n_unanswered, "seed": config.seed}
        if name != CONCEPTS:
            record["analysis"] = verdict_settings(folder)
        write_json(target / "interpretation.json", summary | record)

    run_together([(session, interpret_stage(session.config, name, config))], work)
    print_explanations(explanations[0], name, session.console)


def _ask(
    session: Session,
    contexts: list[LatentContexts],
    renderer: Renderer,
    config: InterpretConfig,
    cache: Cache,
    dry_run: bool,
) -> list[Responses]:
    """Ask the server, or only count the requests. The usage is printed even if asking ends early."""
    from crossdiff.interp.language_model import DryRun
    from crossdiff.interp.responses import ask_all
    from crossdiff.interp.terminal import print_usage

    try:
        from crossdiff.interp.client import Client
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'crossdiff[interp]'") from None

    async def ask() -> list[Responses]:
        model = DryRun(config, cache) if dry_run else Client(config, cache)
        try:
            with session.progress("ask, latents", len(contexts)) as advance:
                return await ask_all(contexts, model, renderer, config, advance)
        finally:
            if isinstance(model, Client):
                await model.close()
            print_usage(model.usage, config, session.console, planned=dry_run)

    return asyncio.run(ask())
