"""Crosscoders trained here in the layouts of others, which `formats` reads again: `crossdiff export RUN --format`.

    dictionary_learning     the Hub layout of the paper's fork: CrossCoder, BatchTopKCrossCoder, AutoEncoder, BatchTopKSAE
    saelens                 SAELens 6: standard, topk, jumprelu

The fork's crosscoders have a place for everything that ours compute with, so their weights are written as they are. SAEs have
none for a normalisation: x = (h - mean) * scale is folded into their weights in float64, so that the pre-activations and the
reconstruction are the same functions of h.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from crossdiff.config import BatchTopKConfig, JumpReLUConfig, L1Config, TopKConfig
from crossdiff.crosscoder.checkpoint import save
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.diff import open as open_run
from crossdiff.errors import UserError
from crossdiff.files import explain_disk_error, replacing, write_json
from crossdiff.published.coder import constant_factor
from crossdiff.shapes import Float64, Tensor

LARGEST = torch.finfo(torch.float32).max
"""Threshold of a latent that is never active: readers refuse infinite ones."""
INSTEAD = "`crossdiff push` publishes it in crossdiff's own format"


def export_crosscoder(run: Path, name: str | None, layout: str, folder: Path) -> tuple[str, str]:
    """Write a crosscoder of a run into a new or empty folder, which appears when it is complete.

    Args:
        name: which crosscoder; default: as for `crossdiff.open`.
        layout: one of `published.LAYOUTS`.

    Returns:
        The crosscoder's name, and the Python expression that reads the folder with the other library.

    Raises:
        UserError: the layout cannot hold the crosscoder, or the folder is in use or cannot be written.
    """
    _check_folder(folder)
    opened = open_run(run, name)
    crosscoder, name = opened.crosscoder, opened.name
    _check_fits(crosscoder, name, layout)
    batch = "BatchTopK" if isinstance(crosscoder.sparsity, BatchTopKConfig) else ""
    files, reading = None, f"{batch}CrossCoder.from_pretrained({str(folder)!r}, from_hub=True)"
    if layout == "saelens":
        files, reading = _saelens(crosscoder, name), f"SAE.load_from_disk({str(folder)!r})"
    elif crosscoder.n_sources == 1:
        kind = f"{batch}SAE" if batch else "AutoEncoder"
        files, reading = _trainers_sae(crosscoder, name, kind), f"{kind}.from_pretrained({str(folder)!r}, from_hub=True)"
    try:
        with _appearing(folder.resolve()) as partial:
            save(crosscoder, partial) if files is None else files.write(partial)
    except (OSError, SafetensorError) as error:
        raise explain_disk_error(error, folder) or UserError(
            f"cannot write {folder}: {error}; choose another folder with -o"
        ) from None
    return name, reading


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name another folder with -o")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"the folder {folder} is not empty; name another one with -o")


def _check_fits(crosscoder: Crosscoder, name: str, layout: str) -> None:
    """Refuse what the other library cannot compute, or would compute differently, with what to use instead."""
    if not crosscoder.view.is_identity:
        raise UserError(
            f"{name} reads the difference of two models, which {layout} has no setting for: its files would pass for a coder "
            f"of one model's activations; {INSTEAD}"
        )
    has_class = isinstance(crosscoder.sparsity, L1Config | BatchTopKConfig)
    kind, n_sources = crosscoder.sparsity.kind, crosscoder.n_sources
    if layout == "saelens" and n_sources > 1:
        other = "use --format dictionary_learning" if has_class else INSTEAD
        raise UserError(
            f"{name} reads {n_sources} models, {' and '.join(crosscoder.sources)}, but an SAE of SAELens reads one; {other}, "
            "or name a coder of one model with --crosscoder"
        )
    if layout == "dictionary_learning" and not has_class:
        raise UserError(
            f"{name} has the sparsity {kind}, for which the paper's fork of dictionary_learning has no class; expected l1 or "
            f"batchtopk; {INSTEAD if n_sources > 1 else 'use --format saelens'}"
        )


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder`, which becomes `folder` at the end of the block; after an error it is deleted."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class _Files:
    """The files of a coder: its tensors, those in float64 rounded to float32, and its settings by the file's name."""

    weights: str
    tensors: dict[str, Tensor]
    settings: dict[str, dict[str, Any]]

    def check(self, name: str) -> _Files:
        for key, tensor in self.tensors.items():
            if not bool(tensor.float().isfinite().all()):
                raise UserError(f"{key} of {name} does not fit into float32 once the normalisation is folded in; {INSTEAD}")
        return self

    def write(self, folder: Path) -> None:
        written = {key: (each.float() if each.is_floating_point() else each) for key, each in self.tensors.items()}
        with replacing(folder / self.weights) as partial:
            save_file({key: each.contiguous() for key, each in written.items()}, partial, metadata={"format": "pt"})
        for file, values in self.settings.items():
            write_json(folder / file, values)


@dataclass(frozen=True)
class _Folded:
    """The weights of a coder of one source that reads and writes activations as its model has them."""

    encoder: Float64[Tensor, "latent d_model"]
    encoder_bias: Float64[Tensor, " latent"]
    decoder: Float64[Tensor, "latent d_model"]
    decoder_bias: Float64[Tensor, " d_model"]


def _folded(crosscoder: Crosscoder) -> _Folded:
    """pre = <(h - mean) * scale, e> + b and hhat = (sum_j f_j d_j + b) / scale + mean, without mean and scale."""
    scale, mean = crosscoder.scale, crosscoder.mean[0].double()
    encoder = crosscoder.encoder.double() * scale
    return _Folded(
        encoder=encoder,
        encoder_bias=crosscoder.encoder_bias.double() - encoder @ mean,
        decoder=crosscoder.decoder.double() / scale,
        decoder_bias=crosscoder.decoder_bias.double() / scale + mean,
    )


def _saelens(crosscoder: Crosscoder, name: str) -> _Files:
    """What SAELens 6 reads. It publishes BatchTopK as jumprelu, too."""
    weights, sparsity = _folded(crosscoder), crosscoder.sparsity
    tensors = {"W_enc": weights.encoder.T, "b_enc": weights.encoder_bias}
    tensors |= {"W_dec": weights.decoder, "b_dec": weights.decoder_bias}
    settings: dict[str, Any] = {"architecture": "standard"}
    if isinstance(sparsity, TopKConfig):
        settings = {"architecture": "topk", "k": sparsity.k, "rescale_acts_by_decoder_norm": True}
        silent = (weights.decoder.float().norm(dim=1) == 0).nonzero().flatten().tolist()
        if silent:
            raise UserError(
                f"latent {silent[0]} of {name} has a decoder direction of norm 0, by which SAELens divides, so that its "
                f"reconstructions would be NaN; {INSTEAD}"
            )
    elif isinstance(sparsity, BatchTopKConfig | JumpReLUConfig):
        settings = {"architecture": "jumprelu"}
        tensors["threshold"] = _thresholds(crosscoder)
    settings |= {
        "d_in": crosscoder.d_model,
        "d_sae": crosscoder.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",  # without it, the settings are taken for those of earlier versions
            "model_name": _model_of(crosscoder),
            "hook_name": f"blocks.{crosscoder.origin['layer']}.hook_resid_post",
        },
    }
    return _Files("sae_weights.safetensors", tensors, {"cfg.json": settings}).check(name)


def _thresholds(crosscoder: Crosscoder) -> Float64[Tensor, " latent"]:
    """The pre-activation above which each latent of a BatchTopK or JumpReLU is active.

    Rounded to one whose logarithm is a float32, as which an import keeps it, so that an export of that is the same file.
    """
    if isinstance(crosscoder.sparsity, BatchTopKConfig):
        norms = crosscoder.norm_sums()
        logarithm = (max(crosscoder.threshold, 0.0) / norms.double().clamp(min=torch.finfo(norms.dtype).tiny)).log()
    else:
        logarithm = crosscoder.own["log_threshold"]
    return logarithm.float().double().exp().clamp(max=LARGEST)


def _trainers_sae(crosscoder: Crosscoder, name: str, kind: str) -> _Files:
    """What the fork's SAE classes read.

    They read h - b_dec. BatchTopKSAE compares f itself with its threshold, so decoder directions get the norm 1 unless they
    have a common one. A normalisation would be in buffers that early versions of the classes lack and overlook in a file.
    """
    weights, sparsity = _folded(crosscoder), crosscoder.sparsity
    norms = weights.decoder.norm(dim=1)
    common = constant_factor(norms, torch.ones_like(norms))
    factor = norms if common is None else torch.ones_like(norms)
    tensors = {
        "encoder.weight": weights.encoder * factor[:, None],
        "encoder.bias": (weights.encoder_bias + weights.encoder @ weights.decoder_bias) * factor,
        "decoder.weight": (weights.decoder / torch.where(factor > 0, factor, 1.0)[:, None]).T,
        "bias" if kind == "AutoEncoder" else "b_dec": weights.decoder_bias,
    }
    config = {"dict_class": kind, "activation_dim": crosscoder.d_model, "dict_size": crosscoder.n_latents}
    if isinstance(sparsity, BatchTopKConfig):
        threshold = max(crosscoder.threshold, 0.0) / crosscoder.scale / (common or 1.0)
        tensors |= {"k": torch.tensor(sparsity.k), "threshold": torch.tensor(threshold, dtype=torch.float64)}
        config["k"] = sparsity.k
    trainer = {"trainer": {"layer": crosscoder.origin["layer"], "lm_name": _model_of(crosscoder)}}
    return _Files("model.safetensors", tensors, {"config.json": config, "trainer_config.json": trainer}).check(name)


def _model_of(crosscoder: Crosscoder) -> str:
    """The name of the model that a coder of one source reads."""
    return str(crosscoder.origin["pair"][crosscoder.sources[0]]["name"])
