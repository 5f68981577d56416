"""The stage `analyze`: latent table, examples, health and behaviours of one crosscoder."""

from __future__ import annotations

from pathlib import Path

from crossdiff.stages.definitions import analyze_stage, base_sae
from crossdiff.stages.session import Session


def analyze(session: Session, name: str) -> None:
    """Write the files of `definitions.ANALYSIS` for one crosscoder."""

    def work(folder: Path) -> None:
        from crossdiff.latents.analyze import analyze
        from crossdiff.models.loading import load_tokenizer

        store, crosscoder = session.store(), session.crosscoder(name)
        tokenizer = load_tokenizer(session.config.chat, session.config.base)
        sae = base_sae(session.config, name)
        reference = None if sae is None else session.crosscoder(sae)
        (folder / name).mkdir(exist_ok=True)
        with session.progress(f"analyze {name}, tokens", store.n_tokens) as advance:
            analyze(
                folder / name, crosscoder, store, tokenizer, session.config.analyze, advance, reference, session.ranks
            )  # fmt: skip

    session.run(analyze_stage(session.config, name), work)
