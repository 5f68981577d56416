"""The stage `analyze`: latent table, examples, health and behaviours of each crosscoder, in one pass over the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crossdiff.stages.definitions import analyze_stage, base_sae
from crossdiff.stages.session import Session, run_together


def analyze(session: Session, names: Sequence[str]) -> None:
    """Write the files of `definitions.ANALYSIS` for each crosscoder that is not analysed yet."""
    stages = {name: analyze_stage(session.config, name) for name in names}
    wanted = {name: stage for name, stage in stages.items() if not session.skips(stage)}
    if not wanted:
        return

    def work(folders: list[Path]) -> None:
        from crossdiff.latents.analyze import Analysis, analyze
        from crossdiff.models.loading import load_tokenizer

        store, tokenizer = session.store(), load_tokenizer(session.config.chat, session.config.base)
        analyses = []
        for name, folder in zip(wanted, folders, strict=True):
            (folder / name).mkdir(exist_ok=True)
            sae = base_sae(session.config, name)
            reference = None if sae is None else session.crosscoder(sae)
            analyses.append(Analysis(folder / name, session.crosscoder(name), reference))
        with session.progress(f"analyze {', '.join(wanted)}, tokens", store.n_tokens) as advance:
            analyze(analyses, store, tokenizer, session.config.analyze, advance, session.ranks)

    run_together([(session, stage) for stage in wanted.values()], work)
