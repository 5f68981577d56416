"""Automatic interpretation, which comes after the latent table: a stage of its own for each crosscoder."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from crossdiff.errors import UserError
from crossdiff.files import fingerprint, read_json, write_json
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.pipeline import Pipeline
from crossdiff.progress import progress_bar
from crossdiff.run import Stage

if TYPE_CHECKING:
    from crossdiff.interp.cache import Cache
    from crossdiff.interp.interpret import LatentContexts, Responses
    from crossdiff.interp.prompts import Renderer

INTERPRET_FORMAT = 1
"""Raised when the results of the stage change although its settings do not."""
CACHE = "interpretation/answers.sqlite"
UNSEEN = {
    "crosscoders", "key_variable", "concurrency", "timeout", "attempts", "input_price", "output_price", "batch_tokens",
    "answer_limit",
}  # fmt: skip
"""Settings that change no result."""


class InterpretPipeline(Pipeline):
    """The stages of a run, and the one that says what its latents mean."""

    def interpret_stage(self, name: str, config: InterpretConfig) -> Stage:
        """Depends on the latent table and on the settings."""
        from crossdiff.interp.explanation_table import CONTEXTS_FILE, FILE, SUMMARY_FILE

        value = {
            "code": INTERPRET_FORMAT, "analyze": self.analyze_stage(name).fingerprint,
            "settings": config.model_dump(exclude=UNSEEN),
        }  # fmt: skip
        files = (FILE, CONTEXTS_FILE, SUMMARY_FILE)
        return Stage(f"interpret/{name}", fingerprint(value), tuple(f"{name}/{file}" for file in files))

    def interpret(self, config: InterpretConfig, dry_run: bool) -> None:
        """Interpret latents of every crosscoder that is asked for, or say what that would take.

        Raises:
            UserError: a crosscoder is not analysed or does not exist, the server or the sentence encoder is not there, ...
        """
        from crossdiff.interp.asker import check_server
        from crossdiff.interp.cache import Cache

        self.only = config.crosscoders
        if config.server is not None or config.model is not None or dry_run:
            check_server(config)
        for name in self.paired_names:
            if not self.run.is_done(self.analyze_stage(name)):
                raise UserError(f"{name} is not analysed with these settings; run `crossdiff analyze` first")
        cache = Cache(self.run.path / CACHE)
        try:
            for name in self.paired_names:
                self._interpret(name, config, cache, dry_run)
        finally:
            cache.close()

    def _interpret(self, name: str, config: InterpretConfig, cache: Cache, dry_run: bool) -> None:
        from crossdiff.interp.terminal import print_summary

        stage, summary = self.interpret_stage(name, config), self.run.path / name / "interpretation.json"
        # What the model left unanswered is asked again.
        if not dry_run and self.run.is_done(stage) and not read_json(summary)["n_unanswered"]:
            self._skip(stage)
        else:
            self._work(name, stage, config, cache, dry_run)
        if not dry_run and summary.is_file():
            print_summary(read_json(summary), name, self.console)

    def _work(self, name: str, stage: Stage, config: InterpretConfig, cache: Cache, dry_run: bool) -> None:
        from crossdiff.interp.chosen_latents import select
        from crossdiff.interp.embedding import Encoder
        from crossdiff.interp.explanation_table import read_latent_table, training_of, write_tables
        from crossdiff.interp.interpret import Scorer, latent_contexts, no_responses, tables
        from crossdiff.interp.prompts import Renderer
        from crossdiff.interp.summary import summarise
        from crossdiff.interp.terminal import print_explanations
        from crossdiff.models.pair import load_tokenizer

        folder, store, crosscoder = self.run.path / name, self.store(), self.crosscoder(name)
        table = read_latent_table(folder)
        latents = select(table, config.latents, config.per_selection, config.seed)
        if not latents:
            self.console.print(f"{name}: no active latent has {' or '.join(config.latents)}", highlight=False)
            return
        encoder = None if config.embedding == "none" or dry_run else Encoder(config.embedding)
        renderer = Renderer(load_tokenizer(self.config.chat))
        with progress_bar(self.console, f"interpret {name}, tokens", None) as advance:
            found = latent_contexts(crosscoder, store, table, folder, latents, config, advance)
        said = (
            [no_responses(subject) for subject in found]
            if config.server is None
            else self._ask(found, renderer, config, cache, dry_run)
        )
        if dry_run:
            return
        with (
            self.run.working(stage) as work,
            progress_bar(self.console, f"score {name}, latents", len(found)) as advance,
        ):
            (work / name).mkdir(exist_ok=True)
            scorer = Scorer(renderer, encoder, config, training_of(folder))
            rows, contexts = tables(scorer, found, said, advance)
            whole = write_tables(work / name, rows, contexts, folder)
            joined = table.select("latent", "verdict").join(whole, on="latent")
            unanswered = sum(bool(words.reasons) for words in said)
            write_json(work / name / "interpretation.json", summarise(joined, config.seed) | {"n_unanswered": unanswered})
        self._say_done(stage)
        print_explanations(rows, self.console)

    def _ask(
        self, found: list[LatentContexts], renderer: Renderer, config: InterpretConfig, cache: Cache, dry_run: bool
    ) -> list[Responses]:
        """Ask the server, or nobody, and say what it took also when it ends early."""
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
                with progress_bar(self.console, "ask, latents", len(found)) as advance:
                    return await ask_all(found, asker, renderer, config, advance)
            finally:
                if isinstance(asker, Client):
                    await asker.close()
                print_usage(asker.usage, config, self.console, planned=dry_run)

        return asyncio.run(ask())
