"""The texts of a run: which they are, what tells whether they are still the same, and what harvesting them will take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from crossdiff.config import DatasetConfig, RunConfig, UserError


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
    from crossdiff.activations.place import sha256

    path = Path(resolve(dataset).path)
    if not path.is_file():
        return dataset.model_dump()
    return dataset.model_dump(exclude={"path"}) | {"title": dataset.title, "sha256": sha256(path)}


def print_plan(config: RunConfig, directory: Path, console: Console) -> None:
    """Say what the harvest of these settings will take.

    Raises:
        UserError: there is no room for the store, or its size cannot be known beforehand.
    """
    from crossdiff.activations.place import place_of
    from crossdiff.activations.plan import plan
    from crossdiff.models.pair import choose_device, load_pair

    check_texts(config)
    if config.harvest.store is not None:
        place_of(config.harvest.store).prepare()
    pair = load_pair(config.base, config.chat, choose_device(config.device), config.harvest.base_tokens)
    layer = pair.check_layer(config.layer)
    found = plan(pair, layer, tuple(resolve(dataset) for dataset in config.dataset), config.harvest)
    console.print(f"harvest of layer {layer}: about {found.n_tokens:,} tokens", highlight=False)
    kept = "tokens alone" if config.harvest.storage == "live" else config.harvest.dtype
    console.print(f"  disk    {found.store_bytes / 1e9:.2f} GB as {kept}", highlight=False)
    console.print(f"  memory  {found.memory_bytes / 1e9:.2f} GB", highlight=False)
    rate = f"{found.tokens_per_second:,.0f} tokens/s"
    console.print(f"  time    {found.seconds / 60:.1f} min at {rate} on {pair.device}", highlight=False)
    free = found.check_disk(directory, config.harvest)
    console.print(f"There is room: {free / 1e9:.2f} GB are free", highlight=False)
