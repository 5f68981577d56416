"""Published crosscoders in a run: what identifies their files, and how they are read and checked against the pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdiff.config import CrosscoderConfig, DifferenceConfig, Inputs, PairedConfig, SingleConfig
from crossdiff.crosscoder.view import identity
from crossdiff.errors import UserError
from crossdiff.files import sha256
from crossdiff.published import WEIGHTS
from crossdiff.published.formats import read_published
from crossdiff.published.hub import SETTINGS, locate
from crossdiff.sources import SOURCES

TOKENS = 4_000_000
"""Tokens that a new run of a published crosscoder harvests by default: a latent that is active on one token in 40,000 then has
the 100 active tokens that a verdict needs (`analyze.min_active`)."""
HELDOUT_SHARE = 0.5
"""Share of the documents of such a run that are held out by default."""

if TYPE_CHECKING:
    from crossdiff.crosscoder.crosscoder import Crosscoder
    from crossdiff.shapes import Tensor


def identify(config: CrosscoderConfig) -> dict[str, Any]:
    """What identifies a published crosscoder: a digest of each of its files, wherever they are, or its name on the Hub.

    Raises:
        UserError: its folder or file is gone.
    """
    assert config.published is not None
    path = Path(config.published).expanduser()
    if not path.exists():
        if path.is_absolute():
            raise UserError(f"the published crosscoder {path} of this run is gone; put it back, or import it again")
        return {"name": config.published}
    return {file.name: _digest(file, file.stat().st_mtime_ns) for file in _files(locate(path))}


def _files(place: Path) -> list[Path]:
    """The weights of a crosscoder, and the settings beside them, which its format may depend on."""
    folder, names = (place, WEIGHTS) if place.is_dir() else (place.parent, (place.name,))
    weights = [folder / name for name in names if (folder / name).is_file()][:1]
    beside = [folder / name for name in (*SETTINGS, *(f"{file.stem}_cfg.json" for file in weights))]
    return weights + [file for file in beside if file.is_file()]


@lru_cache
def _digest(file: Path, changed: int) -> str:
    """Large files are read once per process."""
    return sha256(file)


def settings_of(coder: Crosscoder, published: str) -> dict[str, Any]:
    """The settings of a run's crosscoder that is read from `published`, without those that say how to read it."""
    values = {"published": published, "sparsity": kind_of(coder), "inputs": inputs_of(coder, published).model_dump()}
    return values | {"n_latents": coder.n_latents}


def texts_of(given: Sequence[Any]) -> list[dict[str, Any]]:
    """The datasets of a run that trains nothing: of each a part of `TOKENS`, half of the documents held out.

    Such a run needs no training text. The other half chooses the latents that predict a behaviour or fits a baseline, which the
    held-out half measures. What is given with a dataset is kept.
    """
    start = {"heldout_share": HELDOUT_SHARE, "max_tokens": TOKENS // max(1, len(given))}
    return [start | (dataset if isinstance(dataset, dict) else {"path": dataset}) for dataset in given]


def read_in_run(name: str, config: CrosscoderConfig, pair: Mapping[str, Any], d_model: int, layer: int) -> Crosscoder:
    """Read a published crosscoder of a run, checked by `check_in_run`.

    Its sources come in our order, base first, whatever the order in its file.

    Raises:
        UserError: it cannot be read, or does not belong to the pair or the settings.
    """
    assert config.published is not None
    coder = read_published(locate(config.published), config.sources, config.input_scales)
    check_in_run(name, coder, config, pair, d_model, layer)
    return _in_order(coder)


def check_in_run(
    name: str, coder: Crosscoder, config: CrosscoderConfig, pair: Mapping[str, Any], d_model: int, layer: int
) -> None:
    """Check that a published crosscoder belongs to a pair of models and a layer, and that the settings say what it is.

    Args:
        name: its name in the run.
        pair: identity of each model, as `Pair.identity`.

    Raises:
        UserError: it has another width, layer, models, latents or kind of sparsity.
    """
    where = f"crosscoders.{name}: {config.published}"
    if coder.d_model != d_model:
        raise UserError(
            f"{where} has width {coder.d_model}, but the models have width {d_model}; give the models that it was trained on"
        )
    if coder.origin["layer"] not in (None, layer):
        raise UserError(
            f"{where} reads layer {coder.origin['layer']}, but the run's layer is {layer}; set layer to {coder.origin['layer']}"
        )
    for source in SOURCES:  # only files of crossdiff name the models, and a model on the Hub has no digest
        theirs, ours = ((of or {}).get(source, {}).get("digest") for of in (coder.origin["pair"], pair))
        if theirs is not None and ours not in (None, theirs):
            raise UserError(
                f"{where} was trained on another {source} model: its files had the digest {theirs}, those of "
                f"{pair[source]['name']} have {ours}; give the models that it was trained on"
            )
    _check_kind(where, coder, config)


def inputs_of(coder: Crosscoder, where: str) -> Inputs:
    """What a crosscoder reads, as a setting.

    Raises:
        UserError: it is neither of both models, nor of one, nor of their difference.
    """
    if not coder.view.is_identity and coder.view.reads == SOURCES:
        return DifferenceConfig()
    if coder.view.is_identity and sorted(coder.sources) == sorted(SOURCES):
        return PairedConfig()
    if len(coder.sources) == 1 and coder.sources[0] in SOURCES:
        return SingleConfig(source=coder.sources[0])
    raise UserError(
        f"{where} reads {len(coder.sources)} sources, {', '.join(coder.sources)}; a run has {' and '.join(SOURCES)}. Give a "
        "crosscoder of both or a coder of one, and say with sources which is which, in the file's order"
    )


def _check_kind(where: str, coder: Crosscoder, config: CrosscoderConfig) -> None:
    """Check that the settings of the run say what the file holds: the rest of the run is planned from them."""
    found: dict[str, Any] = {
        "inputs": inputs_of(coder, where).model_dump(),
        "n_latents": coder.n_latents,
        "sparsity": kind_of(coder),
    }
    kept = {key: value for key, value in config.sparsity.model_dump().items() if key in found["sparsity"]}
    said = {"inputs": config.inputs.model_dump(), "n_latents": config.latents_for(coder.d_model), "sparsity": kept}
    for key, value in found.items():
        if said[key] != value:
            raise UserError(f"{where} has {key} {value}, but the settings say {said[key]}; set {key} to {value}")


def kind_of(coder: Crosscoder) -> dict[str, Any]:
    """The kind of sparsity of a crosscoder, and its k if it has one: what files of every format tell."""
    return coder.sparsity.model_dump(include={"kind", "k"})


def _in_order(coder: Crosscoder) -> Crosscoder:
    """The same function with the base model first."""
    if coder.n_sources == 1 or coder.sources == SOURCES:
        return coder
    order = [coder.sources.index(source) for source in SOURCES]

    def reordered(columns: Tensor) -> Tensor:
        return columns.view(*columns.shape[:-1], coder.n_sources, coder.d_model)[..., order, :].flatten(-2).contiguous()

    return replace(
        coder,
        encoder=reordered(coder.encoder),
        decoder=reordered(coder.decoder),
        decoder_bias=reordered(coder.decoder_bias),
        mean=coder.mean[order],
        view=identity(SOURCES),
    )
