"""Coders that others have published, read into a `Crosscoder` that computes the same function.

Three formats are read: crosscoders of the paper's fork of `dictionary_learning`, crosscoders of C. Kissane's replication, and
SAEs in SAELens' folders. A format's reader returns the coder in its own terms (`PublishedCoder`, float64).
`PublishedCoder.crosscoder` then folds whatever ours has no place for into the weights, exactly.

Some coders select latents by another measure than f_j sum_s ||d_j^s||. Those that compare it with a threshold become JumpReLU
with a threshold per latent, which is the same function. A TopK of another measure has no such form and is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from crossdiff.crosscoder.checkpoint import is_own, read
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.files import read_json
from crossdiff.published import WEIGHTS
from crossdiff.published.coder import JumpReLU, PublishedCoder, ReLU, TensorFile, TopK
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
        path: the folder as it was published, or a .pt or .safetensors file.
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
        raise UserError(f"{path} does not exist; give the folder of a published coder, or its .pt or .safetensors file")
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    found = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
    raise UserError(f"{path} has no published coder: expected one of {', '.join(WEIGHTS)}, found {found}; or name the file")


def read_coder(tensors: TensorFile) -> PublishedCoder:
    """The coder in its own terms, in float64; the names of its weights tell the format."""
    if tensors.has("encoder.weight"):
        return _read_fork(tensors)
    if tensors.has("W_enc"):
        return _read_kissane(tensors) if tensors.n_axes("W_enc") == 3 else _read_saelens(tensors)
    raise UserError(f"{tensors.path} is not in a known format: expected encoder.weight or W_enc, found {tensors.names()}")


def _origin(tensors: TensorFile, format_name: str, architecture: str, layer: int | None) -> dict[str, Any]:
    published = {"format": format_name, "architecture": architecture, "path": str(tensors.path)}
    return {"pair": None, "layer": layer, "settings": None, "training_tokens": None, "published": published}


def _whole(tensors: TensorFile, value: Any, key: str) -> int:
    if not isinstance(value, int | float) or isinstance(value, bool) or value != round(value) or value < 1:
        raise UserError(f"{tensors.path}: {key} is {value}, expected a whole number of at least 1")
    if value > tensors.sizes["latent"]:
        raise UserError(f"{tensors.path}: {key} is {value:g}, more than its {tensors.sizes['latent']} latents")
    return round(value)


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
    batch_topk = tensors.has("k") or tensors.has("threshold") or "k" in config or "BatchTopK" in str(config.get("dict_class"))
    activation = _batch_topk(tensors, config, _measure(measure, decoder, config)) if batch_topk else ReLU()
    tensors.finish()
    architecture = f"{'BatchTopKCrossCoder' if batch_topk else 'CrossCoder'}, code normalisation {measure}"
    layer = config.get("layer")
    origin = _origin(tensors, "dictionary_learning", architecture, layer if isinstance(layer, int) else None)
    return PublishedCoder(
        tensors.path, encoder, encoder_bias, decoder, decoder_bias, mean, scale_in, scale_out, activation, origin
    )  # fmt: skip


def _fork_config(tensors: TensorFile) -> dict[str, Any]:
    """The constructor's arguments and the trainer's settings from the files beside the weights; both may be missing."""
    folder = tensors.path.parent
    merged: dict[str, Any] = {}
    for name in ("trainer_config.json", "config.json"):
        found = read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(found, dict):
            raise UserError(f"{folder / name} must hold settings by name, found {type(found).__name__}; download it again")
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


def _measure(name: str, decoder: Float64[Tensor, "source latent d_model"], config: dict[str, Any]) -> Tensor | None:
    """What f is multiplied by before the selection, `[latent]`; None if it differs between the sources."""
    together = decoder.norm(dim=(0, 2))
    each = decoder.norm(dim=2).sum(0)
    alpha_sae, alpha_cc = (config.get(f"code_normalization_alpha_{name}") for name in ("sae", "cc"))
    mixed = together * (1.0 if alpha_sae is None else alpha_sae) + each * (0.1 if alpha_cc is None else alpha_cc)
    return {"CROSSCODER": each, "SAE": together, "MIXED": mixed, "NONE": torch.ones_like(each)}.get(name)


def _batch_topk(tensors: TensorFile, config: dict[str, Any], weight: Tensor | None) -> TopK:
    """k and threshold; a negative threshold means that the training had not set it yet."""
    if weight is None:
        raise UserError(
            f"{tensors.path} has the code normalisation DECOUPLED: its latents are active in each source separately, "
            "but a crosscoder has one code for all sources; it cannot be read"
        )
    if not tensors.has("k") and "k" not in config:
        raise UserError(f"{tensors.path} is a BatchTopK crosscoder and has no k; it cannot be read")
    k = tensors.scalar("k") if tensors.has("k") else config["k"]
    threshold = tensors.scalar("threshold") if tensors.has("threshold") else -1.0
    return TopK(_whole(tensors, k, "k"), threshold if threshold >= 0 else None, weight)


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
    batch_topk = tensors.has("k") or tensors.has("threshold")
    activation = _batch_topk(tensors, {}, decoder.norm(dim=2).sum(0)) if batch_topk else ReLU()
    tensors.finish()
    beside = (tensors.path.with_name("cfg.json"), tensors.path.with_name(f"{tensors.path.stem}_cfg.json"))
    config: dict[str, Any] = next((read_json(file) for file in beside if file.is_file()), {})
    origin = _origin(tensors, "Kissane", "BatchTopK" if batch_topk else "ReLU", _layer_of(str(config.get("hook_point"))))
    mean, ones = torch.zeros_like(decoder_bias), torch.ones(tensors.sizes["source"], dtype=torch.float64)
    return PublishedCoder(tensors.path, encoder, encoder_bias, decoder, decoder_bias, mean, ones, ones, activation, origin)


def _layer_of(hook: str) -> int | None:
    """The decoder layer after which a TransformerLens hook reads the residual stream."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)
    if found is None:
        return None
    layer = int(found[1]) - (found[2] == "pre")
    return layer if layer >= 0 else None


# --- SAELens --------------------------------------------------------------------------------------------------------


def _read_saelens(tensors: TensorFile) -> PublishedCoder:
    """standard, jumprelu, topk, and batchtopk as a training checkpoint (SAELens publishes it as jumprelu)."""
    config = read_json(tensors.path.with_name("cfg.json"))
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
    metadata = config.get("metadata") or {}
    hook = metadata.get("hook_name", config.get("hook_name", config.get("hook_point")))
    trained = metadata.get("training_architecture")
    architecture = _saelens_architecture(config) + (f", trained as {trained}" if trained else "")
    one = torch.ones(1, dtype=torch.float64)
    return PublishedCoder(
        tensors.path, encoder[None], encoder_bias, decoder[None], decoder_bias[None], torch.zeros_like(decoder_bias[None]),
        scale_in=one, scale_out=one, activation=activation,
        origin=_origin(tensors, "SAELens", architecture, _layer_of(str(hook))),
        needs_scales=config.get("normalize_activations") in (True, "expected_average_only_in"),
    )  # fmt: skip


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
    hook = str((config.get("metadata") or config).get("hook_name"))
    if config.get("reshape_activations", "none") != "none" or hook.endswith("hook_z"):
        raise UserError(f"{tensors.path} reads attention heads ({hook}); expected an SAE on the residual stream")


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
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    rescaled = config.get("rescale_acts_by_decoder_norm", architecture == "batchtopk")
    threshold = tensors.scalar("topk_threshold") if architecture == "batchtopk" else 0.0  # 0 before the first step
    if threshold > 0 and isinstance(k, float):
        k = max(1, round(k))  # a mean over tokens; the threshold replaces it
    return TopK(_whole(tensors, k, "k"), threshold or None, norms if rescaled else torch.ones_like(norms))


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
