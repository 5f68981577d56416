"""SAEs that others have published: SAELens, Gemma Scope, sparsify and dictionary_learning, see `formats`."""

from __future__ import annotations

import re
from typing import Any

import torch

from crossdiff.errors import UserError
from crossdiff.published.coder import JumpReLU, PublishedCoder, ReLU, TensorFile, TopK, no_normalisation, origin_of
from crossdiff.published.hookpoints import hookpoint_of_scope, layer_after
from crossdiff.published.settings import group, read_settings
from crossdiff.published.trainer import read_sae as read_trained_sae
from crossdiff.shapes import Float64, Tensor


def read_sae(tensors: TensorFile) -> PublishedCoder:
    """The SAE in its own terms; the names of its weights tell the format."""
    if tensors.has("W_enc"):
        return _read_gemma_scope(tensors) if tensors.path.suffix == ".npz" else read_saelens(tensors)
    return _read_sparsify(tensors) if tensors.has("W_dec") else read_trained_sae(tensors)


def _sae(
    tensors: TensorFile,
    encoder: Float64[Tensor, "d_model latent"],
    encoder_bias: Float64[Tensor, " latent"],
    decoder: Float64[Tensor, "latent d_model"],
    decoder_bias: Float64[Tensor, " d_model"],
    activation: ReLU | TopK | JumpReLU,
    origin: dict[str, Any],
    needs_scales: bool = False,
) -> PublishedCoder:
    """A coder with one source and without normalisation."""
    return PublishedCoder(
        tensors.path, encoder[None], encoder_bias, decoder[None], decoder_bias[None], no_normalisation(1, len(decoder_bias)),
        activation, origin, needs_scales,
    )  # fmt: skip


def _settings(tensors: TensorFile, format_name: str, file: str) -> dict[str, Any]:
    path = tensors.path.with_name(file)
    if not path.is_file():
        raise UserError(f"{tensors.path} looks like an SAE of {format_name}, which needs {file} beside it; download it, too")
    return read_settings(path)


def _read_gemma_scope(tensors: TensorFile) -> PublishedCoder:
    """JumpReLU, whose encoder reads the activation itself (Lieberum et al. 2024)."""
    encoder = tensors.take("W_enc", "d_model latent")
    decoder = tensors.take("W_dec", "latent d_model")
    encoder_bias = tensors.take("b_enc", "latent")
    decoder_bias = tensors.take("b_dec", "d_model")
    activation = JumpReLU(tensors.take("threshold", "latent").clamp(min=0))
    tensors.finish()
    layer = layer_after(tensors.path, hookpoint_of_scope(tensors.path))
    origin = origin_of(tensors, "Gemma Scope", "jumprelu", layer)
    return _sae(tensors, encoder, encoder_bias, decoder, decoder_bias, activation, origin)


def _read_sparsify(tensors: TensorFile) -> PublishedCoder:
    """TopK of the pre-activations; the folder is named after the hookpoint."""
    config = _settings(tensors, "sparsify", "cfg.json")
    encoder = tensors.take("encoder.weight", "latent d_model").T
    encoder_bias = tensors.take("encoder.bias", "latent")
    decoder = tensors.take("W_dec", "latent d_model")
    decoder_bias = tensors.take("b_dec", "d_model")
    tensors.finish()
    for key, expected in (("signed", False), ("transcode", False), ("skip_connection", False), ("activation", "topk")):
        if config.get(key, expected) != expected:
            raise UserError(f"{tensors.path}: {key} is {config[key]} in its cfg.json; only {expected} can be read")
    activation = TopK(tensors.whole(config.get("k"), "k"), None, torch.ones_like(encoder_bias))
    folder = tensors.path.resolve().parent.name
    layer = layer_after(tensors.path, folder if re.match(r"(layers|h)\.\d", folder) else None)
    encoder_bias = encoder_bias - decoder_bias @ encoder
    origin = origin_of(tensors, "sparsify", "topk", layer)
    return _sae(tensors, encoder, encoder_bias, decoder, decoder_bias, activation, origin)


# --- SAELens --------------------------------------------------------------------------------------------------------


def read_saelens(tensors: TensorFile) -> PublishedCoder:
    """standard, jumprelu, topk, and batchtopk as a training checkpoint (SAELens publishes it as jumprelu)."""
    config = _settings(tensors, "SAELens", "cfg.json")
    encoder = tensors.take("W_enc", "d_model latent")
    decoder = tensors.take("W_dec", "latent d_model")
    encoder_bias = tensors.take("b_enc", "latent")
    decoder_bias = tensors.take("b_dec", "d_model")
    _check_saelens(tensors, config)
    activation = _saelens_activation(tensors, config, decoder.norm(dim=1))
    decoder = decoder * _finetuning_factor(tensors, config).unsqueeze(1)
    tensors.finish()
    if config.get("apply_b_dec_to_input", True):
        encoder_bias = encoder_bias - decoder_bias @ encoder
    metadata = group(config, "metadata", tensors.path)
    hook = metadata.get("hook_name", config.get("hook_name", config.get("hook_point")))
    trained = metadata.get("training_architecture")
    architecture = _saelens_architecture(config) + (f", trained as {trained}" if trained else "")
    origin = origin_of(tensors, "SAELens", architecture, layer_after(tensors.path, hook))
    needs_scales = config.get("normalize_activations") in (True, "expected_average_only_in")
    return _sae(tensors, encoder, encoder_bias, decoder, decoder_bias, activation, origin, needs_scales)


def _check_saelens(tensors: TensorFile, config: dict[str, Any]) -> None:
    """Refuse what is not a fixed linear map of the residual stream, and sizes that differ from the weights'."""
    for key, axis in (("d_in", "d_model"), ("d_sae", "latent")):
        if config.get(key, tensors.sizes[axis]) != tensors.sizes[axis]:
            raise UserError(f"{tensors.path} has {axis} {tensors.sizes[axis]}, but its cfg.json has {key} {config[key]}")
    if (found := config.get("normalize_activations")) not in (None, False, True, "none", "expected_average_only_in"):
        raise UserError(
            f"{tensors.path}: normalize_activations is {found!r}, which depends on each token; "
            "expected none or expected_average_only_in"
        )
    if config.get("reshape_activations", "none") != "none":
        raise UserError(f"{tensors.path} reads attention heads; expected an SAE on the residual stream")


def _saelens_architecture(config: dict[str, Any]) -> str:
    """What it computes; before version 6, a TopK SAE could be `standard` with another activation function."""
    architecture = str(config.get("architecture", "standard"))
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    return str(function) if architecture == "standard" and function != "relu" else architecture


def _saelens_activation(
    tensors: TensorFile, config: dict[str, Any], norms: Float64[Tensor, " latent"]
) -> ReLU | TopK | JumpReLU:
    architecture = _saelens_architecture(config)
    if architecture == "standard":
        return ReLU()
    if architecture == "jumprelu":
        if tensors.has("log_threshold"):
            return JumpReLU(tensors.take("log_threshold", "latent").exp())
        return JumpReLU(tensors.take("threshold", "latent").clamp(min=0))
    if architecture not in ("topk", "batchtopk"):
        raise UserError(
            f"{tensors.path} has the architecture {architecture}; only standard, jumprelu, topk and batchtopk can be read"
        )
    k = config.get("k", group(config, "activation_fn_kwargs", tensors.path).get("k"))
    rescaled = config.get("rescale_acts_by_decoder_norm", architecture == "batchtopk")
    threshold = tensors.scalar("topk_threshold") if architecture == "batchtopk" else 0.0  # 0 before the first step
    if threshold > 0 and isinstance(k, float):
        k = max(1, round(k))  # a mean over tokens; the threshold replaces it
    return TopK(tensors.whole(k, "k"), threshold or None, norms if rescaled else torch.ones_like(norms))


def _finetuning_factor(tensors: TensorFile, config: dict[str, Any]) -> Float64[Tensor, " latent"]:
    """What f is multiplied by before decoding, in SAEs that were fine-tuned this way before version 6."""
    keys = [key for key in ("finetuning_scaling_factor", "scaling_factor") if tensors.has(key)]
    ones = torch.ones(tensors.sizes["latent"], dtype=torch.float64)
    factor = tensors.take(keys[0], "latent") if keys else ones
    if bool(config.get("finetuning_scaling_factor")) != bool(keys) and not torch.equal(factor, ones):
        raise UserError(
            f"{tensors.path} has {keys[0]}, but its cfg.json does not have finetuning_scaling_factor: true; "
            "it is unclear whether the factors apply"
        )
    return factor
