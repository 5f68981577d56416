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

from crossdiff.activations.store import Store
from crossdiff.activations.transfer import CPU
from crossdiff.crosscoder.checkpoint import is_own, read
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.published import WEIGHTS
from crossdiff.published.coder import PublishedCoder, ReLU, TensorFile, batch_topk, no_normalisation, origin_of
from crossdiff.published.hookpoints import layer_after
from crossdiff.published.saes import read_sae
from crossdiff.published.settings import read_settings
from crossdiff.published.threshold import estimate_threshold
from crossdiff.published.trainer import read_crosscoder
from crossdiff.sources import SOURCES


def read_published(
    path: Path,
    sources: tuple[str, ...] | None = None,
    input_scales: tuple[float, ...] | None = None,
    estimate_threshold_on: Store | None = None,
    device: torch.device = CPU,
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
        estimate_threshold_on: a store of the coder's models, for a BatchTopK whose threshold was never set. It is read as a
            plain ReLU without this, as its own class reads it, and is much denser than it was in training.
        device: where the threshold is estimated.

    Raises:
        UserError: a missing, damaged or unknown file, a missing or unknown key, a shape that does not fit, or a coder that
            has no exact form here.
    """
    file = _weights_file(path)
    tensors = TensorFile(file)
    if file.suffix == ".safetensors" and is_own(file):
        if any(option is not None for option in (sources, input_scales, estimate_threshold_on)):
            raise UserError(
                f"{file} is a crosscoder of crossdiff, which stores its sources, scale and threshold; omit the options"
            )
        return read(file)
    coder = read_coder(tensors)
    if input_scales is not None:
        coder = coder.with_input_scales(input_scales)
    if coder.needs_scales:
        raise UserError(
            f"{file} was trained on activations multiplied by a number that is not in its folder (normalize_activations "
            f"expected_average_only_in); give it as input_scales, sqrt({coder.decoder_bias.shape[1]}) / the activations' "
            "mean norm"
        )
    n_sources = coder.n_sources
    if sources is None:
        sources = SOURCES[:n_sources] if n_sources <= 2 else tuple(f"source{index}" for index in range(n_sources))
    if len(sources) != n_sources or len(set(sources)) != n_sources:
        raise UserError(f"{file} reads {n_sources} sources, but the names are {sources}; give {n_sources} different names")
    if estimate_threshold_on is not None:
        coder = coder.with_threshold(estimate_threshold(coder, sources, estimate_threshold_on, device))
    return coder.crosscoder(sources)


def find_store(path: Path) -> Path:
    """The folder of a store: the path itself, or the activations of a run."""
    return path / "activations" if (path / "activations").is_dir() else path


def notes_on(published: dict[str, Any]) -> list[str]:
    """What to know about a coder that was read, from `origin["published"]`."""
    notes = []
    if published.get("threshold") == "never set":
        notes.append(
            f"its threshold was never set, so it is read as its own class acts, a plain ReLU, which is denser than its k "
            f"{published['k']}; --estimate-threshold STORE sets one"
        )
    if "estimated_threshold" in published:
        notes.append(f"its threshold was never set; {published['estimated_threshold']:.6g} was estimated in its own measure")
    if "mu" in published:
        notes.append(
            f"it was trained with l1_penalty {published['l1_penalty']:g} {'and' if published['use_mse_loss'] else 'without'} "
            f"use_mse_loss; on the same inputs, that is mu {published['mu']:g} with reconstruction "
            f"{published['reconstruction']} here"
        )
    if str(published.get("normalisation")).startswith("a scale per"):
        notes.append(
            f"it normalises with {published['normalisation']}, which is folded into its weights: v, directions, delta_norm and "
            "betas are those of the models' space, and differ from tables in its own"
        )
    return notes


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
    for key, read_one in (("encoder.weight", read_crosscoder), ("W_enc", _read_kissane)):
        if tensors.has(key):
            return read_one(tensors) if tensors.n_axes(key) == 3 else read_sae(tensors)
    raise UserError(f"{tensors.path} is not in a known format: expected encoder.weight or W_enc, found {tensors.names()}")


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
    normalisation = no_normalisation(*decoder_bias.shape)
    return PublishedCoder(tensors.path, encoder, encoder_bias, decoder, decoder_bias, normalisation, activation, origin)
