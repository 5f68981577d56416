"""The stage `interpret`: explain latents with a language model and score the explanations."""

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
    from crossdiff.interp.contexts import LatentContexts
    from crossdiff.interp.interpret_config import InterpretConfig
    from crossdiff.interp.prompts import Renderer
    from crossdiff.interp.responses import Responses

CACHE = "interpretation/answers.sqlite"


def interpret(session: Session, config: InterpretConfig, dry_run: bool = False) -> None:
    """Interpret latents of every crosscoder of the session, or only print the calls and tokens that this would take."""
    from crossdiff.interp.cache import Cache
    from crossdiff.interp.language_model import check_server
    from crossdiff.interp.terminal import print_summary

    if config.server is not None or config.model is not None or dry_run:
        check_server(config)
    for name in session.paired_names:
        session.check_analysed(name)
    cache = Cache(session.path / CACHE)
    try:
        for name in session.paired_names:
            stage = interpret_stage(session.config, name, config)
            summary = session.path / name / "interpretation.json"
            # A finished stage is repeated if requests were unanswered; the cache has the others.
            if dry_run or not session.run_directory.is_done(stage) or read_json(summary)["n_unanswered"]:
                _interpret(session, name, config, cache, dry_run)
            else:
                session.skips(stage)
            if not dry_run and summary.is_file():
                print_summary(read_json(summary), name, session.console)
    finally:
        cache.close()


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
    crosscoder = session.crosscoder(name)
    table = read_latent_table(folder)
    latents = select(table, config.latents, config.per_selection, config.seed)
    if not latents:
        session.console.print(f"{name}: no active latent has {' or '.join(config.latents)}", highlight=False)
        return
    encoder = None if config.embedding == "none" or dry_run else Encoder(config.embedding)
    renderer = Renderer(load_tokenizer(session.config.chat, session.config.base))
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
        from crossdiff.interp.explanation_table import training_fingerprint, write_tables
        from crossdiff.interp.scorer import Scorer
        from crossdiff.interp.summary import summarise

        target = folders[0] / name
        target.mkdir(exist_ok=True)
        scorer = Scorer(renderer, encoder, config, training_fingerprint(folder))
        with session.progress(f"score {name}, latents", len(contexts)) as advance:
            rows, context_rows = scorer.tables(contexts, responses, advance)
        explanations.append(rows)
        interpretation = write_tables(target, rows, context_rows, folder)
        summary = summarise(table.select("latent", "verdict").join(interpretation, on="latent"), config.seed)
        n_unanswered = sum(bool(each.reasons) for each in responses)
        write_json(target / "interpretation.json", summary | {"n_unanswered": n_unanswered})

    run_together([(session, interpret_stage(session.config, name, config))], work)
    print_explanations(explanations[0], session.console)


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
