"""A run that this process works on: its directory, settings and console, and the one way to run a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from crossdiff.config import RunConfig, default_crosscoder
from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.integrity import intact
from crossdiff.progress import progress_bar
from crossdiff.ranks import Ranks
from crossdiff.run import Run, Stage
from crossdiff.stages.definitions import analyze_stage, differences, harvest_stage, train_stage
from crossdiff.yaml_files import read_yaml

if TYPE_CHECKING:
    import torch

    from crossdiff.activations.store import Store
    from crossdiff.crosscoder.crosscoder import Crosscoder
    from crossdiff.models.pair import Pair


@dataclass
class Session:
    """One run in the hands of a command.

    Attributes:
        force: harvest again although there is a store of other settings.
        only: the crosscoders to work on; all of the run if empty.
        remarked: what `remark` has said.
        before: the settings in the run's config.yaml when the command began; empty for a new run.
    """

    run_directory: Run
    config: RunConfig
    console: Console
    force: bool = False
    only: tuple[str, ...] = ()
    remarked: set[str] = field(default_factory=set)
    before: dict[str, Any] = field(init=False, default_factory=dict)

    @property
    def path(self) -> Path:
        return self.run_directory.path

    @property
    def ranks(self) -> Ranks:
        return self.run_directory.ranks

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in self.config.trainings:
                raise UserError(f"there is no crosscoder {name!r} in this run; there are {', '.join(self.config.crosscoders)}")
        path = self.path / "config.yaml"
        if self.ranks.is_first and path.is_file():
            with suppress(UserError):  # damaged: the settings of this command replace it
                self.before = read_yaml(path)
        self.before = self.ranks.agree(self.before)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of this command, as config.yaml holds them."""
        return self.config.model_dump(mode="json")

    def changes(self, section: str) -> bool:
        """Whether this command has other settings in a section, a field of `RunConfig`, than the run had before."""
        return bool(self.before.get(section) != self.settings[section])

    def begin(self) -> None:
        """Write the settings to the run, now that they are checked. This is the moment at which a new run starts to exist."""
        if not self.run_directory.exists:
            self.console.print(f"new run: {self.path}", highlight=False, soft_wrap=True)
        self.run_directory.write_config(self.settings)
        self.run_directory.pin_template_date(self.config.harvest.template_date)

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
    def default_name(self) -> str:
        """The crosscoder that is meant if none is named."""
        trainings = self.config.trainings
        return default_crosscoder({name: (trainings[name].sparsity.kind, trainings[name].inputs.kind) for name in self.names})

    @property
    def paired_trainings(self) -> tuple[str, ...]:
        """The trainings to work on that have a decoder direction in both models."""
        return tuple(name for name in self.trainings if self.config.trainings[name].inputs.kind == "paired")

    def remark(self, text: str) -> None:
        """Tell the user something about the run, once."""
        if text not in self.remarked:
            self.console.print(f"[yellow]{escape(text)}[/yellow]", soft_wrap=True)
            self.remarked.add(text)

    def remark_same_model(self) -> None:
        """Tell the user that the store holds no difference."""
        self.remark(
            f"{self.config.base} and {self.config.chat} have the same activations on every token: they are one model, so there "
            "is nothing to compare"
        )

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

    @cached_property
    def device(self) -> torch.device:
        """The device of the models and the crosscoders."""
        from crossdiff.models.loading import choose_device

        return choose_device(self.config.device)

    def load_pair(self) -> Pair:
        """The two models, checked to be a pair, in the dtype that they had in the harvest if it is done."""
        from crossdiff.models.pair import load_pair

        config = self.config
        record = self.run_directory.record("harvest")
        dtype: str = config.model_dtype
        if record is not None and record.fingerprint == harvest_stage(config).fingerprint:
            dtype = read_json(intact(self.path / "activations" / "manifest.json")).get("model_dtype", dtype)
        harvest = config.harvest
        return load_pair(config.base, config.chat, self.device, harvest.base_tokens, harvest.template_date, dtype, config.steps)

    def store(self) -> Store:
        """The finished store of this run."""
        from crossdiff.activations.live import open_store
        from crossdiff.models.names import identify_all

        if not self.run_directory.is_done(harvest_stage(self.config)):
            self.check_may_harvest()
            raise UserError(f"{self.path} has no activations for these settings; run `crossdiff harvest` first")
        store = open_store(self.path / "activations", self.load_pair)
        if store.normalisation.sources_equal:
            self.remark_same_model()
        store.check_models(identify_all(self.config.model_of), self.config.layer)
        return store

    def columns(self) -> Store:
        """The finished store of this run, without the models that a live one needs for its activations."""
        from crossdiff.activations.store import Store

        return Store(self.path / "activations")

    def check_may_harvest(self) -> None:
        """Refuse to replace a store, the most expensive result, unless --force was given."""
        manifest = self.path / "activations" / "manifest.json"
        if self.force or not manifest.exists():
            return
        old = read_json(manifest)
        self.check_models_exist()
        size = sum(shard["bytes"] for shard in old["shards"]) / 1e6
        known = {"layer": old["layer"]} | {source: old["pair"][source]["name"] for source in old["sources"]}
        raise UserError(
            f"the models, texts or harvest settings differ from those of the store in {manifest.parent} "
            f"({old['n_tokens']:,} tokens, layer {old['layer']}):\n{self.differences(harvest_stage(self.config), known)}\n"
            f"Harvesting again takes about {old['seconds']:.0f} s and another {size:.0f} MB beside the old store, and "
            "everything that depends on it is computed again. Pass --force to do it, or choose another run directory"
        )

    def check_published(self, pair: Mapping[str, Any], d_model: int, layer: int) -> None:
        """Check that the published crosscoders of this run can be read and belong to its models and its layer."""
        for name in self.config.published if self.ranks.is_first else ():
            from crossdiff.published.in_run import read_in_run

            read_in_run(name, self.config.crosscoders[name], pair, d_model, layer)

    def differences(self, stage: Stage, known: Mapping[str, Any]) -> str:
        """The settings of a stage that differ from those that its present result was made with, one per line.

        Args:
            known: settings of the result from elsewhere, for results of earlier versions. Those hold no settings, and what the
                run was told last is the nearest to the rest of them.
        """
        record = self.run_directory.record(stage.name)
        new = stage.settings
        old = None if record is None else record.settings
        if old is None:
            old = {key: known.get(key, value) for key, value in self.before.items() if key in new and value is not None}
            new = {key: value for key, value in new.items() if key in old}
        found = differences(old, new) or ["the content of the models or texts, or the version of crossdiff"]
        return "\n".join(f"  {line}" for line in found)

    def check_models_exist(self) -> None:
        """A model whose folder is gone is not a changed setting: say so, rather than offer to harvest again."""
        from crossdiff.models.names import local_path

        manifest = self.path / "activations" / "manifest.json"
        harvested = read_json(manifest)["pair"] if manifest.exists() else {}
        for source, name in self.config.model_of.items() if harvested else ():
            known = harvested.get(source, {})
            if known.get("name") == name and "digest" in known and local_path(name) is None:
                raise UserError(
                    f"the {source} model of this run is gone: {name!r} was a folder when the activations were harvested, "
                    "and it no longer exists; put it back, or start a run with other models in another directory"
                )

    def crosscoder(self, name: str) -> Crosscoder:
        """A trained crosscoder of this run, on the run's device."""
        from crossdiff.crosscoder.checkpoint import load

        if not self.run_directory.is_done(train_stage(self.config, name)):
            raise UserError(
                f"{self.path} has no crosscoder {name!r} for these settings; run `crossdiff train {self.path}` first"
            )
        return load(self.path / name).to(self.device)

    def check_analysed(self, name: str) -> None:
        """Raises `UserError` if a crosscoder is not analysed with these settings."""
        if not self.run_directory.is_done(analyze_stage(self.config, name)):
            raise UserError(f"{name} is not analysed with these settings; run `crossdiff analyze {self.path}` first")


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
        session.console.print(f"[green]{stage.name}[/green] done in {record.seconds:.0f} s")
