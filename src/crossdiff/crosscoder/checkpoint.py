"""Crosscoders on disk: `config.json` + `model.safetensors`, with the tensor names and shapes that the paper's fork of
`dictionary_learning` reads, and the training state as safetensors. Nothing is pickled."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from crossdiff.config import BatchTopKConfig, Sparsity, UserError
from crossdiff.crosscoder.model import Crosscoder
from crossdiff.run import read_json, write_json
from crossdiff.shapes import Tensor

CROSSCODER_NORM = 1
"""`code_normalization_id`: activations are scaled by the sum of the decoder norms."""


def save(crosscoder: Crosscoder, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into `folder`."""
    n_sources, d_model, n_latents = crosscoder.n_sources, crosscoder.d_model, crosscoder.n_latents
    split = (n_latents, n_sources, d_model)
    tensors = {
        "encoder.weight": crosscoder.encoder.view(split).permute(1, 2, 0),
        "encoder.bias": crosscoder.encoder_bias,
        "decoder.weight": crosscoder.decoder.view(split).permute(1, 0, 2),
        "decoder.bias": crosscoder.decoder_bias.view(n_sources, d_model),
        "code_normalization_id": torch.tensor(CROSSCODER_NORM),
        "threshold": torch.tensor(crosscoder.threshold, dtype=torch.float32),
        "target_rms": torch.tensor(1.0),
        "activation_mean": crosscoder.mean,
        "activation_std": torch.full_like(crosscoder.mean, torch.nan),
        "activation_global_scale": torch.tensor(crosscoder.scale, dtype=torch.float32),
    }
    if isinstance(crosscoder.sparsity, BatchTopKConfig):
        tensors["k"] = torch.tensor(crosscoder.sparsity.k)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {
        "format": 1,
        "architecture": crosscoder.sparsity.kind,
        "n_latents": n_latents,
        "n_sources": n_sources,
        "d_model": d_model,
        "scale": crosscoder.scale,
        "threshold": crosscoder.threshold,
        "sparsity": crosscoder.sparsity.model_dump(),
        "origin": crosscoder.origin,
    }
    write_json(folder / "config.json", config)


def load(folder: Path) -> Crosscoder:
    """Read a crosscoder written by `save`.

    Raises:
        UserError: a file is missing or damaged, or the tensors do not have the shapes of the config.
    """
    config = read_json(folder / "config.json")
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; train the crosscoder again") from None
    try:
        n_latents, n_sources, d_model = (int(config[key]) for key in ("n_latents", "n_sources", "d_model"))
        sparsity: Any = TypeAdapter(Sparsity).validate_python(config["sparsity"])
        crosscoder = Crosscoder(
            encoder=tensors["encoder.weight"].permute(2, 0, 1).flatten(1).contiguous(),
            encoder_bias=tensors["encoder.bias"],
            decoder=tensors["decoder.weight"].transpose(0, 1).flatten(1).contiguous(),
            decoder_bias=tensors["decoder.bias"].flatten(),
            mean=tensors["activation_mean"],
            scale=float(config["scale"]),
            sparsity=sparsity,
            threshold=float(config["threshold"]),
            origin=config["origin"],
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder} is no crosscoder of this version: {error}") from None
    found = (crosscoder.n_latents, crosscoder.n_sources, crosscoder.d_model)
    if found != (n_latents, n_sources, d_model):
        raise UserError(
            f"{path} holds {found} latents, sources and dimensions, config.json says {(n_latents, n_sources, d_model)}"
        )
    return crosscoder


@dataclass
class TrainingState:
    """Everything that the next step depends on."""

    step: int
    threshold: float
    guess: float
    tokens_since_fired: Tensor
    parameters: dict[str, Tensor]
    first_moments: dict[str, Tensor]
    second_moments: dict[str, Tensor]


def save_state(state: TrainingState, path: Path) -> None:
    """Write atomically: temporary file, sync, rename."""
    tensors = {"tokens_since_fired": state.tokens_since_fired}
    for group in ("parameters", "first_moments", "second_moments"):
        tensors |= {f"{group}.{name}": tensor for name, tensor in getattr(state, group).items()}
    numbers = {"step": state.step, "threshold": state.threshold, "guess": state.guess}
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"state": json.dumps(numbers)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def load_state(path: Path) -> TrainingState:
    """Read what `save_state` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            numbers = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {path} is damaged: {error}; delete it to start this training anew") from None
    groups: dict[str, dict[str, Tensor]] = {"parameters": {}, "first_moments": {}, "second_moments": {}}
    for name, tensor in tensors.items():
        group, _, key = name.partition(".")
        if group in groups:
            groups[group][key] = tensor
    return TrainingState(
        step=int(numbers["step"]),
        threshold=float(numbers["threshold"]),
        guess=float(numbers["guess"]),
        tokens_since_fired=tensors["tokens_since_fired"],
        **groups,
    )
