"""A finished diff, opened for reading: this writes nothing and takes no lock."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import polars as pl

from crossdiff.config import CrosscoderConfig, HarvestConfig, RunConfig, default_crosscoder, validate
from crossdiff.errors import UserError, check_latents
from crossdiff.latents.ranking import by_rank
from crossdiff.notes.identity import concept_notes, latent_notes
from crossdiff.notes.of_run import RunNotes
from crossdiff.notes.store import Notebook, Notes
from crossdiff.report.cards import card_of
from crossdiff.report.concept_cards import concept_card
from crossdiff.report.concept_choices import choices, concept_labels
from crossdiff.report.concept_reading import COMMAND, check_concept, concept_of, read_concepts
from crossdiff.report.concept_records import RunConcepts
from crossdiff.report.examples import read_examples
from crossdiff.report.look import NotebookLook, notebook_look
from crossdiff.report.notebook_views import ConceptView, Examples, LatentView, run_view
from crossdiff.report.reading import read_latent, read_latents
from crossdiff.report.records import Latent
from crossdiff.report.tables import read_behaviours, read_causal
from crossdiff.report.templating import fragment
from crossdiff.report.wording import predicted
from crossdiff.run_manifest import MANIFEST, RunManifest, check_links
from crossdiff.sources import BASE, CHAT, SOURCES
from crossdiff.yaml_files import read_yaml

if TYPE_CHECKING:
    from crossdiff.activations.counted import Counted
    from crossdiff.activations.store import Store
    from crossdiff.crosscoder.crosscoder import Crosscoder
    from crossdiff.models.pair import Pair
    from crossdiff.notebook.widget import Explorer
    from crossdiff.text_activations import Activations, Known, Measure, Reading, Text

SCALING_COLUMNS = (
    "latent", "verdict", "delta_norm", "rank_sum", "rank_sum_paper", "^nu_.*$", "^beta_.*$", "undefined_reason", "n_active",
)  # fmt: skip


class Diff:
    """A run directory, or a folder from `crossdiff.pull`, as `crossdiff.open` returns it.

    Examples:
        >>> run = crossdiff.open("runs/demo")
        >>> run.names
        ('l1', 'batchtopk')
        >>> run.name, run.latents.height == run.crosscoder.n_latents
        ('batchtopk', True)

    Attributes:
        path: the run directory.
        config: the run's settings.
        names: the trained crosscoders of the run.
        name: the crosscoder that this object reads; "" if there is only a first look.
    """

    def __init__(self, path: Path, config: RunConfig, name: str) -> None:
        self.path = path
        self.config = config
        self.name = name
        self.names = _names(path, config)

    def __repr__(self) -> str:
        pair = f"<Diff of {self.config.chat} and {self.config.base}"
        others = ", ".join(name for name in self.names if name != self.name)
        also = f"; also: {others}" if others else ""
        return f"{pair}, crosscoder {self.name}{also}>" if self.name else f"{pair}, with a first look only>"

    def _repr_html_(self) -> str:
        return fragment(run=run_view(self.path, self.config))

    @cached_property
    def store(self) -> Store:
        """The activation store, on this disk or in remote storage. A pulled run has none.

        Raises:
            UserError: there is no store.
        """
        from crossdiff.activations.store import Store

        return Store(self.path / "activations")

    @property
    def folder(self) -> Path:
        """The crosscoder's folder.

        Raises:
            UserError: nothing has been trained yet.
        """
        if not self.name:
            raise UserError(f"{self.path} has no trained crosscoder yet; run `crossdiff train {self.path}` first")
        return self.path / self.name

    @cached_property
    def concepts(self) -> pl.DataFrame:
        """The concepts of the run: groups of latents, from several trainings, that are active on the same tokens. One row per
        concept, those that replicate first; `docs/run-directory.md` has the columns.

        Examples:
            >>> concepts = crossdiff.open("runs/demo").concepts
            >>> concepts.filter(replicated=True, verdict="chat_specific")["n_trainings"].to_list()
            [3, 4]

        Raises:
            UserError: the run has no concepts yet.
        """
        return self._concepts.table

    def concept(self, concept: SupportsIndex) -> ConceptView:
        """A concept's card: what it is active on, its verdict, and the evidence for it.

        Examples:
            >>> crossdiff.open("runs/demo").concept(0).record.n_trainings
            3

        Raises:
            UserError: the concept does not exist, or the run has no concepts yet.
        """
        found = self._concepts
        check_concept(found, concept)
        number = index(concept)
        examples = read_examples(found.folder / "examples.sqlite", [number], COMMAND)[number]
        record = concept_of(found, number, examples)
        return ConceptView(record, concept_card(record, found), self.notes.concept(number))

    @cached_property
    def _found(self) -> RunConcepts | None:
        return read_concepts(self.path, with_examples=False)

    @property
    def _concepts(self) -> RunConcepts:
        if self._found is None:
            raise UserError(f"{self.path} has no concepts; run `crossdiff concepts {self.path}` first")
        return self._found

    @cached_property
    def notes(self) -> RunNotes:
        """Your labels, stars, comments and lists for the run's latents and concepts: see `RunNotes`."""
        notes = Notes()

        def books(unit: str) -> tuple[Notebook, int, str]:
            if unit == "latent":
                return latent_notes(notes, self.folder), self.latents.height, self.name
            found = self._concepts
            book = concept_notes(notes, found.folder, found.table, found.members)
            return book, found.table.height, "the run"

        return RunNotes(books)

    @cached_property
    def look(self) -> NotebookLook:
        """The first look at the two models: tables of where and how they predict differently, and plain sentences.

        Raises:
            UserError: the run has no first look yet.
        """
        return notebook_look(self.path)

    @cached_property
    def crosscoder(self) -> Crosscoder:
        """The trained crosscoder, on the CPU."""
        from crossdiff.crosscoder.checkpoint import load

        return load(self.folder)

    @cached_property
    def harvest(self) -> HarvestConfig:
        """The settings of the harvest that the crosscoder was trained on, or those of the run if there is none."""
        from crossdiff.crosscoder.checkpoint import harvest_of

        if not self.name:
            return self.config.harvest
        return harvest_of(self.folder)

    @property
    def rule(self) -> Counted:
        """The rule by which tokens counted in training."""
        from crossdiff.activations.counted import Counted

        return Counted(self.harvest.leave_out, tuple(self.crosscoder.origin.get("norm_limits", ())))

    @cached_property
    def latents(self) -> pl.DataFrame:
        """The latent table: one row per latent, with geometry, latent scaling, activity and verdict.

        Raises:
            UserError: the crosscoder is not analysed yet.
        """
        self._need("latents.parquet", "crossdiff analyze", "no latent table")
        return read_latents(self.folder)

    def scaling(self) -> pl.DataFrame:
        """The columns of latent scaling: every beta with its standard error and every nu with its interval, of all latents.

        Those with the lowest `rank_sum` come first, whatever their verdict, then those whose nu is out of range (`nu_outside`),
        then those with an undefined nu. Ranks and verdicts rest on nu_error and nu_reconstruction_nobias.

        Examples:
            >>> crossdiff.open("runs/demo").scaling().columns[:4]
            ['latent', 'verdict', 'delta_norm', 'rank_sum']
        """
        return self.latents.select(*SCALING_COLUMNS).sort(*by_rank(), nulls_last=True)

    def causal(self) -> pl.DataFrame:
        """The causal test: one row per intervention and span of the answer, with the KL to the chat model in nats, the share
        of the gap between the models that is closed, and the other measures that were asked for (`nll`, `kl_base`,
        `cross_entropy`), all with 95% bootstrap intervals. `n_outside` is the number of latents that the ranking left out
        because of their nu; null where it leaves none out.

        Raises:
            UserError: the causal test was not run.
        """
        self._need("causal.json", "crossdiff causal", "no causal test")
        return read_causal(self.folder / "causal.json")

    def examples(self, latent: SupportsIndex) -> Examples:
        """The stored contexts of a latent: the strongest, then one per quantile of its activations; imported ones by band.

        Examples:
            >>> first = crossdiff.open("runs/demo").examples(3)[0]
            >>> first.activation == max(token.activation for token in first.tokens)
            True

        Raises:
            UserError: the latent or the example database does not exist.
        """
        record = self._record(latent)
        found = Examples(read_examples(self.folder / "examples.sqlite", [record.latent])[record.latent])
        found.latent = record
        return found

    def latent(self, latent: SupportsIndex) -> LatentView:
        """A latent's card: its measures, its verdict with the reason, the tokens it is active on, and examples.

        Examples:
            >>> crossdiff.open("runs/demo").latent(3).record.latent
            3

        Raises:
            UserError: the latent does not exist, or the crosscoder is not analysed yet.
        """
        record = self._record(latent)
        predicts = predicted(read_behaviours(self.folder)).get(record.latent, ())
        return LatentView(record, card_of(self.name, record, predicts), self.notes.latent(record.latent))

    def activations(self, text: Text, latents: Sequence[int] | None = None) -> Activations:
        """Run both models on a text and return where latents are active. The first call loads the models.

        Args:
            text: plain text as a string, or a conversation as a list of messages (`role`, `content`). A conversation is
                rendered with the chat template; unless it ends with the assistant, the header of the answer is appended.
            latents: numbers of the latents; default: the strongest ones on this text.

        Examples:
            >>> run = crossdiff.open("runs/demo")
            >>> found = run.activations([{"role": "user", "content": "Hello"}])
            >>> found.roles[-1], len(found.latents) <= 5
            ('template', True)

        Raises:
            UserError: the text is empty or too long, a latent does not exist, or the models are missing or not the run's.
        """
        from crossdiff.text_activations import activations_on

        check_latents(() if latents is None else latents, self.crosscoder.n_latents)
        return activations_on(self._read(text), latents, self._known)

    def widget(self, prompt: Text = "", measure: Measure | None = None) -> Explorer:
        """A widget for notebooks: type a prompt, choose a concept or latent, and click on tokens for the latents active there.

        Args:
            prompt: what is read at once; a string is a user's question to the chat model.
            measure: a function of your own, which is shown like a latent: it gets the `Activations` of all latents (`values`
                is `[token, latent]`) and returns one finite number per token.

        Examples:
            >>> run = crossdiff.open("runs/demo")
            >>> widget = run.widget("Hello", measure=lambda activations: (activations.values > 0).sum(1))
            >>> len(widget.reading["measure"]) == len(widget.reading["texts"])
            True

        Raises:
            UserError: the package anywidget is missing, nothing is trained, or the prompt or the measure cannot be read.
        """
        try:
            from crossdiff.notebook.widget import Explorer
        except ModuleNotFoundError as error:
            raise UserError(f"run.widget() needs the package {error.name}; run `pip install 'crossdiff[notebook]'`") from None
        return Explorer(self._read, self._known, choices(self._found, self.name), measure, prompt)

    def _read(self, text: Text) -> Reading:
        from crossdiff.text_activations import check_text, read, read_text

        check_text(text)
        sequence = read_text(self.pair.tokenizer, text, self.harvest.max_length)
        return read(sequence, self.pair, self.crosscoder_at_pair, self.rule)

    @cached_property
    def _known(self) -> dict[int, Known]:
        from crossdiff.text_activations import known_latents

        if not (self.folder / "latents.parquet").is_file():
            return {}
        return known_latents(self.latents, concept_labels(self._found, self.name))

    @cached_property
    def pair(self) -> Pair:
        """The two models, on an accelerator if one is available.

        Raises:
            UserError: the models cannot be loaded, or are not the ones that the crosscoder was trained on.
        """
        from crossdiff.models.loading import choose_device
        from crossdiff.models.names import local_path
        from crossdiff.models.pair import load_pair

        origin = self.crosscoder.origin if self.name else {}
        trained_on: dict[str, Any] = origin.get("pair") or {}
        names = {}
        for source in self.config.sources:
            model = trained_on.get(source, {})
            # A folder may have been moved, and its digest shows whether it is the same; a name on the Hub is what it is.
            is_gone = not model or ("digest" in model and local_path(model["name"]) is None)
            names[source] = self.config.model_of[source] if is_gone else model["name"]
        harvest = self.harvest
        device, dtype = choose_device("auto"), origin.get("model_dtype") or self.config.model_dtype
        steps = {source: name for source, name in names.items() if source not in SOURCES}
        pair = load_pair(names[BASE], names[CHAT], device, harvest.base_tokens, harvest.template_date, dtype, steps)
        for source, name in names.items():
            ours, theirs = pair.identity[source].get("digest"), trained_on.get(source, {}).get("digest")
            if ours != theirs and ours is not None and theirs is not None:
                raise UserError(
                    f"{name} is not the {source} model that the crosscoder was trained on: its files have the digest {ours}, "
                    f"expected {theirs}; restore the original files, or make a new run"
                )
        return pair

    @cached_property
    def crosscoder_at_pair(self) -> Crosscoder:
        """The trained crosscoder, on the device of the models."""
        return self.crosscoder.to(self.pair.device)

    def _record(self, latent: Any) -> Latent:
        table = self.latents
        check_latents([latent], table.height, self.name)
        return read_latent(self.folder, table, index(latent))

    def _need(self, file: str, command: str, what: str) -> None:
        if not (self.folder / file).is_file():
            raise UserError(f"{self.name} in {self.path} has {what}; run `{command} {self.path}` first")


def _names(path: Path, config: RunConfig) -> tuple[str, ...]:
    """The trained crosscoders of a run in the order of its settings."""
    return tuple(name for name in config.crosscoders if (path / name / "model.safetensors").is_file())


def _default(path: Path, names: Sequence[str], config: RunConfig) -> str:
    """See `default_crosscoder`. What a crosscoder is, it says itself; one of an earlier version or of others may not."""
    if len(names) == 1:
        return names[0]
    from crossdiff.crosscoder.checkpoint import origin_of

    kinds = {}
    for name in names:
        own = None
        with suppress(UserError):  # damaged weights are reported when they are loaded
            own = origin_of(path / name).get("settings")
        coder = config.crosscoders[name] if own is None else validate(CrosscoderConfig, own, str(path / name))
        kinds[name] = coder.sparsity.kind, coder.inputs.kind
    return default_crosscoder(kinds)


def open(path: str | Path, crosscoder: str | None = None) -> Diff:
    """Open a run directory, or a folder from `crossdiff pull`, for reading.

    This writes nothing and takes no lock, so a run can be read while it continues. Everything is loaded when it is first used.

    Examples:
        >>> crossdiff.open("runs/demo").name
        'batchtopk'
        >>> crossdiff.open("runs/demo", crosscoder="l1").name
        'l1'

    Args:
        crosscoder: name of the crosscoder; default: the first BatchTopK crosscoder that reads both models, else the first that
            reads both, else the first.

    Raises:
        UserError: the path is not a run, the run is of another version, or it has no such crosscoder; the message lists
            those it has.
    """
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"there is no run at {path}: it has no config.yaml; make a run with `crossdiff run`, or fetch one with "
            "`crossdiff pull`"
        )
    check_links(path)
    if (path / MANIFEST).is_file() and RunManifest.read(path).swap:
        raise UserError(f"results of {path} are being replaced; try again in a moment, or repeat the command if it was killed")
    config = validate(RunConfig, read_yaml(path / "config.yaml"), str(path / "config.yaml"))
    names = _names(path, config)
    if not names and not (path / "look").is_dir():
        raise UserError(f"{path} has no trained crosscoder yet; run `crossdiff train {path}` first")
    if crosscoder is not None and crosscoder not in names:
        raise UserError(f"there is no crosscoder {crosscoder!r} in {path}; there are {', '.join(names) or 'none'}")
    return Diff(path, config, crosscoder or (_default(path, names, config) if names else ""))
