"""Crosscoders on disk: `config.json` + `model.safetensors`, with the tensor names and shapes that the paper's fork of
`dictionary_learning` reads, and the training state as safetensors. Nothing is pickled."""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crossdiff.config import BatchTopKConfig, L1Config, Sparsity, UserError
from crossdiff.crosscoder.model import Crosscoder
from crossdiff.crosscoder.sparsity import rule_of
from crossdiff.crosscoder.view import View
from crossdiff.run import write_json
from crossdiff.shapes import Tensor

FORMAT = 3
OWN = "crossdiff"
"""Metadata entry of `model.safetensors` that holds what the tensors do not say; `config.json` has no room for it."""
CROSSCODER_NORM = 1
"""`code_normalization_id`: activations are scaled by the sum of the decoder norms."""


def save(crosscoder: Crosscoder, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, as the fork's `from_pretrained(folder, from_hub=True)` reads
    them. Kinds that it does not have (TopK of each token, JumpReLU) get a `config.json` that it refuses, because it would
    take them for ReLU."""
    n_sources, d_model, n_latents = crosscoder.n_sources, crosscoder.d_model, crosscoder.n_latents
    split = (n_latents, n_sources, d_model)
    tensors = {
        "encoder.weight": crosscoder.encoder.view(split).permute(1, 2, 0),
        "encoder.bias": crosscoder.encoder_bias,
        "decoder.weight": crosscoder.decoder.view(split).permute(1, 0, 2),
        "decoder.bias": crosscoder.decoder_bias.view(n_sources, d_model),
        "code_normalization_id": torch.tensor(CROSSCODER_NORM),
        **_published_normalisation(crosscoder),
        **crosscoder.own,
    }
    if isinstance(crosscoder.sparsity, BatchTopKConfig):
        tensors["k"] = torch.tensor(crosscoder.sparsity.k)
        tensors["threshold"] = torch.tensor(crosscoder.threshold, dtype=torch.float32)
    own = {
        "format": FORMAT,
        "scale": crosscoder.scale,
        "threshold": crosscoder.threshold,
        "sparsity": crosscoder.sparsity.model_dump(),
        "view": {"matrix": crosscoder.view.matrix.tolist(), "reads": crosscoder.view.reads, "names": crosscoder.view.names},
        "origin": crosscoder.origin,
    }
    written = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    _write(written, folder / "model.safetensors", {OWN: json.dumps(own)})
    write_json(folder / "config.json", _published_config(crosscoder))


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        UserError: the disk has become full, or the folder can no longer be written.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except (SafetensorError, OSError) as error:
        path.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error}; make room or make it writable, and run the same command again: it goes on from the "
            "last checkpoint"
        ) from None


def _published_normalisation(crosscoder: Crosscoder) -> dict[str, Tensor]:
    """Our x = (h - mean) * scale in the fork's buffers.

    The fork computes (h - activation_mean) * activation_global_scale, one scale per source, if no entry of the mean and of
    the standard deviation is NaN, and h otherwise. Its scale is target_rms / ||std_s||; ours has target_rms^2 = d (the mean
    of ||x_s||^2), so a standard deviation of 1 / scale in every dimension says the same.
    """
    scale = torch.full((crosscoder.n_sources,), crosscoder.scale)
    return {
        "target_rms": torch.tensor(math.sqrt(crosscoder.d_model)),
        "activation_mean": crosscoder.mean,
        "activation_std": torch.full_like(crosscoder.mean, 1 / crosscoder.scale),
        "activation_global_scale": scale,
    }


def _published_config(crosscoder: Crosscoder) -> dict[str, Any]:
    """The arguments of the fork's constructors and nothing else: they are called with every key that is in the file."""
    if not isinstance(crosscoder.sparsity, L1Config | BatchTopKConfig):
        return {"architecture": crosscoder.sparsity.kind}
    config: dict[str, Any] = {
        "activation_dim": crosscoder.d_model,
        "dict_size": crosscoder.n_latents,
        "num_layers": crosscoder.n_sources,
        "code_normalization": "CROSSCODER",
    }
    return config | ({"k": crosscoder.sparsity.k} if isinstance(crosscoder.sparsity, BatchTopKConfig) else {})


def is_own(path: Path) -> bool:
    """Is this safetensors file written by `save`?"""
    with safe_open(path, framework="pt") as file:
        return bool(OWN in (file.metadata() or {}))


def load(folder: Path) -> Crosscoder:
    """Read the crosscoder that `save` wrote into a folder; raises as `read`."""
    return read(folder / "model.safetensors")


def read(path: Path) -> Crosscoder:
    """Read the weights' file of a crosscoder written by `save`.

    Raises:
        UserError: the file is missing or damaged, or of another version or program.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; train the crosscoder again") from None
    own = json.loads(metadata.get(OWN, "{}"))
    if own.get("format") != FORMAT:
        raise UserError(f"{path} has format {own.get('format')}, this version reads {FORMAT}; train the crosscoder again")
    try:
        view = own["view"]
        sparsity: Any = TypeAdapter(Sparsity).validate_python(own["sparsity"])
        return Crosscoder(
            encoder=tensors["encoder.weight"].permute(2, 0, 1).flatten(1).contiguous(),
            encoder_bias=tensors["encoder.bias"],
            decoder=tensors["decoder.weight"].transpose(0, 1).flatten(1).contiguous(),
            decoder_bias=tensors["decoder.bias"].flatten(),
            mean=tensors["activation_mean"],
            scale=float(own["scale"]),
            sparsity=sparsity,
            view=View(torch.tensor(view["matrix"]), tuple(view["reads"]), tuple(view["names"])),
            own={name: tensors[name] for name in rule_of(sparsity).own_parameters(0)},
            threshold=float(own["threshold"]),
            origin=own["origin"],
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; train the crosscoder again") from None


@dataclass
class TrainingState:
    """Everything that the next step depends on, and the sums of the log record in progress."""

    step: int
    threshold: float
    guess: float
    silent_tokens: Tensor
    parameters: dict[str, Tensor]
    first_moments: dict[str, Tensor]
    second_moments: dict[str, Tensor]
    log_sums: dict[str, float] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under one name each, on the CPU."""
        named = {"silent_tokens": self.silent_tokens}
        for group in GROUPS:
            named |= {f"{group}.{name}": tensor for name, tensor in getattr(self, group).items()}
        return {name: tensor.cpu().contiguous() for name, tensor in named.items()}


GROUPS = ("parameters", "first_moments", "second_moments")


class Checkpoints:
    """The two latest training states of a folder; the one before the last is there in case the last is damaged."""

    def __init__(self, folder: Path) -> None:
        self.last, self.before = folder / "checkpoint.safetensors", folder / "checkpoint-before.safetensors"

    def save(self, state: TrainingState) -> None:
        """Write atomically: temporary file, sync, rename; raises as `_write`, and then the last checkpoint is still there."""
        tensors = state.tensors()
        numbers = {key: getattr(state, key) for key in ("step", "threshold", "guess", "log_sums")}
        temporary = self.last.with_suffix(".partial")
        _write(tensors, temporary, {"state": json.dumps(numbers), "crc32": str(_crc32(tensors))})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if self.last.exists():
            self.last.replace(self.before)
        temporary.replace(self.last)

    def load(self, warn: Callable[[str], None]) -> TrainingState | None:
        """The latest state that can be read; None without a checkpoint. A damaged one is named to `warn`.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        problems = []
        for path in (self.last, self.before):
            if not path.exists():
                continue
            try:
                state = _load_state(path)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                problems.append(f"the checkpoint {path} is damaged: {error}")
                continue
            for problem in problems:
                warn(f"{problem}; the one before it is used, from step {state.step}")
            return state
        if problems:
            raise UserError("; ".join(problems) + "; delete it to start this training anew")
        return None

    def check_space(self, state: TrainingState) -> None:
        """Check before training that two checkpoints can be written.

        Raises:
            UserError: the folder cannot be written, or the disk is too full.
        """
        needed = 3 * sum(tensor.nbytes for tensor in state.tensors().values())
        free = shutil.disk_usage(self.last.parent).free
        if free < needed:
            raise UserError(
                f"the disk of {self.last.parent} has {free / 1e6:.0f} MB left, and the training writes up to "
                f"{needed / 1e6:.0f} MB (two checkpoints and the crosscoder); free some space and run the same command again"
            )
        try:
            probe = self.last.with_suffix(".partial")
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write to {self.last.parent}: {error.strerror}; choose a folder you may write to") from None


def _crc32(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].view(-1).view(torch.uint8).numpy().data, value)
    return value


def _load_state(path: Path) -> TrainingState:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    numbers = json.loads(metadata["state"])
    if _crc32(tensors) != int(metadata["crc32"]):
        raise ValueError("its checksum does not match")
    groups: dict[str, Any] = {group: {} for group in GROUPS}
    for name, tensor in tensors.items():
        group, _, key = name.partition(".")
        if group in groups:
            groups[group][key] = tensor
    return TrainingState(**numbers, silent_tokens=tensors["silent_tokens"], **groups)
