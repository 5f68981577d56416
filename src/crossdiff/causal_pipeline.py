"""What comes after the latent table: the causal test, a stage of its own for each crosscoder, and steering."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from crossdiff.config import SteerConfig
from crossdiff.errors import UserError
from crossdiff.files import fingerprint, read_json
from crossdiff.pipeline import CODE_FORMAT, Pipeline
from crossdiff.progress import progress_bar
from crossdiff.run import Stage

if TYPE_CHECKING:
    from crossdiff.activations.store import Store
    from crossdiff.causal.steering import Steerer


CAUSAL_FORMAT = 1
"""Raised when the results change although the settings do not."""


class CausalPipeline(Pipeline):
    """The stages of a run, and those that ask what its latents do."""

    @property
    def patched_names(self) -> tuple[str, ...]:
        """The coders that say something of the models' difference: those with two decoders, and those of the difference."""
        return tuple(name for name in self.names if self.config.crosscoders[name].inputs.kind in ("paired", "difference"))

    def causal_stage(self, name: str) -> Stage:
        """Depends on the latent table, or on the coder where it has none, on the settings and on the list of interventions."""
        from crossdiff.causal.causal_test import OUTPUTS, load_experiment

        settings = self.config.causal
        needed = self.analyze_stage(name) if name in self.paired_names else self.train_stage(name)
        value = {
            "code": CAUSAL_FORMAT, "needed": needed.fingerprint, "settings": settings.model_dump(exclude={"interventions"}),
            "experiment": load_experiment(settings).model_dump(mode="json"),
        }  # fmt: skip
        return Stage(f"causal/{name}", fingerprint(value), tuple(f"{name}/{file}" for file in OUTPUTS))

    def report_stage(self) -> Stage:
        """Depends on the finished causal tests as well, whose single latents the cards show."""
        stage = super().report_stage()
        records = {name: self.run.record(f"causal/{name}") for name in self.paired_names}
        done = {name: record["fingerprint"] for name, record in records.items() if record is not None}
        return replace(stage, fingerprint=fingerprint({"report": stage.fingerprint, "causal": done})) if done else stage

    def causal_tests(self) -> None:
        """The causal test of every crosscoder, after whatever it needs."""
        self.go("analyze")
        for name in set(self.names) - set(self.patched_names):
            self.console.print(f"{name}: reads one model alone, so that it has nothing to patch")
        for name in self.patched_names:
            self.causal(name)

    def causal(self, name: str) -> None:
        """Patch the latents of one crosscoder, write what they do, and print it."""
        from crossdiff.causal.causal_test import causal_test
        from crossdiff.causal.terminal import print_causal

        stage = self.causal_stage(name)
        if not self._skip(stage):
            import polars as pl

            store, crosscoder, config = self.store(), self.crosscoder(name), self.config.causal
            table = pl.read_parquet(self.run.path / name / "latents.parquet") if name in self.paired_names else None
            pair = self.load_pair()
            with (
                self.run.working(stage) as folder,
                progress_bar(self.console, f"causal {name}, conversations", None) as advance,
            ):
                (folder / name).mkdir(exist_ok=True)
                ranks = self.run.ranks
                causal_test(folder / name, folder / "parts", pair, store, crosscoder, table, config, advance, ranks)
            self._say_done(stage)
        if self.run.ranks.is_first:
            print_causal(read_json(self.run.path / name / "causal.json"), name, self.console)

    def steer(self, config: SteerConfig) -> None:
        """Answer prompts with and without a latent: side by side on the terminal, or as a table in `steering/`.

        Raises:
            UserError: no latent is given, it does not exist, or the run has no such crosscoder or no latent table.
        """
        import polars as pl

        from crossdiff.causal.steering import Steerer

        names = self.paired_names
        if not names:
            raise UserError("no crosscoder of this run reads both models, so that none has a latent to steer with")
        name = config.crosscoder or names[0]
        if name not in names:
            raise UserError(f"there is no crosscoder {name!r} of both models in this run; there are {', '.join(names)}")
        if config.latent is None:
            raise UserError("which latent? give its number with --latent; the report and latents.parquet list them")
        store, crosscoder = self.store(), self.crosscoder(name)
        if not self.run.is_done(self.analyze_stage(name)):
            raise UserError(f"{name} is not analysed with these settings; run `crossdiff analyze` first")
        table = pl.read_parquet(self.run.path / name / "latents.parquet")
        pair = self.load_pair()
        steerer = Steerer(pair, crosscoder, store.layer, table, store.leave_out)
        if config.prompt:
            from crossdiff.causal.terminal import print_side_by_side

            print_side_by_side(steerer, config, self.console)
        else:
            self._steer_batch(name, steerer, store, config)

    def _steer_batch(self, name: str, steerer: Steerer, store: Store, config: SteerConfig) -> None:
        from crossdiff.causal.answers import read_rules
        from crossdiff.causal.steering_table import labelled_prompts, rates, steering_table
        from crossdiff.causal.terminal import print_rates
        from crossdiff.pairs import RULES

        rules = read_rules(RULES if config.rules is None else Path(config.rules))
        title = f"{name}-{config.latent}-{config.mode}-{config.model}"
        files = (f"steering/{title}.parquet", f"steering/{title}-rates.parquet")
        value = {
            "code": CODE_FORMAT, "analyze": self.analyze_stage(name).fingerprint,
            "settings": config.model_dump(exclude={"rules"}), "rules": rules.model_dump(),
        }  # fmt: skip
        stage = Stage(f"steer/{title}", fingerprint(value), files)
        if not self._skip(stage):
            prompts = labelled_prompts(store, config)
            with (
                self.run.working(stage) as folder,
                progress_bar(self.console, f"steer {title}, conditions", None) as advance,
            ):
                (folder / "steering").mkdir(exist_ok=True)
                table = steering_table(steerer, prompts, config, rules, advance)
                table.write_parquet(folder / files[0])
                rates(table, rules, config.seed).write_parquet(folder / files[1])
            self._say_done(stage)
        print_rates(self.run.path / files[1], title, self.console)
