"""The stage `promoted`: the tokens that each latent's directions promote, stored so that a page of a latent needs no model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdiff.stages.definitions import promoted_stage
from crossdiff.stages.session import Session, run_together

if TYPE_CHECKING:
    from crossdiff.models.pair import Pair
    from crossdiff.shapes import Int, Tensor

MOST_ON_CPU = 1e13
"""Products that the lens of one crosscoder may take on a CPU: some minutes. Beyond it only latents that differ are read."""
DIFFER = ("chat_specific", "rotated", "base_specific", "complete_shrinkage", "latent_decoupling")


def promoted(session: Session) -> Pair | None:
    """Write `promoted.parquet` for each analysed crosscoder with a direction in both models.

    It is a stage of its own: if the file alone is missing, nothing is analysed again.

    Returns:
        The models, if they were loaded: the next stage needs them too, and loading them takes most of the time.
    """
    stages = {name: promoted_stage(session.config, name) for name in session.paired_names}
    wanted = {name: stage for name, stage in stages.items() if not session.skips(stage)}
    if not wanted:
        return None
    pair = session.load_pair() if session.ranks.is_first else None

    def work(folders: list[Path]) -> None:
        if pair is not None:
            for name, folder in zip(wanted, folders, strict=True):
                (folder / name).mkdir(exist_ok=True)
                _write(session, name, pair, folder / name)

    run_together([(session, stage) for stage in wanted.values()], work)
    return pair


def _write(session: Session, name: str, pair: Pair, folder: Path) -> None:
    from crossdiff.latents.activity import ROW_GROUP
    from crossdiff.latents.decoder import BASE_INDEX, CHAT_INDEX
    from crossdiff.models.promoted_tokens import promoted_table

    directions = session.crosscoder(name).directions()
    latents = _latents(session, name, pair, *directions.shape[1:])
    with session.progress(f"promoted tokens of {name}, latents", len(latents)) as advance:
        base, chat = (directions[index, latents.to(directions.device)] for index in (BASE_INDEX, CHAT_INDEX))
        table = promoted_table(pair, base, chat, latents, "latent", advance)
    table.write_parquet(folder / "promoted.parquet", row_group_size=ROW_GROUP)


def _latents(session: Session, name: str, pair: Pair, n_latents: int, d_model: int) -> Int[Tensor, " latent"]:
    """The latents to read: all, or those that differ between the models where all would take a CPU too long."""
    import polars as pl
    import torch

    from crossdiff.integrity import intact

    models: tuple[Any, ...] = (pair.base, pair.chat, pair.chat)
    n_tokens = sum(model.get_output_embeddings().weight.shape[0] for model in models)
    if pair.device.type != "cpu" or n_latents * d_model * n_tokens <= MOST_ON_CPU:
        return torch.arange(n_latents)
    table = pl.read_parquet(intact(session.path / name / "latents.parquet"), columns=["latent", "verdict"])
    found = table.filter(pl.col("verdict").is_in(DIFFER))["latent"].to_list()
    session.console.print(
        f"promoted tokens of {name}: only of the {len(found):,} latents that differ between the models, since all "
        f"{n_latents:,} would take this CPU too long; the dashboard reads those of the others when they are asked for"
    )
    return torch.tensor(found, dtype=torch.int64)
