"""The stage `overlap`: whether a direction of the first look says the same as each latent and each concept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crossdiff.integrity import intact
from crossdiff.stages.definitions import concepts_stage, look_stage, overlap_stage, train_stage
from crossdiff.stages.session import Session, run_together

if TYPE_CHECKING:
    from crossdiff.look.overlap import Reader

CONCEPTS = "concepts"


def overlap(session: Session) -> None:
    """Write `overlap.parquet` for each training that reads both models and for the concepts.

    A run has none without a first look of its models, texts and layer.
    """
    config = session.config
    if not session.run_directory.is_done(look_stage(config)):
        session.console.print(
            "overlap: skipped, since the run has no first look with these settings; `crossdiff look` makes one"
        )
        return
    needed = {name: train_stage(config, name) for name in session.trainings if config.trainings[name].inputs.kind != "single"}
    if session.paired_trainings:
        needed[CONCEPTS] = concepts_stage(config, session.paired_trainings)
    stages = {name: overlap_stage(config, name, made_from) for name, made_from in needed.items()}
    wanted = {name: stage for name, stage in stages.items() if not session.skips(stage)}
    if wanted:
        run_together([(session, stage) for stage in wanted.values()], lambda folders: _measure(session, list(wanted), folders))


def _measure(session: Session, names: list[str], folders: list[Path]) -> None:
    from safetensors.numpy import load_file

    from crossdiff.look.overlap import overlaps, sampled_rows
    from crossdiff.look.reading import OVERLAP_FILE, read_look

    store = session.store()
    readers = [_reader(session, name) for name in names]
    if not session.ranks.is_first:
        return
    look = read_look(session.path / "look")
    assert look is not None
    vectors = load_file(intact(look.folder / "directions.safetensors"))["directions"]
    rows = sampled_rows(store, seed=session.config.look.seed)
    with session.progress("overlap with the first look, tokens", len(rows)) as advance:
        batch_tokens = session.config.analyze.batch_tokens
        tables = overlaps(readers, store, look.directions["direction"], vectors, rows, batch_tokens, advance)
    for name, folder, table in zip(names, folders, tables, strict=True):
        (folder / name).mkdir(exist_ok=True)
        table.with_row_index("concept" if name == CONCEPTS else "latent").write_parquet(folder / name / OVERLAP_FILE)


def _reader(session: Session, name: str) -> Reader:
    """The latents of a training, or the concepts, each along its mean contribution."""
    from safetensors.torch import load_file

    from crossdiff.concepts.coder import ConceptCoder
    from crossdiff.latents.decoder import CHAT_INDEX
    from crossdiff.look.overlap import Reader, reader_of

    if name != CONCEPTS:
        return reader_of(session.crosscoder(name))
    coder = ConceptCoder.load(session.path, session.device)
    directions = load_file(intact(session.path / CONCEPTS / "directions.safetensors"))["directions"]
    return Reader(directions[CHAT_INDEX], coder.reads, coder.sparse_code)
