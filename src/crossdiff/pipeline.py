"""The stages of a diff, each from files to files: harvest -> train -> analyze -> report."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crossdiff.config import DatasetConfig, RunConfig, UserError
from crossdiff.run import Run, Stage, fingerprint, read_json

if TYPE_CHECKING:
    from crossdiff.activations.store import Store
    from crossdiff.crosscoder.model import Crosscoder

STAGES = ("harvest", "train", "analyze", "report")
ANALYSIS = ("latents.parquet", "examples.sqlite", "health.json", "behaviours.parquet")
CODE_FORMAT = 2
"""Raised when a stage's results change although its settings do not."""
ANALYSIS_FORMAT = 3
"""The same for the analysis alone, so that nothing is harvested again for it."""


@contextmanager
def progress_bar(console: Console, title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar with elapsed and remaining time; yields `advance(n=1, note="", total=None)`."""
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task, shown = progress.add_task(title, total=total, note=""), ""

        def advance(n: int = 1, note: str = "", total: int | None = None) -> None:
            nonlocal shown
            shown = note or shown
            progress.update(task, advance=n, total=total, note=shown)

        yield advance


@dataclass
class Pipeline:
    """The stages of one run, bound to its directory and settings."""

    run: Run
    config: RunConfig
    console: Console
    force: bool = False
    only: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The crosscoders to work on: all of the run, or those asked for."""
        for name in self.only:
            if name not in self.config.crosscoders:
                raise UserError(f"there is no crosscoder {name!r} in this run; there are {', '.join(self.config.crosscoders)}")
        return self.only or tuple(self.config.crosscoders)

    # --- what each stage depends on -------------------------------------------------------------------------------

    def harvest_stage(self) -> Stage:
        """Depends on the models' weights, the texts and the harvest settings."""
        from crossdiff.models.pair import identify

        config = self.config
        texts = [_identify_dataset(dataset) for dataset in config.dataset]
        value = {
            "code": CODE_FORMAT, "base": identify(config.base), "chat": identify(config.chat), "layer": config.layer,
            "texts": texts, "settings": config.harvest.model_dump(),
        }  # fmt: skip
        return Stage("harvest", fingerprint(value), ("activations",))

    def train_stage(self, name: str) -> Stage:
        """Depends on the store and on this crosscoder's settings."""
        settings = self.config.crosscoders[name].model_dump(exclude={"checkpoint_seconds"})
        value = {"code": CODE_FORMAT, "harvest": self.harvest_stage().fingerprint, "settings": settings}
        files = ("config.json", "model.safetensors", "train.jsonl")
        return Stage(f"train/{name}", fingerprint(value), tuple(f"{name}/{file}" for file in files))

    def analyze_stage(self, name: str) -> Stage:
        """Depends on the crosscoder and on the analysis settings."""
        value = {
            "code": ANALYSIS_FORMAT, "train": self.train_stage(name).fingerprint, "settings": self.config.analyze.model_dump(),
        }  # fmt: skip
        return Stage(f"analyze/{name}", fingerprint(value), tuple(f"{name}/{file}" for file in ANALYSIS))

    def report_stage(self) -> Stage:
        """Depends on every analysis."""
        value = {name: self.analyze_stage(name).fingerprint for name in self.names}
        return Stage("report", fingerprint({"code": CODE_FORMAT, "analyses": value}), ("report.html",))

    # --- the stages -----------------------------------------------------------------------------------------------

    def go(self, until: str = "report") -> None:
        """Run every stage up to `until` that is not done yet."""
        if not self.config.dataset:
            raise UserError(
                "no texts: name at least one --dataset (a .jsonl, .jsonl.gz, .parquet or .txt file, or a Hub dataset)"
            )
        stages = STAGES[: STAGES.index(until) + 1]
        self.run.write_config(self.config.model_dump(mode="json"))
        if "harvest" in stages:
            self.harvest()
        if "train" in stages:
            for name in self.names:
                self.train(name)
        if "analyze" in stages:
            for name in self.names:
                self.analyze(name)
        if "report" in stages:
            self.report()

    def _skip(self, stage: Stage) -> bool:
        if self.run.is_done(stage):
            self.console.print(f"[dim]{stage.name}: done already[/dim]")
            return True
        return False

    def _say_done(self, stage: Stage) -> None:
        record = self.run.record(stage.name)
        assert record is not None
        self.console.print(f"[green]{stage.name}[/green] done in {record['seconds']:.0f} s")

    def harvest(self) -> None:
        """Collect the paired activations into `activations/`."""
        stage = self.harvest_stage()
        if self._skip(stage):
            return
        self._ask_force(stage)
        from crossdiff.activations.harvest import harvest
        from crossdiff.models.pair import choose_device, load_pair
        from crossdiff.text.documents import read_documents

        config = self.config
        pair = load_pair(config.base, config.chat, choose_device(config.device))
        layer = pair.check_layer(config.layer)
        datasets = tuple(_resolve(dataset) for dataset in config.dataset)
        n_documents = sum(1 for _ in read_documents(datasets))
        with (
            self.run.working(stage) as folder,
            progress_bar(self.console, f"harvest, layer {layer}, documents", n_documents) as advance,
        ):
            (folder / "activations").mkdir(exist_ok=True)
            harvest(folder / "activations", pair, layer, datasets, config.harvest, advance)
        self._say_done(stage)

    def _ask_force(self, stage: Stage) -> None:
        """Harvesting anew throws away the most expensive result, so it is never done unasked."""
        manifest = self.run.path / "activations" / "manifest.json"
        if self.force or not manifest.exists():
            return
        old = read_json(manifest)
        size = sum(shard["bytes"] for shard in old["shards"]) / 1e6
        raise UserError(
            f"the models, texts or harvest settings differ from those of the store in {manifest.parent} "
            f"({old['n_tokens']:,} tokens, layer {old['layer']}). Harvesting again costs about {old['seconds']:.0f} s and "
            f"{size:.0f} MB beside the old store, and everything after it is computed again. "
            "Pass --force to do it, or choose another run directory"
        )

    def store(self) -> Store:
        """The finished store of this run.

        Raises:
            UserError: there is none for these settings.
        """
        from crossdiff.activations.store import Store
        from crossdiff.models.pair import identify

        if not self.run.is_done(self.harvest_stage()):
            self._ask_force(self.harvest_stage())
            raise UserError(f"{self.run.path} has no activations for these settings; run `crossdiff harvest` first")
        store = Store(self.run.path / "activations")
        store.check_pair(identify(self.config.base), identify(self.config.chat), self.config.layer)
        return store

    def train(self, name: str) -> None:
        """Train one crosscoder into its folder."""
        stage = self.train_stage(name)
        if self._skip(stage):
            return
        from crossdiff.crosscoder.train import train

        store = self.store()
        with self.run.working(stage) as folder, progress_bar(self.console, f"train {name}, steps", None) as advance:
            (folder / name).mkdir(exist_ok=True)
            last = 0

            def report(step: int, n_steps: int, record: dict[str, Any]) -> None:
                nonlocal last
                advance(step - last, _training_note(record), n_steps)
                last = step

            train(folder / name, store, self.config.crosscoders[name], report)
        self._say_done(stage)

    def crosscoder(self, name: str) -> Crosscoder:
        """A trained crosscoder of this run.

        Raises:
            UserError: it is not trained with these settings.
        """
        from crossdiff.crosscoder.checkpoint import load

        if not self.run.is_done(self.train_stage(name)):
            raise UserError(f"{self.run.path} has no crosscoder {name!r} for these settings; run `crossdiff train` first")
        return load(self.run.path / name)

    def analyze(self, name: str) -> None:
        """Write the latent table, the examples, the health report and the behaviour table of one crosscoder."""
        stage = self.analyze_stage(name)
        if self._skip(stage):
            return
        from crossdiff.latents.analyze import analyze
        from crossdiff.models.pair import load_tokenizer

        store, crosscoder, tokenizer = self.store(), self.crosscoder(name), load_tokenizer(self.config.chat)
        with (
            self.run.working(stage) as folder,
            progress_bar(self.console, f"analyze {name}, tokens", store.n_tokens) as advance,
        ):
            (folder / name).mkdir(exist_ok=True)
            analyze(folder / name, crosscoder, store, tokenizer, self.config.analyze, advance)
        self._say_done(stage)

    def report(self) -> None:
        """Write `report.html` and print the summary."""
        from crossdiff.report.html import write_html
        from crossdiff.report.model import read_run
        from crossdiff.report.terminal import print_summary

        stage = self.report_stage()
        for name in self.names:
            if not self.run.is_done(self.analyze_stage(name)):
                raise UserError(f"{name} is not analysed with these settings; run `crossdiff analyze` first")
        report = read_run(self.run.path, self.names)
        if not self._skip(stage):
            with self.run.working(stage) as folder:
                write_html(report, folder / "report.html")
            self._say_done(stage)
        print_summary(report, self.console)


def _training_note(record: dict[str, Any]) -> str:
    if not record:
        return ""
    fve = " ".join(f"{value:.3f}" for key, value in record.items() if key.startswith("fve_"))
    return f"FVE {fve} L0 {record['l0']:.0f} dead {record['dead_share']:.0%}"


def _resolve(dataset: DatasetConfig) -> DatasetConfig:
    """The dataset with the file behind a `demo:` name, keeping its title."""
    if not dataset.path.startswith("demo:"):
        return dataset
    from crossdiff.pairs import demo_path

    return dataset.model_copy(update={"path": str(demo_path(dataset.path)), "name": dataset.title})


def _identify_dataset(dataset: DatasetConfig) -> dict[str, Any]:
    """Settings and, for a local file, a digest of its content: what tells whether the text is still the same."""
    from crossdiff.activations.store import sha256

    path = Path(_resolve(dataset).path)
    if not path.is_file():
        return dataset.model_dump()
    return dataset.model_dump(exclude={"path"}) | {"title": dataset.title, "sha256": sha256(path)}


def explain_disk_error(error: OSError, path: Path) -> UserError | None:
    """A full or read-only disk, in words; None when the error is something else."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = shutil.disk_usage(path).free / 1e6 if path.exists() else 0.0
        return UserError(f"the disk of {path} is full ({free:.0f} MB left); free some space and run the same command again")
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return UserError(f"cannot write {error.filename or path}: {error.strerror}; choose a folder you may write to")
    return None
