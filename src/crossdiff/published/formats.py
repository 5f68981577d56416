"""Coders that others have published, read into a `Crosscoder` that computes the same function.

Read are crosscoders of the paper's fork of `dictionary_learning` and of C. Kissane's replication, and SAEs on the residual
stream of SAELens, Gemma Scope, sparsify and `dictionary_learning` (`saes`). A format's reader returns the coder in its own
terms (`PublishedCoder`, float64). `PublishedCoder.crosscoder` then folds whatever ours has no place for into the weights,
exactly.

Some coders select latents by another measure than f_j sum_s ||d_j^s||. Those that compare it with a threshold become JumpReLU
with a threshold per latent, which is the same function. A TopK of another measure has no such form and is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crossdiff.crosscoder.checkpoint import is_own, read
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.published import WEIGHTS
from crossdiff.published.coder import PublishedCoder, ReLU, TensorFile, batch_topk, origin_of
from crossdiff.published.hookpoints import layer_after
from crossdiff.published.saes import read_sae
from crossdiff.published.settings import layer_of, number, read_settings
from crossdiff.shapes import Float64, Tensor
from crossdiff.sources import SOURCES

CODE_NORMALISATIONS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
"""The fork's `code_normalization_id`: what f_j is multiplied by before latents are selected. In order: sum_s ||d_j^s||; the
norm over all sources together; a weighted sum of these two; 1; each source's own norm, which selects latents per source."""
NORMALISATION_KEYS = ("target_rms", "activation_mean", "activation_std", "activation_global_scale")
FORK_EPSILON = 1e-8
"""The fork divides by (scale + this) on the way out."""


def read_published(
    path: Path, sources: tuple[str, ...] | None = None, input_scales: tuple[float, ...] | None = None
) -> Crosscoder:
    """Read a published coder. `sparsity.kind` and `origin["published"]` tell its architecture.

    The file holds only the function, not how it was trained. Settings such as mu have our defaults, and `origin` has what is
    known: "pair" is None, and "layer" is None unless a hook name or the trainer's config tells it. Before the coder is used on
    a store, set origin["pair"] and origin["layer"] to the store's, which asserts that it was trained on these models after this
    layer. "training_tokens" and "settings" stay None.

    Args:
        path: the folder as it was published, or a .pt, .npz or .safetensors file.
        sources: the sources' names in the file's order; default base, chat for two and base for one.
        input_scales: one number per source, for coders that were trained on activations multiplied by numbers that the file
            does not hold (Kissane's; SAELens' `expected_average_only_in`).

    Raises:
        UserError: a missing, damaged or unknown file, a missing or unknown key, a shape that does not fit, or a coder that
            has no exact form here.
    """
    file = _weights_file(path)
    tensors = TensorFile(file)
    if file.suffix == ".safetensors" and is_own(file):
        if sources is not None or input_scales is not None:
            raise UserError(f"{file} is a crosscoder of crossdiff, which stores its sources and scale; omit both options")
        return read(file)
    coder = read_coder(tensors)
    if input_scales is not None:
        coder = coder.with_input_scales(input_scales)
    if coder.needs_scales:
        raise UserError(
            f"{file} was trained on activations multiplied by a number that is not in its folder (normalize_activations "
            f"expected_average_only_in); give it as input_scales, sqrt({coder.mean.shape[1]}) / the activations' mean norm"
        )
    n_sources = len(coder.scale_in)
    if sources is None:
        sources = SOURCES[:n_sources] if n_sources <= 2 else tuple(f"source{index}" for index in range(n_sources))
    if len(sources) != n_sources or len(set(sources)) != n_sources:
        raise UserError(f"{file} reads {n_sources} sources, but the names are {sources}; give {n_sources} different names")
    return coder.crosscoder(sources)


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give the folder of a published coder, or its .pt, .npz or .safetensors file")
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    found = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
    raise UserError(f"{path} has no published coder: expected one of {', '.join(WEIGHTS)}, found {found}; or name the file")


def read_coder(tensors: TensorFile) -> PublishedCoder:
    """The coder in its own terms, in float64; the names of its weights tell the format."""
    for key, read_crosscoder in (("encoder.weight", _read_fork), ("W_enc", _read_kissane)):
        if tensors.has(key):
            return read_crosscoder(tensors) if tensors.n_axes(key) == 3 else read_sae(tensors)
    raise UserError(f"{tensors.path} is not in a known format: expected encoder.weight or W_enc, found {tensors.names()}")


# --- the fork of dictionary_learning, and Kissane's -----------------------------------------------------------------


def _read_fork(tensors: TensorFile) -> PublishedCoder:
    """CrossCoder and BatchTopKCrossCoder. Files without the newer keys have no normalisation and measure CROSSCODER."""
    encoder = tensors.take("encoder.weight", "source d_model latent")
    encoder_bias = tensors.take("encoder.bias", "latent")
    decoder = tensors.take("decoder.weight", "source latent d_model")
    decoder_bias = tensors.take("decoder.bias", "source d_model")
    config = _fork_config(tensors)
    measure = _code_normalisation(tensors, config)
    mean, scale_in, scale_out = _fork_normalisation(tensors)
    has_k = tensors.has("k") or tensors.has("threshold") or "k" in config or "BatchTopK" in str(config.get("dict_class"))
    activation = batch_topk(tensors, config, _measure(measure, decoder, config, tensors.path)) if has_k else ReLU()
    tensors.finish()
    architecture = f"{'BatchTopKCrossCoder' if has_k else 'CrossCoder'}, code normalisation {measure}"
    origin = origin_of(tensors, "dictionary_learning", architecture, layer_of(config))
    return PublishedCoder(
        tensors.path, encoder, encoder_bias, decoder, decoder_bias, mean, scale_in, scale_out, activation, origin
    )  # fmt: skip


def _fork_config(tensors: TensorFile) -> dict[str, Any]:
    """The constructor's arguments and the trainer's settings from the files beside the weights; both may be missing."""
    folder = tensors.path.parent
    merged: dict[str, Any] = {}
    for name in ("trainer_config.json", "config.json"):
        found = read_settings(folder / name) if (folder / name).is_file() else {}
        trainer = found.get("trainer")
        merged |= trainer if isinstance(trainer, dict) else found
    sizes = {"activation_dim": "d_model", "dict_size": "latent", "num_layers": "source", "num_decoder_layers": "source"}
    expected: dict[str, Any] = {key: tensors.sizes[axis] for key, axis in sizes.items()}
    expected |= {"encoder_layers": list(range(tensors.sizes["source"])), "latent_processor": None}
    for key, value in expected.items():
        if merged.get(key) not in (None, value):
            raise UserError(f"the settings beside {tensors.path} have {key} {merged[key]}, expected {value}")
    return merged


def _code_normalisation(tensors: TensorFile, config: dict[str, Any]) -> str:
    """The measure's name, from the weights or the settings; CROSSCODER, the fork's default, if neither has it."""
    names = CODE_NORMALISATIONS
    in_settings = config.get("code_normalization")
    name = str(in_settings).upper().removeprefix("CODENORMALIZATION.") if in_settings is not None else None
    if name not in (None, *names.values()):
        raise UserError(
            f"the settings beside {tensors.path} have code_normalization {in_settings}, "
            f"expected one of {', '.join(names.values())}"
        )
    if not tensors.has("code_normalization_id"):
        return name or "CROSSCODER"
    number = tensors.scalar("code_normalization_id")
    if number not in names:
        raise UserError(f"{tensors.path}: code_normalization_id is {number:g}, expected 1 to {len(names)}")
    in_weights = names[int(number)]
    if name not in (None, in_weights):
        raise UserError(f"{tensors.path} has the code normalisation {in_weights}, but the settings beside it have {name}")
    return in_weights


def _measure(name: str, decoder: Float64[Tensor, "source latent d_model"], config: dict[str, Any], path: Path) -> Tensor | None:
    """What f is multiplied by before the selection, `[latent]`; None if it differs between the sources."""
    together = decoder.norm(dim=(0, 2))
    each = decoder.norm(dim=2).sum(0)
    alpha_sae = number(config, "code_normalization_alpha_sae", 1.0, path)
    mixed = together * alpha_sae + each * number(config, "code_normalization_alpha_cc", 0.1, path)
    return {"CROSSCODER": each, "SAE": together, "MIXED": mixed, "NONE": torch.ones_like(each)}.get(name)


def _fork_normalisation(tensors: TensorFile) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `[source, d_model]` and the scales `[source]` in and out; the scale includes target_rms and the deviations."""
    n_sources, d_model = tensors.sizes["source"], tensors.sizes["d_model"]
    ones = torch.ones(n_sources, dtype=torch.float64)
    identity = torch.zeros(n_sources, d_model, dtype=torch.float64), ones, ones
    present = [key for key in NORMALISATION_KEYS if tensors.has(key)]
    if not present:
        return identity
    if len(present) < len(NORMALISATION_KEYS):
        missing = ", ".join(key for key in NORMALISATION_KEYS if key not in present)
        raise UserError(f"{tensors.path} has {', '.join(present)} but no {missing}; the four belong together")
    tensors.take("target_rms", "", finite=False)
    mean = tensors.take("activation_mean", "source d_model", finite=False)
    deviation = tensors.take("activation_std", "source d_model", finite=False)
    scale = tensors.take("activation_global_scale", "source", finite=False)
    if mean.isnan().all() or deviation.isnan().all():
        return identity
    usable = mean.isfinite().all() and deviation.isfinite().all() and scale.isfinite().all() and (scale > 0).all()
    if not usable:
        raise UserError(
            f"{tensors.path}: activation_mean and activation_std must be NaN throughout or finite, and activation_global_scale "
            f"positive; found {int(mean.isnan().sum())} and {int(deviation.isnan().sum())} NaN, scale {scale.tolist()}"
        )
    return mean, scale, 1 / (scale + FORK_EPSILON)


def _read_kissane(tensors: TensorFile) -> PublishedCoder:
    """ReLU, or BatchTopK in the variant that has k and threshold; the input scales are not in the file."""
    encoder = tensors.take("W_enc", "source d_model latent")
    decoder = tensors.take("W_dec", "latent source d_model").transpose(0, 1)
    encoder_bias = tensors.take("b_enc", "latent")
    decoder_bias = tensors.take("b_dec", "source d_model")
    has_k = tensors.has("k") or tensors.has("threshold")
    activation = batch_topk(tensors, {}, decoder.norm(dim=2).sum(0)) if has_k else ReLU()
    tensors.finish()
    beside = (tensors.path.with_name("cfg.json"), tensors.path.with_name(f"{tensors.path.stem}_cfg.json"))
    config: dict[str, Any] = next((read_settings(file) for file in beside if file.is_file()), {})
    origin = origin_of(
        tensors, "Kissane", "BatchTopK" if has_k else "ReLU", layer_after(tensors.path, config.get("hook_point"))
    )
    mean, ones = torch.zeros_like(decoder_bias), torch.ones(tensors.sizes["source"], dtype=torch.float64)
    return PublishedCoder(tensors.path, encoder, encoder_bias, decoder, decoder_bias, mean, ones, ones, activation, origin)
