"""A run that this process works on: its directory, settings and console, and the one way to run a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from crossdiff.config import RunConfig
from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.progress import progress_bar
from crossdiff.ranks import Ranks
from crossdiff.run import Run, Stage
from crossdiff.stages.definitions import analyze_stage, harvest_stage, train_stage

if TYPE_CHECKING:
    from crossdiff.activations.store import Store
    from crossdiff.crosscoder.crosscoder import Crosscoder
    from crossdiff.models.pair import Pair


@dataclass
class Session:
    """One run in the hands of a command.

    Attributes:
        force: harvest again although there is a store of other settings.
        only: the crosscoders to work on; all of the run if empty.
    """

    run_directory: Run
    config: RunConfig
    console: Console
    force: bool = False
    only: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.run_directory.path

    @property
    def ranks(self) -> Ranks:
        return self.run_directory.ranks

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in self.config.trainings:
                raise UserError(f"there is no crosscoder {name!r} in this run; there are {', '.join(self.config.trainings)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The crosscoders to work on."""
        return self.only or tuple(self.config.crosscoders)

    @property
    def trainings(self) -> tuple[str, ...]:
        """The crosscoders to work on, each followed by its repetitions with other seeds."""
        known = self.config.crosscoders
        return tuple(each for name in self.names for each in (self.config.seeds_of(name) if name in known else (name,)))

    @property
    def paired_names(self) -> tuple[str, ...]:
        """The crosscoders to work on that have a decoder direction in both models."""
        return tuple(name for name in self.names if self.config.trainings[name].inputs.kind == "paired")

    @property
    def paired_trainings(self) -> tuple[str, ...]:
        """The trainings to work on that have a decoder direction in both models."""
        return tuple(name for name in self.trainings if self.config.trainings[name].inputs.kind == "paired")

    def skips(self, stage: Stage) -> bool:
        """Whether a stage is done already; says so."""
        done = self.run_directory.is_done(stage)
        if done:
            self.console.print(f"[dim]{stage.name}: already done[/dim]")
        return done

    def run(self, stage: Stage, work: Callable[[Path], None]) -> None:
        """Run a stage unless it is done; `work` writes its outputs into the folder that it is given."""
        if not self.skips(stage):
            run_together([(self, stage)], lambda folders: work(folders[0]))

    def progress(self, title: str, total: int | None) -> AbstractContextManager[Callable[..., None]]:
        """A progress bar; see `progress_bar`."""
        return progress_bar(self.console, title, total)

    def load_pair(self) -> Pair:
        """The two models, checked to be a pair."""
        from crossdiff.models.pair import choose_device, load_pair

        config = self.config
        device, harvest = choose_device(config.device), config.harvest
        return load_pair(config.base, config.chat, device, harvest.base_tokens, harvest.template_date)

    def store(self) -> Store:
        """The finished store of this run."""
        from crossdiff.activations.live import open_store
        from crossdiff.models.pair import identify

        if not self.run_directory.is_done(harvest_stage(self.config)):
            self.check_may_harvest()
            raise UserError(f"{self.path} has no activations for these settings; run `crossdiff harvest` first")
        store = open_store(self.path / "activations", self.load_pair)
        store.check_pair(identify(self.config.base), identify(self.config.chat), self.config.layer)
        return store

    def check_may_harvest(self) -> None:
        """Refuse to replace a store, the most expensive result, unless --force was given."""
        manifest = self.path / "activations" / "manifest.json"
        if self.force or not manifest.exists():
            return
        old = read_json(manifest)
        self._check_models_exist(old["pair"])
        size = sum(shard["bytes"] for shard in old["shards"]) / 1e6
        raise UserError(
            f"the models, texts or harvest settings differ from those of the store in {manifest.parent} "
            f"({old['n_tokens']:,} tokens, layer {old['layer']}). Harvesting again takes about {old['seconds']:.0f} s and "
            f"another {size:.0f} MB beside the old store, and everything that depends on it is computed again. "
            "Pass --force to do it, or choose another run directory"
        )

    def _check_models_exist(self, harvested: dict[str, Any]) -> None:
        """A model whose folder is gone is not a changed setting: say so, rather than offer to harvest again."""
        from crossdiff.models.pair import local_path
        from crossdiff.sources import SOURCES

        for source in SOURCES:
            name = getattr(self.config, source)
            if harvested[source]["name"] == name and "digest" in harvested[source] and local_path(name) is None:
                raise UserError(
                    f"the {source} model of this run is gone: {name!r} was a folder when the activations were harvested, "
                    "and it no longer exists; put it back, or start a run with other models in another directory"
                )

    def crosscoder(self, name: str) -> Crosscoder:
        """A trained crosscoder of this run."""
        from crossdiff.crosscoder.checkpoint import load

        if not self.run_directory.is_done(train_stage(self.config, name)):
            raise UserError(f"{self.path} has no crosscoder {name!r} for these settings; run `crossdiff train` first")
        return load(self.path / name)

    def check_analysed(self, name: str) -> None:
        """Raises `UserError` if a crosscoder is not analysed with these settings."""
        if not self.run_directory.is_done(analyze_stage(self.config, name)):
            raise UserError(f"{name} is not analysed with these settings; run `crossdiff analyze` first")


def run_together(stages: Sequence[tuple[Session, Stage]], work: Callable[[list[Path]], None]) -> None:
    """Run several stages at once, of one run or of several.

    Args:
        work: writes the outputs of every stage into its folder; the folders come in the order of `stages`.
    """
    with ExitStack() as stack:
        work([stack.enter_context(session.run_directory.working(stage)) for session, stage in stages])
    for session, stage in stages:
        record = session.run_directory.record(stage.name)
        assert record is not None
        session.console.print(f"[green]{stage.name}[/green] done in {record['seconds']:.0f} s")
