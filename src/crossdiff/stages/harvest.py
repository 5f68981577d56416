"""The stage `harvest`: collect the paired activations, of one layer or of several in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from crossdiff.corpus import resolve
from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.integrity import intact
from crossdiff.stages.definitions import harvest_stage
from crossdiff.stages.session import Session, run_together

if TYPE_CHECKING:
    from crossdiff.models.pair import Pair


def store_url(session: Session) -> str | None:
    """Where the activations go if not into the run directory: a folder named after everything that they depend on."""
    stores = session.config.harvest.store
    return None if stores is None else f"{stores.rstrip('/')}/activations-{harvest_stage(session.config).fingerprint}"


def pin_template_date(sessions: Sequence[Session]) -> None:
    """Set the date that the chat template writes, if it reads the clock and the settings do not name a date.

    It is the day of the run's first harvest. So a run has one date whatever day it is finished on.
    """
    undated = [session for session in sessions if session.config.harvest.template_date is None]
    days = {session.path: session.run_directory.template_date for session in undated}
    started = [session.run_directory.is_done(harvest_stage(session.config)) for session in undated]
    new = [session for session, done in zip(undated, started, strict=True) if not (days[session.path] or done)]
    for session in new:
        session.check_may_harvest()
    if new:
        from crossdiff.models.loading import load_tokenizer
        from crossdiff.models.tokenizers import reads_clock

        if reads_clock(load_tokenizer(undated[0].config.chat, undated[0].config.base)):
            today = next(filter(None, days.values()), undated[0].ranks.agree(date.today().isoformat()))
            days = {path: day or today for path, day in days.items()}
    for session in undated:
        day = days[session.path]
        if day is not None:
            harvest = session.config.harvest.model_copy(update={"template_date": date.fromisoformat(day)})
            session.config = session.config.model_copy(update={"harvest": harvest})


def load_checked_pair(sessions: Sequence[Session]) -> Pair:
    """The models of runs that differ only in the layer, once it is clear that they can read the runs' texts at these layers.

    Raises:
        UserError: they cannot.
    """
    from crossdiff.models.names import fetch_adapter
    from crossdiff.text.documents import check_datasets

    session, config = sessions[0], sessions[0].config
    for name in config.model_of.values():
        fetch_adapter(name)  # its digest is part of the fingerprint
    check_datasets(tuple(resolve(dataset) for dataset in config.dataset))
    pair = session.load_pair()
    for each in sessions:
        pair.check_layer(each.config.layer)
    for remark in (*pair.remarks, *pair.check_max_length(config.harvest.max_length)):
        session.remark(remark)
    return pair


@dataclass(frozen=True)
class Harvesting:
    """A harvest that has passed all checks; see `prepare_harvest`."""

    sessions: list[Session]
    urls: list[str | None]
    pair: Pair


def prepare_harvest(sessions: Sequence[Session]) -> Harvesting | None:
    """Check the harvest of runs that differ only in the layer, without those that are done; None if all are.

    Raises:
        UserError: it would fail, or would replace a store without --force.
    """
    waiting = [session for session in sessions if not session.skips(harvest_stage(session.config))]
    if not waiting:
        return None
    for session in waiting:
        session.check_may_harvest()
    from crossdiff.activations.locations import open_folder
    from crossdiff.crosscoder.structure import check_sizes

    config = waiting[0].config
    _check_one_date(waiting)
    urls = [store_url(session) for session in waiting]
    for url in filter(None, urls):
        open_folder(url).prepare()  # before the models are loaded, which takes long
    pair = load_checked_pair(waiting)
    for crosscoder in config.crosscoders.values():
        check_sizes(crosscoder, pair.d_model, pair.sources)
    if config.published and len(waiting) > 1:
        raise UserError(
            f"{', '.join(config.published)}: a published crosscoder reads one layer, so it cannot be in the runs of several "
            "layers; harvest its layer alone"
        )
    waiting[0].check_published(pair.identity, pair.d_model, pair.check_layer(config.layer))
    _look_at_texts(waiting[0], pair)
    return Harvesting(waiting, urls, pair)


def harvest_layers(harvesting: Harvesting) -> None:
    """Harvest runs that differ only in the layer, in one pass over the texts, and write their settings to them."""
    from crossdiff.text.readers import count_records

    waiting, urls, pair = harvesting.sessions, harvesting.urls, harvesting.pair
    config = waiting[0].config
    datasets = tuple(resolve(dataset) for dataset in config.dataset)
    limited = any(dataset.max_tokens is not None or dataset.weight is not None for dataset in datasets)
    counts = [None if limited else count_records(dataset) for dataset in datasets]
    layers = [pair.check_layer(session.config.layer) for session in waiting]
    for session in waiting:
        session.begin()
    remarks: list[str] = []

    def work(folders: list[Path]) -> None:
        from crossdiff.activations.harvest import harvest, is_finished
        from crossdiff.activations.locations import POINTER, leave_pointer, open_folder

        console, ranks = waiting[0].console, waiting[0].ranks
        targets = [folder / "activations" for folder in folders]
        for target in targets:
            target.mkdir(exist_ok=True)
            if ranks.is_first:
                (target / POINTER).unlink(missing_ok=True)
        stores = {layer: open_folder(url or target) for layer, url, target in zip(layers, urls, targets, strict=True)}
        unfinished = {layer: store for layer, store in stores.items() if not is_finished(store)}
        title = f"harvest, layer{'s' * (len(layers) > 1)} {' '.join(map(str, layers))}, documents"
        total = None if None in counts else sum(filter(None, counts))
        with waiting[0].progress(title, total) as advance:
            if unfinished:
                remarks.extend(harvest(unfinished, pair, datasets, config.harvest, advance, ranks, waiting[0].force))
        for url, target in zip(urls, targets, strict=True):
            if url is not None and ranks.is_first:
                leave_pointer(target, url)
                console.print(f"the activations are in {url}", highlight=False, soft_wrap=True)

    run_together([(session, harvest_stage(session.config)) for session in waiting], work)
    for remark in remarks:
        waiting[0].remark(remark)
    for session in waiting:
        manifest = read_json(intact(session.path / "activations" / "manifest.json"))
        if manifest.get("sources_equal"):  # stores of earlier versions do not say
            session.remark_same_model()


def _check_one_date(sessions: Sequence[Session]) -> None:
    dates = {session.path: session.config.harvest.template_date for session in sessions}
    if len(set(dates.values())) > 1:
        found = ", ".join(f"{path} has {day}" for path, day in dates.items())
        raise UserError(f"the harvests have different dates of the chat template: {found}; harvest them separately")


def _look_at_texts(session: Session, pair: Pair) -> None:
    """Read the first documents and print what is remarkable about them.

    Raises:
        UserError: they cannot be read, or their conversations lack one side.
    """
    from crossdiff.activations.texts import sample
    from crossdiff.models.tokenizers import reads_clock

    datasets = tuple(resolve(dataset) for dataset in session.config.dataset)
    texts, _ = sample(datasets, pair.tokenizer, session.config.harvest, pair.unreadable)
    if not session.force:
        texts.check_sides()
    remarks = texts.layouts()
    if reads_clock(pair.tokenizer):
        remarks.append(f"the chat template writes the date {session.config.harvest.template_date} (harvest.template_date)")
    for remark in (*remarks, *(f"the first documents: {remark}" for remark in texts.lost())):
        session.remark(remark)
