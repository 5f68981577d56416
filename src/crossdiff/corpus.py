"""The texts of a run: which they are, what tells whether they are still the same, and what harvesting them will take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from crossdiff.config import CrosscoderConfig, DatasetConfig, PairedConfig, RunConfig
from crossdiff.errors import UserError

if TYPE_CHECKING:
    from crossdiff.models.pair import Pair

TYPICAL_ACTIVE = 64
"""Active latents on a token, for a kind of sparsity whose settings do not say: an L1 crosscoder ends there or thereabouts."""


def check_texts(config: RunConfig) -> None:
    """Raises `UserError` when the settings name no texts."""
    if not config.dataset:
        raise UserError("no texts: name at least one --dataset (a .jsonl, .jsonl.gz, .parquet or .txt file, or a Hub dataset)")


def resolve(dataset: DatasetConfig) -> DatasetConfig:
    """The dataset with the file behind a `demo:` name, keeping its title."""
    if not dataset.path.startswith("demo:"):
        return dataset
    from crossdiff.pairs import demo_path

    return dataset.model_copy(update={"path": str(demo_path(dataset.path)), "name": dataset.title})


def identify_dataset(dataset: DatasetConfig) -> dict[str, Any]:
    """Settings and, for a local file, a digest of its content: what tells whether the text is still the same."""
    from crossdiff.files import sha256

    path = Path(resolve(dataset).path)
    if not path.is_file():
        return dataset.model_dump()
    return dataset.model_dump(exclude={"path"}) | {"title": dataset.title, "sha256": sha256(path)}


def print_plan(config: RunConfig, directory: Path, console: Console) -> None:
    """Say what the harvest and the trainings of these settings will take.

    Raises:
        UserError: there is no room for the store, or its size cannot be known beforehand.
    """
    from crossdiff.activations.folder import open_folder
    from crossdiff.activations.plan import plan
    from crossdiff.models.pair import choose_device, load_pair

    check_texts(config)
    if config.harvest.store is not None:
        open_folder(config.harvest.store).prepare()
    pair = load_pair(config.base, config.chat, choose_device(config.device), config.harvest.base_tokens)
    layer = pair.check_layer(config.layer)
    found = plan(pair, layer, tuple(resolve(dataset) for dataset in config.dataset), config.harvest)
    console.print(f"harvest of layer {layer}: about {found.n_tokens:,} tokens", highlight=False)
    kept = "tokens alone" if config.harvest.storage == "live" else config.harvest.dtype
    console.print(f"  disk    {found.store_bytes / 1e9:.2f} GB as {kept}", highlight=False)
    console.print(f"  memory  {found.memory_bytes / 1e9:.2f} GB", highlight=False)
    rate = f"{found.tokens_per_second:,.0f} tokens/s"
    console.print(f"  time    {found.seconds / 60:.1f} min at {rate} on {pair.device}", highlight=False)
    for name, crosscoder in config.crosscoders.items():
        _print_training(name, crosscoder, found.n_tokens, pair, console)
    free = found.check_disk(directory, config.harvest)
    console.print(f"There is room: {free / 1e9:.2f} GB are free", highlight=False)


def _print_training(name: str, config: CrosscoderConfig, n_tokens: int, pair: Pair, console: Console) -> None:
    from crossdiff.crosscoder.cost import Size, calibrate

    n_sources = len(pair.models) if isinstance(config.inputs, PairedConfig) else 1
    active, n_latents = getattr(config.sparsity, "k", TYPICAL_ACTIVE), config.latents_for(pair.d_model)
    size = Size(pair.d_model, n_latents, active, config.batch_size, n_sources)
    n_steps = round(config.epochs * n_tokens / config.batch_size)
    seconds = calibrate(size, pair.device).seconds(size)
    console.print(
        f"training of {name}: {n_steps:,} steps of {config.batch_size:,} tokens, {n_latents:,} latents", highlight=False
    )
    console.print(f"  memory  {size.memory_bytes() / 1e9:.2f} GB", highlight=False)
    console.print(
        f"  time    {n_steps * seconds / 60:.1f} min, {seconds * 1e3:.0f} ms a step on {pair.device}", highlight=False
    )
