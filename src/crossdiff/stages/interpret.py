"""The stage `interpret`: explain latents with a language model and score the explanations, crosscoder by crosscoder."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from crossdiff.errors import UserError
from crossdiff.files import read_json, write_json
from crossdiff.stages.definitions import interpret_stage
from crossdiff.stages.session import Session, run_together

if TYPE_CHECKING:
    import polars as pl

    from crossdiff.interp.cache import Cache
    from crossdiff.interp.interpret import LatentContexts, Responses
    from crossdiff.interp.interpret_config import InterpretConfig
    from crossdiff.interp.prompts import Renderer

CACHE = "interpretation/answers.sqlite"


def interpret(session: Session, config: InterpretConfig, dry_run: bool = False) -> None:
    """Interpret latents of every crosscoder of the session, or say what that would take.

    Raises:
        UserError: a crosscoder is not analysed or does not exist, or the server or the sentence encoder is not available.
    """
    from crossdiff.interp.asker import check_server
    from crossdiff.interp.cache import Cache
    from crossdiff.interp.terminal import print_summary

    if config.server is not None or config.model is not None or dry_run:
        check_server(config)
    for name in session.paired_names:
        session.check_analysed(name)
    cache = Cache(session.path / CACHE)
    try:
        for name in session.paired_names:
            stage, summary = interpret_stage(session.config, name, config), session.path / name / "interpretation.json"
            # What the model left unanswered is asked again.
            is_answered = session.run_directory.is_done(stage) and not read_json(summary)["n_unanswered"]
            if dry_run or not is_answered:
                _interpret(session, name, config, cache, dry_run)
            else:
                session.skips(stage)
            if not dry_run and summary.is_file():
                print_summary(read_json(summary), name, session.console)
    finally:
        cache.close()


def _interpret(session: Session, name: str, config: InterpretConfig, cache: Cache, dry_run: bool) -> None:
    from crossdiff.interp.chosen_latents import select
    from crossdiff.interp.embedding import Encoder
    from crossdiff.interp.explanation_table import read_latent_table
    from crossdiff.interp.interpret import latent_contexts, no_responses
    from crossdiff.interp.prompts import Renderer
    from crossdiff.interp.terminal import print_explanations
    from crossdiff.models.pair import load_tokenizer

    folder, console = session.path / name, session.console
    store, crosscoder = session.store(), session.crosscoder(name)
    table = read_latent_table(folder)
    latents = select(table, config.latents, config.per_selection, config.seed)
    if not latents:
        console.print(f"{name}: no active latent has {' or '.join(config.latents)}", highlight=False)
        return
    encoder = None if config.embedding == "none" or dry_run else Encoder(config.embedding)
    renderer = Renderer(load_tokenizer(session.config.chat))
    with session.progress(f"interpret {name}, tokens", None) as advance:
        contexts = latent_contexts(crosscoder, store, table, folder, latents, config, advance)
    if config.server is None:
        responses = [no_responses(each) for each in contexts]
    else:
        responses = _ask(session, contexts, renderer, config, cache, dry_run)
    if dry_run:
        return
    explanations: list[pl.DataFrame] = []

    def work(folders: list[Path]) -> None:
        from crossdiff.interp.explanation_table import training_of, write_tables
        from crossdiff.interp.interpret import Scorer, tables
        from crossdiff.interp.summary import summarise

        target = folders[0] / name
        target.mkdir(exist_ok=True)
        with session.progress(f"score {name}, latents", len(contexts)) as advance:
            rows, context_rows = tables(Scorer(renderer, encoder, config, training_of(folder)), contexts, responses, advance)
        explanations.append(rows)
        whole = write_tables(target, rows, context_rows, folder)
        summary = summarise(table.select("latent", "verdict").join(whole, on="latent"), config.seed)
        n_unanswered = sum(bool(each.reasons) for each in responses)
        write_json(target / "interpretation.json", summary | {"n_unanswered": n_unanswered})

    run_together([(session, interpret_stage(session.config, name, config))], work)
    print_explanations(explanations[0], console)


def _ask(
    session: Session,
    contexts: list[LatentContexts],
    renderer: Renderer,
    config: InterpretConfig,
    cache: Cache,
    dry_run: bool,
) -> list[Responses]:
    """Ask the server, or only count what would be asked; prints the usage even when asking ends early."""
    from crossdiff.interp.asker import DryRun
    from crossdiff.interp.interpret import ask_all
    from crossdiff.interp.terminal import print_usage

    try:
        from crossdiff.interp.client import Client
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'crossdiff[interp]'") from None

    async def ask() -> list[Responses]:
        asker = DryRun(config, cache) if dry_run else Client(config, cache)
        try:
            with session.progress("ask, latents", len(contexts)) as advance:
                return await ask_all(contexts, asker, renderer, config, advance)
        finally:
            if isinstance(asker, Client):
                await asker.close()
            print_usage(asker.usage, config, session.console, planned=dry_run)

    return asyncio.run(ask())
