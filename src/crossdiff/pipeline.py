"""The stages of a diff, each from files to files: harvest -> train -> analyze -> report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from crossdiff.config import RunConfig, SingleConfig
from crossdiff.corpus import check_texts, identify_dataset, resolve
from crossdiff.errors import UserError
from crossdiff.files import fingerprint, read_json, write_json
from crossdiff.progress import progress_bar
from crossdiff.run import Run, Stage

if TYPE_CHECKING:
    from crossdiff.activations.store import Store
    from crossdiff.crosscoder.crosscoder import Crosscoder
    from crossdiff.models.pair import Pair

NEEDED = {
    "harvest": ("harvest",),
    "train": ("harvest", "train"),
    "compare": ("harvest", "train", "compare"),
    "analyze": ("harvest", "train", "analyze"),
    "report": ("harvest", "train", "analyze", "report"),
}
"""The stages that a command goes through."""
ANALYSIS = (
    "latents.parquet", "twins.parquet", "neighbours.parquet", "activity.parquet", "examples.sqlite", "health.json",
    "behaviours.parquet",
)  # fmt: skip
CODE_FORMAT = 5
"""Raised when a stage's results change although its settings do not."""
TRAINING_FORMAT, ANALYSIS_FORMAT = 7, 5
"""The same for the training and the analysis alone, so that nothing is harvested again for them."""


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

    @property
    def paired_names(self) -> tuple[str, ...]:
        """Those that have a decoder direction in both models, as the causal test needs."""
        return tuple(name for name in self.names if self.config.crosscoders[name].inputs.kind == "paired")

    def reference_of(self, name: str) -> str | None:
        """The SAE on the base model, where the run has one: its latents stand beside a crosscoder's on the behaviours."""
        if self.config.crosscoders[name].inputs.kind != "paired":
            return None
        saes = (other for other, coder in self.config.crosscoders.items() if coder.inputs == SingleConfig(source="base"))
        return next(saes, None)

    # --- what each stage depends on -------------------------------------------------------------------------------

    def harvest_stage(self) -> Stage:
        """Depends on the models' weights, the texts and the harvest settings."""
        from crossdiff.models.pair import identify

        config = self.config
        texts = [identify_dataset(dataset) for dataset in config.dataset]
        value = {
            "code": CODE_FORMAT, "base": identify(config.base), "chat": identify(config.chat), "layer": config.layer,
            "texts": texts, "settings": config.harvest.model_dump(exclude={"store"}),
        }  # fmt: skip
        return Stage("harvest", fingerprint(value), ("activations",))

    def train_stage(self, name: str) -> Stage:
        """Depends on the store and on this crosscoder's settings."""
        settings = self.config.crosscoders[name].model_dump(exclude={"checkpoint_seconds"})
        value = {"code": TRAINING_FORMAT, "harvest": self.harvest_stage().fingerprint, "settings": settings}
        files = ("config.json", "model.safetensors", "train.jsonl")
        return Stage(f"train/{name}", fingerprint(value), tuple(f"{name}/{file}" for file in files))

    def analyze_stage(self, name: str) -> Stage:
        """Depends on the crosscoder, on the SAE beside it, and on the analysis settings."""
        reference = self.reference_of(name)
        value = {
            "code": ANALYSIS_FORMAT, "train": self.train_stage(name).fingerprint, "settings": self.config.analyze.model_dump(),
            "reference": None if reference is None else self.train_stage(reference).fingerprint,
        }  # fmt: skip
        return Stage(f"analyze/{name}", fingerprint(value), tuple(f"{name}/{file}" for file in ANALYSIS))

    def report_stage(self) -> Stage:
        """Depends on every analysis and interpretation, on the rates of the null diff where they are known, and on the
        page's own code and templates: it is quick to make anew."""
        from crossdiff.compare.null import FILE

        made = {name: (self.analyze_stage(name).fingerprint, self.run.record(f"interpret/{name}")) for name in self.names}
        null = read_json(self.run.path / FILE) if (self.run.path / FILE).is_file() else None
        value = {"page": _identify_page(), "made": made, "null": null}
        return Stage("report", fingerprint(value), ("report.html", "figures"))

    def compare_stage(self) -> Stage:
        """Depends on the crosscoders and on the settings of the comparison."""
        value = {name: self.train_stage(name).fingerprint for name in self.names}
        settings = self.config.compare.model_dump()
        return Stage("compare", fingerprint({"code": CODE_FORMAT, "train": value, "settings": settings}), ("comparison.json",))

    # --- the stages -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Keep the settings in the run directory.

        Raises:
            UserError: they name no texts.
        """
        check_texts(self.config)
        self.run.write_config(self.config.model_dump(mode="json"))

    def go(self, until: str = "report") -> None:
        """Run every stage up to `until` that is not done yet."""
        stages = NEEDED[until]
        if "analyze" in stages and self.config.dataset and not any(dataset.heldout_share for dataset in self.config.dataset):
            raise UserError(
                "every dataset has a heldout_share of 0, so that nothing would be held out for the analysis: "
                "set it above 0 for one of them"
            )
        self.begin()
        if "harvest" in stages:
            self.harvest()
        if "analyze" in stages and not all(self.run.is_done(self.analyze_stage(name)) for name in self.names):
            from crossdiff.latents.analyze import check_store

            check_store(self.store(), self.config.analyze)  # before the training, which takes long
        if "train" in stages:
            references = [self.reference_of(name) for name in self.names] if "analyze" in stages else []
            self.train(also=[name for name in references if name is not None])
        if "compare" in stages:
            self.compare()
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
        """Collect the paired activations into `activations/`, or into `harvest.store`."""
        harvest_layers([self])

    @property
    def store_url(self) -> str | None:
        """Where the activations go if not into the run directory: a folder named after all that they depend on."""
        stores = self.config.harvest.store
        return None if stores is None else f"{stores.rstrip('/')}/activations-{self.harvest_stage().fingerprint}"

    def _ask_force(self, stage: Stage) -> None:
        """Harvesting anew throws away the most expensive result, so it is never done unasked."""
        manifest = self.run.path / "activations" / "manifest.json"
        if self.force or not manifest.exists():
            return
        old = read_json(manifest)
        self._check_models_exist(old["pair"])
        size = sum(shard["bytes"] for shard in old["shards"]) / 1e6
        raise UserError(
            f"the models, texts or harvest settings differ from those of the store in {manifest.parent} "
            f"({old['n_tokens']:,} tokens, layer {old['layer']}). Harvesting again costs about {old['seconds']:.0f} s and "
            f"{size:.0f} MB beside the old store, and everything after it is computed again. "
            "Pass --force to do it, or choose another run directory"
        )

    def _check_models_exist(self, harvested: dict[str, Any]) -> None:
        """A model whose folder is gone is no changed setting: say so, rather than offer to harvest again."""
        from crossdiff.models.pair import local_path

        for source in ("base", "chat"):
            name = getattr(self.config, source)
            if harvested[source]["name"] == name and "digest" in harvested[source] and local_path(name) is None:
                raise UserError(
                    f"the {source} model of this run is gone: {name!r} was a folder when the activations were harvested, "
                    "and there is none now; put it back, or start a run with other models in another directory"
                )

    def load_pair(self) -> Pair:
        """The two models, checked to be a pair."""
        from crossdiff.models.pair import choose_device, load_pair

        config = self.config
        return load_pair(config.base, config.chat, choose_device(config.device), config.harvest.base_tokens)

    def store(self) -> Store:
        """The finished store of this run.

        Raises:
            UserError: there is none for these settings.
        """
        from crossdiff.activations.live import open_store
        from crossdiff.models.pair import identify

        if not self.run.is_done(self.harvest_stage()):
            self._ask_force(self.harvest_stage())
            raise UserError(f"{self.run.path} has no activations for these settings; run `crossdiff harvest` first")
        store = open_store(self.run.path / "activations", self.load_pair)
        store.check_pair(identify(self.config.base), identify(self.config.chat), self.config.layer)
        return store

    def train(self, also: Sequence[str] = ()) -> None:
        """Train the crosscoders, those of equal batches in one pass over the store, each into its folder.

        Args:
            also: those that were not asked for, but are needed later.
        """
        stages = {name: self.train_stage(name) for name in dict.fromkeys((*self.names, *also))}
        wanted = {name: stage for name, stage in stages.items() if not self._skip(stage)}
        if not wanted:
            return
        from crossdiff.crosscoder.train import Job, train_together
        from crossdiff.models.pair import choose_device

        store = self.store()
        with ExitStack() as stack:
            jobs = []
            for name, stage in wanted.items():
                folder = stack.enter_context(self.run.working(stage)) / name
                folder.mkdir(exist_ok=True)
                shown_in = self.run.path / "tensorboard" / f"{name}-{stage.fingerprint}"
                jobs.append(Job(folder, self.config.crosscoders[name], shown_in))
            advance = stack.enter_context(progress_bar(self.console, f"train {', '.join(wanted)}, steps", None))
            last = 0

            def report(step: int, n_steps: int, records: dict[str, Any]) -> None:
                nonlocal last
                advance(max(0, step - last), _training_note(records), n_steps)
                last = step

            device, ranks = choose_device(self.config.device), self.run.ranks
            train_together(jobs, store, device, self.config.trackers, report, ranks, self.config.latent_ranks)
        for stage in wanted.values():
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

    def compare(self) -> None:
        """Write `comparison.json` and print it."""
        from crossdiff.compare.coders import comparison_table

        stage = self.compare_stage()
        if not self._skip(stage):
            self._compare(stage)
        if self.run.ranks.is_first:
            self.console.print(comparison_table(read_json(self.run.path / "comparison.json")))

    def _compare(self, stage: Stage) -> None:
        from crossdiff.compare.coders import compare

        store, config = self.store(), self.config.compare
        crosscoders = {name: self.crosscoder(name) for name in self.names}
        with (
            self.run.working(stage) as folder,
            progress_bar(self.console, "compare, tokens", config.max_tokens) as advance,
        ):
            if self.run.ranks.is_first:
                write_json(folder / "comparison.json", compare(crosscoders, store, self.load_pair(), config, advance))
        self._say_done(stage)

    def analyze(self, name: str) -> None:
        """Write the latent table, the examples, the health report and the behaviour table of one crosscoder."""
        stage = self.analyze_stage(name)
        if self._skip(stage):
            return
        from crossdiff.latents.analyze import analyze
        from crossdiff.models.pair import load_tokenizer

        store, crosscoder, tokenizer = self.store(), self.crosscoder(name), load_tokenizer(self.config.chat)
        beside = self.reference_of(name)
        reference = None if beside is None else self.crosscoder(beside)
        with (
            self.run.working(stage) as folder,
            progress_bar(self.console, f"analyze {name}, tokens", store.n_tokens) as advance,
        ):
            (folder / name).mkdir(exist_ok=True)
            analyze(folder / name, crosscoder, store, tokenizer, self.config.analyze, advance, reference, self.run.ranks)
        self._say_done(stage)

    def report(self) -> None:
        """Write `report.html` and `figures/`, and print the summary."""
        from crossdiff.report.reading import read_run
        from crossdiff.report.terminal import print_summary

        stage = self.report_stage()
        for name in self.names:
            if not self.run.is_done(self.analyze_stage(name)):
                raise UserError(f"{name} is not analysed with these settings; run `crossdiff analyze` first")
        report = read_run(self.run.path, self.names) if self.run.ranks.is_first else None
        if not self._skip(stage):
            with self.run.working(stage) as folder:
                if report is not None:
                    from crossdiff.report.html import write_html
                    from crossdiff.report.print_figures import write_figures

                    write_html(report, folder / "report.html")
                    write_figures(report, folder / "figures")
            self._say_done(stage)
        if report is not None:
            print_summary(report, self.console)


def harvest_layers(pipelines: Sequence[Pipeline]) -> None:
    """Harvest runs that differ in nothing but the layer, in one pass over the texts; finished ones are left alone."""
    waiting = [pipeline for pipeline in pipelines if not pipeline._skip(pipeline.harvest_stage())]
    if not waiting:
        return
    for pipeline in waiting:
        pipeline._ask_force(pipeline.harvest_stage())
    from crossdiff.activations.folder import POINTER, leave_pointer, open_folder
    from crossdiff.activations.harvest import harvest, is_whole
    from crossdiff.crosscoder.structure import check_sizes
    from crossdiff.text.documents import count_records

    config, console, ranks = waiting[0].config, waiting[0].console, waiting[0].run.ranks
    urls = [pipeline.store_url for pipeline in waiting]
    for where in filter(None, urls):
        open_folder(where).prepare()  # before the models are loaded, which takes long
    datasets = tuple(resolve(dataset) for dataset in config.dataset)
    counts = [count_records(dataset) for dataset in datasets]
    pair = waiting[0].load_pair()
    layers = [pair.check_layer(pipeline.config.layer) for pipeline in waiting]
    for crosscoder in config.crosscoders.values():
        check_sizes(crosscoder, pair.d_model, len(pair.models))
    with ExitStack() as stack:
        folders = [stack.enter_context(pipeline.run.working(pipeline.harvest_stage())) / "activations" for pipeline in waiting]
        for folder in folders:
            folder.mkdir(exist_ok=True)
            if ranks.is_first:
                (folder / POINTER).unlink(missing_ok=True)
        places = {layer: open_folder(url or folder) for layer, url, folder in zip(layers, urls, folders, strict=True)}
        unfinished = {layer: place for layer, place in places.items() if not is_whole(place)}
        title = f"harvest, layer{'s' * (len(layers) > 1)} {' '.join(map(str, layers))}, documents"
        total = None if None in counts else sum(filter(None, counts))
        advance = stack.enter_context(progress_bar(console, title, total))
        remarks = harvest(unfinished, pair, datasets, config.harvest, advance, ranks) if unfinished else []
        for url, folder in zip(urls, folders, strict=True) if ranks.is_first else ():
            if url is not None:
                leave_pointer(folder, url)
                console.print(f"the activations are in {url}", highlight=False, soft_wrap=True)
    for remark in remarks:
        console.print(f"[yellow]{escape(remark)}[/yellow]")
    for pipeline in waiting:
        pipeline._say_done(pipeline.harvest_stage())


def _training_note(records: dict[str, Any]) -> str:
    """The last record of each crosscoder, short enough for one line."""
    notes = []
    for name, record in records.items():
        fve = " ".join(f"{value:.2f}" for key, value in record.items() if key.startswith("fve_"))
        if record:
            notes.append(f"{name}: loss {record['loss']:.3g} FVE {fve} L0 {record['l0']:.0f} dead {record['dead_share']:.0%}")
    return "; ".join(notes)


def _identify_page() -> dict[str, str]:
    """A digest of every file that the report is made by."""
    from crossdiff.files import sha256

    folder = Path(__file__).with_name("report")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(folder)): sha256(file) for file in files}
