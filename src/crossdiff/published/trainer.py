"""What the paper's authors' trainer, a fork of `dictionary_learning`, writes: crosscoders and SAEs in each of its versions.

Its normalisation changed over time. Read are, by the tensors that are there:

    activation_mean, activation_std                     x = (h - mean) / (std + epsilon), neuron by neuron
    activation_normalizer.mean, .std                    the same, in an earlier spelling
    activation_global_scale, of no axis                 x = h * scale, or (h - mean) * scale with an activation_mean
    activation_global_scale, one number per source      the same with a scale per source

The trainer normalises only if neither mean nor deviation is NaN; both are NaN throughout where none was set.
"""

from __future__ import annotations

from typing import Any

import torch

from crossdiff.errors import UserError
from crossdiff.published.coder import (
    Activation,
    Normalisation,
    PublishedCoder,
    ReLU,
    TensorFile,
    TopK,
    UnsetThreshold,
    batch_topk,
    no_normalisation,
    origin_of,
)
from crossdiff.published.hookpoints import layer_after
from crossdiff.published.settings import group, layer_of, number, read_settings
from crossdiff.shapes import Float64, Tensor

CODE_NORMALISATIONS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
"""The trainer's `code_normalization_id`: what f_j is multiplied by before latents are selected. In order: sum_s ||d_j^s||; the
norm over all sources together; a weighted sum of these two; 1; each source's own norm, which selects latents per source."""
SPELLINGS = ("code_normalization", "sparsity_loss_type")
"""Settings that name it; before May 2025 it was called the type of the sparsity loss. Either has weights for MIXED."""
EPSILON = 1e-8
"""The trainer divides by (scale + this) on the way out, and by (std + this) on the way in."""
SETTINGS = ("trainer_config.json", "config.json")
SAES = ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE")
NAMES = {"std": "activation_std", "mean": "activation_mean", "scale": "activation_global_scale", "rms": "target_rms"}


def read_crosscoder(tensors: TensorFile) -> PublishedCoder:
    """CrossCoder and BatchTopKCrossCoder. Files without the newer keys have no normalisation and measure CROSSCODER."""
    encoder = tensors.take("encoder.weight", "source d_model latent")
    encoder_bias = tensors.take("encoder.bias", "latent")
    decoder = tensors.take("decoder.weight", "source latent d_model")
    decoder_bias = tensors.take("decoder.bias", "source d_model")
    config = _settings(tensors)
    _check_sizes(tensors, config)
    measure = _code_normalisation(tensors, config)
    normalisation = _normalisation(tensors, "source d_model")
    has_k = tensors.has("k") or tensors.has("threshold") or "k" in config or "BatchTopK" in str(config.get("dict_class"))
    activation: Activation = ReLU()
    if has_k:
        activation = batch_topk(tensors, config, _measure(measure, decoder, config, tensors))
    tensors.finish()
    architecture = f"{'BatchTopKCrossCoder' if has_k else 'CrossCoder'}, code normalisation {measure}"
    origin = _origin(tensors, architecture, layer_of(config), activation)
    if not has_k and measure == "CROSSCODER":
        origin["published"] |= _training(tensors, config)
    return PublishedCoder(tensors.path, encoder, encoder_bias, decoder, decoder_bias, normalisation, activation, origin)


def read_sae(tensors: TensorFile) -> PublishedCoder:
    """AutoEncoder, AutoEncoderTopK and BatchTopKSAE, of the trainer and of the original `dictionary_learning`."""
    config = _settings(tensors)
    kind, where = _sae_class(tensors, config), config.get("submodule_name")
    encoder = tensors.take("encoder.weight", "latent d_model").T
    encoder_bias = tensors.take("encoder.bias", "latent")
    decoder = tensors.take("decoder.weight", "d_model latent").T
    decoder_bias = tensors.take("bias" if kind == "AutoEncoder" else "b_dec", "d_model")
    _check_sizes(tensors, config)
    normalisation = _normalisation(tensors, "d_model")
    activation: Activation = ReLU()
    if kind != "AutoEncoder":
        activation = batch_topk(tensors, config, torch.ones_like(encoder_bias))
    if kind == "AutoEncoderTopK":
        assert isinstance(activation, TopK | UnsetThreshold)
        activation = TopK(activation.k, None, activation.weight)  # its forward pass uses no threshold
    tensors.finish()
    layer = layer_of(config) if where is None else layer_after(tensors.path, where)
    encoder_bias = encoder_bias - decoder_bias @ encoder
    origin = _origin(tensors, str(kind), layer, activation)
    return PublishedCoder(
        tensors.path, encoder[None], encoder_bias, decoder[None], decoder_bias[None], normalisation, activation, origin
    )  # fmt: skip


def _origin(tensors: TensorFile, architecture: str, layer: int | None, activation: Activation) -> dict[str, Any]:
    origin = origin_of(tensors, "dictionary_learning", architecture, layer)
    if isinstance(activation, UnsetThreshold):
        origin["published"] |= {"threshold": "never set", "k": activation.k}
    return origin


def _training(tensors: TensorFile, config: dict[str, Any]) -> dict[str, Any]:
    """The loss of an L1 training in our terms, on inputs that are normalised as in the file; empty if the settings lack it.

    `use_mse_loss` averages the squared error over tokens and sources, of which `squared` takes the sum over sources: its
    l1_penalty weighs as much as a mu that is larger by their number. Without it, the loss is our `norm`.
    """
    squared = config.get("use_mse_loss")
    if config.get("l1_penalty") is None or squared is None:
        return {}
    if not isinstance(squared, bool):
        raise UserError(f"the settings beside {tensors.path} have use_mse_loss {squared!r}, expected true or false")
    penalty = number(config, "l1_penalty", 0.0, tensors.path)
    mu = penalty * tensors.sizes["source"] if squared else penalty
    kind = "squared" if squared else "norm"
    return {"l1_penalty": penalty, "use_mse_loss": squared, "reconstruction": kind, "mu": mu}


# --- settings -------------------------------------------------------------------------------------------------------


def _settings(tensors: TensorFile) -> dict[str, Any]:
    """The constructor's arguments and the trainer's settings from the files beside the weights; both may be missing."""
    merged: dict[str, Any] = {}
    for name in SETTINGS:
        path = tensors.path.with_name(name)
        found = read_settings(path) if path.is_file() else {}
        merged |= group(found, "trainer", tensors.path) if "trainer" in found else found
    return merged


def _check_sizes(tensors: TensorFile, config: dict[str, Any]) -> None:
    """Refuse settings that contradict the weights, or that ask for more than the weights compute."""
    sizes = {"activation_dim": "d_model", "dict_size": "latent", "num_layers": "source", "num_decoder_layers": "source"}
    expected: dict[str, Any] = {key: tensors.sizes[axis] for key, axis in sizes.items() if axis in tensors.sizes}
    expected |= {"encoder_layers": list(range(tensors.sizes.get("source", 1))), "latent_processor": None}
    for key, value in expected.items():
        if config.get(key) not in (None, value):
            raise UserError(f"the settings beside {tensors.path} have {key} {config[key]}, expected {value}")


def _sae_class(tensors: TensorFile, config: dict[str, Any]) -> str:
    """The class of an SAE, from its settings. The trainer's Hub layout lacked it at first; there, normalisation tells it."""
    kind = config.get("dict_class")
    if kind is None and tensors.has("threshold") and tensors.has(NAMES["mean"]):
        return "BatchTopKSAE"
    if not any(tensors.path.with_name(name).is_file() for name in SETTINGS):
        raise UserError(
            f"{tensors.path} looks like an SAE of dictionary_learning, which needs config.json beside it; download it, too"
        )
    if kind not in SAES:
        raise UserError(
            f"{tensors.path} has the dict_class {kind} in its config.json; only AutoEncoder, AutoEncoderTopK and BatchTopKSAE "
            "can be read"
        )
    return str(kind)


def _code_normalisation(tensors: TensorFile, config: dict[str, Any]) -> str:
    """The measure's name, from the weights or the settings; CROSSCODER, the trainer's default, if neither has it."""
    names, found = CODE_NORMALISATIONS, dict[str, str]()
    for key in SPELLINGS:
        if config.get(key) is not None:
            found[key] = str(config[key]).upper().removeprefix("CODENORMALIZATION.").removeprefix("LOSSTYPE.")
            if found[key] not in names.values():
                raise UserError(
                    f"the settings beside {tensors.path} have {key} {config[key]}, expected one of {', '.join(names.values())}"
                )
    if len(set(found.values())) > 1:
        both = " and ".join(f"{key} {name}" for key, name in found.items())
        raise UserError(f"the settings beside {tensors.path} have both {both}; it is unclear which applies")
    name = next(iter(found.values()), None)
    if not tensors.has("code_normalization_id"):
        return name or "CROSSCODER"
    identifier = tensors.scalar("code_normalization_id")
    if identifier not in names:
        raise UserError(f"{tensors.path}: code_normalization_id is {identifier:g}, expected 1 to {len(names)}")
    in_weights = names[int(identifier)]
    if name not in (None, in_weights):
        raise UserError(f"{tensors.path} has the code normalisation {in_weights}, but the settings beside it have {name}")
    return in_weights


def _measure(
    name: str, decoder: Float64[Tensor, "source latent d_model"], config: dict[str, Any], tensors: TensorFile
) -> Tensor | None:
    """What f is multiplied by before the selection, `[latent]`; None if it differs between the sources."""
    together = decoder.norm(dim=(0, 2))
    each = decoder.norm(dim=2).sum(0)
    alphas = {"sae": 1.0, "cc": 0.1}  # the trainer's defaults
    for part in alphas:
        for key in SPELLINGS:
            alphas[part] = number(config, f"{key.removesuffix('_type')}_alpha_{part}", alphas[part], tensors.path)
    mixed = together * alphas["sae"] + each * alphas["cc"]
    return {"CROSSCODER": each, "SAE": together, "MIXED": mixed, "NONE": torch.ones_like(each)}.get(name)


# --- normalisation --------------------------------------------------------------------------------------------------


def _normalisation(tensors: TensorFile, axes: str) -> Normalisation:
    """The normalisation of a crosscoder, whose axes are `source d_model`, or of an SAE, which has no sources."""
    present = {short for short, name in NAMES.items() if tensors.has(name)}
    mean, std = (
        tensors.take(NAMES[short], axes, finite=False) if short in present
        else tensors.take_copies(f"activation_normalizer.{short}", axes)
        for short in ("mean", "std")
    )  # fmt: skip
    if "rms" in present:
        tensors.take(NAMES["rms"], "", finite=False)
    scale = None
    if "scale" in present:
        per_source = tensors.n_axes(NAMES["scale"]) == 1 and axes != "d_model"
        scale = tensors.take(NAMES["scale"], "source" if per_source else "", finite=False)
    if not present and mean is None and std is None:
        return no_normalisation(tensors.sizes.get("source", 1), tensors.sizes["d_model"])
    return _normalisation_of(tensors, mean, std, scale)


def _normalisation_of(tensors: TensorFile, mean: Tensor | None, std: Tensor | None, scale: Tensor | None) -> Normalisation:
    n_sources, d_model = tensors.sizes.get("source", 1), tensors.sizes["d_model"]
    if (std is not None and mean is None) or (scale is None and (mean is None or std is None)):
        parts = (("activation_mean", mean), ("activation_std", std), ("activation_global_scale", scale))
        found = ", ".join(name for name, part in parts if part is not None) or "target_rms"
        raise UserError(
            f"{tensors.path} has {found} alone, which does not define a normalisation; expected activation_global_scale, with "
            "or without activation_mean, or activation_mean and activation_std"
        )
    if any(part is not None and bool(part.isnan().all()) for part in (mean, std)):
        return no_normalisation(n_sources, d_model)
    _check_usable(tensors, mean, std, scale)
    center = torch.zeros(n_sources, d_model, dtype=torch.float64) if mean is None else mean.view(n_sources, d_model)
    if scale is None:
        assert std is not None
        deviation = std.view(n_sources, d_model) + EPSILON
        return Normalisation(center, 1 / deviation, deviation)
    factor = scale.reshape(-1, 1).expand(n_sources, 1)
    return Normalisation(center, factor, 1 / (factor + EPSILON))


def _check_usable(tensors: TensorFile, mean: Tensor | None, std: Tensor | None, scale: Tensor | None) -> None:
    parts = [part for part in (mean, std, scale) if part is not None]
    positive = std if scale is None else scale
    assert positive is not None
    if all(bool(part.isfinite().all()) for part in parts) and bool(
        (positive > 0 if scale is not None else positive >= 0).all()
    ):
        return
    n_nan = ", ".join(str(int(part.isnan().sum())) for part in parts)
    raise UserError(
        f"{tensors.path}: activation_mean and activation_std must be NaN throughout or finite, activation_std not negative, "
        f"and activation_global_scale positive; found {n_nan} NaN, and a smallest scale of {float(positive.min()):g}"
    )
