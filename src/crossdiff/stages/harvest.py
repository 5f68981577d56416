"""The stage `harvest`: collect the paired activations, of one layer or of several in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossdiff.corpus import resolve
from crossdiff.files import read_json
from crossdiff.stages.definitions import harvest_stage
from crossdiff.stages.session import Session, run_together


def store_url(session: Session) -> str | None:
    """Where the activations go if not into the run directory: a folder named after everything that they depend on."""
    stores = session.config.harvest.store
    return None if stores is None else f"{stores.rstrip('/')}/activations-{harvest_stage(session.config).fingerprint}"


def harvest_layers(sessions: Sequence[Session]) -> None:
    """Harvest runs that differ only in the layer, in one pass over the texts; finished ones are skipped."""
    waiting = [session for session in sessions if not session.skips(harvest_stage(session.config))]
    if not waiting:
        return
    for session in waiting:
        session.check_may_harvest()
    from crossdiff.activations.locations import open_folder
    from crossdiff.crosscoder.structure import check_sizes
    from crossdiff.models.names import fetch_adapter
    from crossdiff.text.documents import count_records

    config = waiting[0].config
    for name in (config.base, config.chat):
        fetch_adapter(name)  # its digest is part of the fingerprint
    urls = [store_url(session) for session in waiting]
    for url in filter(None, urls):
        open_folder(url).prepare()  # before the models are loaded, which takes long
    datasets = tuple(resolve(dataset) for dataset in config.dataset)
    counts = [count_records(dataset) for dataset in datasets]
    pair = waiting[0].load_pair()
    layers = [pair.check_layer(session.config.layer) for session in waiting]
    for crosscoder in config.crosscoders.values():
        check_sizes(crosscoder, pair.d_model, len(pair.models))
    for remark in (*pair.remarks, *pair.check_max_length(config.harvest.max_length)):
        waiting[0].remark(remark)
    remarks: list[str] = []

    def work(folders: list[Path]) -> None:
        from crossdiff.activations.harvest import harvest, is_finished
        from crossdiff.activations.locations import POINTER, leave_pointer

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
                remarks.extend(harvest(unfinished, pair, datasets, config.harvest, advance, ranks))
        for url, target in zip(urls, targets, strict=True):
            if url is not None and ranks.is_first:
                leave_pointer(target, url)
                console.print(f"the activations are in {url}", highlight=False, soft_wrap=True)

    run_together([(session, harvest_stage(session.config)) for session in waiting], work)
    for remark in remarks:
        waiting[0].remark(remark)
    for session in waiting:
        if read_json(session.path / "activations" / "manifest.json").get(
            "sources_equal"
        ):  # stores of earlier versions do not say
            session.remark_same_model()
