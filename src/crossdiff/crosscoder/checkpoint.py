"""Crosscoders and training states on disk.

A crosscoder is `config.json` and `model.safetensors`, with the tensor names and shapes that the paper's fork of
`dictionary_learning` reads. A training state is a distributed checkpoint of torch, which any number of ranks can read.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shared
from torch.distributed.checkpoint.state_dict_saver import save as save_shared

from crossdiff.config import BatchTopKConfig, HarvestConfig, L1Config, Sparsity, validate
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.plain_reader import PlainReader, problem_of
from crossdiff.crosscoder.sparsity import rule_of
from crossdiff.crosscoder.view import View
from crossdiff.errors import UserError
from crossdiff.files import explain_disk_error, read_json, replacing, write_json
from crossdiff.integrity import intact
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Tensor
from crossdiff.yaml_files import read_yaml

FORMAT = 3
OWN = "crossdiff"
"""Metadata entry of `model.safetensors` for what is not in the tensors and has no place in `config.json`."""
CROSSCODER_NORM = 1
"""`code_normalization_id`: activations are scaled by the sum of the decoder norms."""


def save(crosscoder: Crosscoder, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, for the fork's `from_pretrained(folder, from_hub=True)`.

    Kinds that the fork lacks (TopK per token, JumpReLU) get a `config.json` that it refuses; it would read them as ReLU.
    """
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
    """Write a safetensors file."""
    try:
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise explain_disk_error(error, path.parent) or UserError(
            f"cannot write {path}: {error}; free some space or make it writable, and run the same command again to "
            "resume from the last checkpoint"
        ) from None


def _published_normalisation(crosscoder: Crosscoder) -> dict[str, Tensor]:
    """The normalisation x = (h - mean) * scale in the fork's buffers.

    The fork computes (h - activation_mean) * activation_global_scale, with one scale per source, if neither the mean nor the
    standard deviation contains NaN, and h otherwise. Its scale is target_rms / ||std_s||. Here target_rms^2 = d, the mean of
    ||x_s||^2, so a standard deviation of 1 / scale in every dimension is equivalent.
    """
    scale = torch.full((crosscoder.n_sources,), crosscoder.scale)
    return {
        "target_rms": torch.tensor(math.sqrt(crosscoder.d_model)),
        "activation_mean": crosscoder.mean,
        "activation_std": torch.full_like(crosscoder.mean, 1 / crosscoder.scale),
        "activation_global_scale": scale,
    }


def _published_config(crosscoder: Crosscoder) -> dict[str, Any]:
    """Exactly the arguments of the fork's constructors, which are called with every key in the file."""
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
    """Whether this safetensors file was written by `save`."""
    with safe_open(path, framework="pt") as file:
        return bool(OWN in (file.metadata() or {}))


def origin_of(folder: Path) -> dict[str, Any]:
    """The origin of the crosscoder in a folder, read without its weights: pair, layer, harvest, settings,
    training_tokens.

    Raises:
        UserError: as `read`.
    """
    with _opened(folder / "model.safetensors") as file:
        return dict(_own_of(file, folder / "model.safetensors").get("origin") or {})


def harvest_of(folder: Path) -> HarvestConfig:
    """The settings of the harvest that the crosscoder in a folder was trained on.

    They are in its origin. Crosscoders of earlier versions lack them; for those, the store of their run has most, and the
    settings of the run have the rest.

    Raises:
        UserError: as `origin_of`; or a record is damaged.
    """
    settings, manifest = folder.parent / "config.yaml", folder.parent / "activations" / "manifest.json"
    found: dict[str, Any] = origin_of(folder).get("harvest") or {}
    if not found:
        found = (read_yaml(settings).get("harvest") if settings.is_file() else None) or {}
        stored = read_json(manifest) if manifest.is_file() else {}
        found |= {key: stored[key] for key in HarvestConfig.model_fields if key in stored}
    return validate(HarvestConfig, found, str(folder))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(intact(path), framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; train the crosscoder again") from None


def _own_of(file: Any, path: Path) -> dict[str, Any]:
    """What `save` wrote besides the tensors; empty in a file of another program."""
    text = (file.metadata() or {}).get(OWN, "{}")
    try:
        own = json.loads(text)
        if not isinstance(own, dict) or not isinstance(own.get("origin", {}), dict):
            raise ValueError(f"expected an object, found {text[:60]}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; copy it again, or train the crosscoder again") from None
    return own


def _check_numbers(path: Path, values: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Check that nothing is NaN, and that nothing is infinite but the parameters of a kind of sparsity, which may be.

    A latent whose threshold is 0 or infinite has an infinite `log_threshold`.
    """
    for name, tensor in (values | own).items():
        if bool(tensor.isnan().any()) or (name not in own and not bool(tensor.isfinite().all())):
            raise UserError(
                f"{name} of {path} contains NaN or infinite numbers, so nothing can be computed with it; copy the file "
                "again, or train the crosscoder again"
            )


def load(folder: Path) -> Crosscoder:
    """Read the crosscoder that `save` wrote into a folder; raises like `read`."""
    return read(folder / "model.safetensors")


def read(path: Path) -> Crosscoder:
    """Read the weights file of a crosscoder written by `save`.

    Raises:
        UserError: the file is missing or damaged, or of another version or program; or a weight is NaN or infinite.
    """
    with _opened(path) as file:
        own = _own_of(file, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if own.get("format") != FORMAT:
        raise UserError(f"{path} has format {own.get('format')}, this version reads {FORMAT}; train the crosscoder again")
    try:
        view, scale, threshold = own["view"], float(own["scale"]), float(own["threshold"])
        sparsity: Any = TypeAdapter(Sparsity).validate_python(own["sparsity"])
        matrix = torch.tensor(view["matrix"])
        numbers = {"scale": torch.tensor(scale), "threshold": torch.tensor(threshold), "view": matrix}
        parameters = {name: tensors[name] for name in rule_of(sparsity).own_parameters(0)}
        _check_numbers(path, tensors | numbers, parameters)
        return Crosscoder(
            encoder=tensors["encoder.weight"].permute(2, 0, 1).flatten(1).contiguous(),
            encoder_bias=tensors["encoder.bias"],
            decoder=tensors["decoder.weight"].transpose(0, 1).flatten(1).contiguous(),
            decoder_bias=tensors["decoder.bias"].flatten(),
            mean=tensors["activation_mean"],
            scale=scale,
            sparsity=sparsity,
            view=View(matrix, tuple(view["reads"]), tuple(view["names"])),
            own=parameters,
            threshold=threshold,
            origin=own["origin"],
        )
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:  # of other shapes than `save` writes
        raise UserError(f"{path} is damaged: {error}; train the crosscoder again") from None


@dataclass
class TrainingState:
    """Everything that the next step depends on, and the sums of the current log record.

    Attributes:
        tensors: the trainer's own tensors by name; distributed ones where ranks share them.
        settings: fingerprint of the training's settings.
    """

    step: int
    threshold: float
    guess: float
    tensors: dict[str, Tensor]
    settings: str
    log_sums: dict[str, float] = field(default_factory=dict)


class Numbers(BaseModel):
    """The numbers of a training state, with the checksums of the files that hold its tensors."""

    settings: str
    checksums: dict[str, int]
    step: int = Field(ge=0)
    threshold: float
    guess: float
    log_sums: dict[str, float]


NUMBERS = ("step", "threshold", "guess", "log_sums")
STATE = "state.json"
"""File of a checkpoint with the numbers of the state and the checksums of the other files."""


class Checkpoints:
    """The two latest training states in a folder; the older one is kept in case the latest is damaged.

    Several ranks write and read them together.
    """

    def __init__(self, folder: Path, ranks: Ranks = ALONE) -> None:
        self.folder, self.ranks = folder, ranks
        self.last, self.before = folder / "checkpoint", folder / "checkpoint-before"

    def save(self, state: TrainingState) -> None:
        """Write a state into a new folder, sync, and rename it."""
        partial, problem = self.folder / f"checkpoint-{state.step}.partial", None
        try:
            with _quiet():
                save_shared(dict(state.tensors), checkpoint_id=partial, no_dist=self.ranks.size == 1)
        except (OSError, CheckpointException) as error:  # the latter on every rank
            problem = _reason(error)
        if problem is None:
            problem = self.ranks.agree(self._keep(partial, state) if self.ranks.is_first else None)
        if problem is not None:
            full = explain_disk_error(OSError(problem), self.folder)
            shutil.rmtree(partial, ignore_errors=True)
            raise full or UserError(f"cannot write {partial}: {problem}; free some space and run the same command again")

    def _keep(self, partial: Path, state: TrainingState) -> str | None:
        """Make a written folder the last checkpoint; returns the problem if there is one."""
        try:
            checksums = {path.name: _crc32(path) for path in sorted(partial.iterdir())}
            numbers = {key: getattr(state, key) for key in NUMBERS}
            kept = Numbers(settings=state.settings, checksums=checksums, **numbers)
            write_json(partial / STATE, kept.model_dump())
            if self.last.exists():
                shutil.rmtree(self.before, ignore_errors=True)
                self.last.rename(self.before)
            partial.rename(self.last)
        except OSError as error:
            return str(error)
        return None

    def load(self, state: TrainingState, warn: Callable[[str], None]) -> bool:
        """Read the latest intact checkpoint into a state; False if there is none. `warn` is called about a damaged one.

        Raises:
            UserError: every checkpoint is damaged, or the latest belongs to another training.
        """
        path, problems = self.ranks.once(self._latest)
        if path is None and problems:
            raise UserError("; ".join(problems) + "; delete it to restart this training")
        if path is None:
            return False
        numbers = self.ranks.once(lambda: Numbers.model_validate(read_json(path / STATE)))
        if numbers.settings != state.settings:
            raise UserError(
                f"the checkpoint {path} belongs to a training with other settings; delete it, or choose another folder"
            )
        if (strange := self.ranks.once(lambda: problem_of(path))) is not None:
            raise UserError(f"cannot read the checkpoint {path}: {strange}; delete it to restart this training")
        try:
            with _quiet():
                load_shared(dict(state.tensors), storage_reader=PlainReader(path), no_dist=self.ranks.size == 1)
        except CheckpointException as error:
            raise UserError(
                f"cannot read the checkpoint {path}: {_reason(error)}; delete it to restart this training"
            ) from None
        for key in NUMBERS:
            setattr(state, key, getattr(numbers, key))
        for problem in problems if self.ranks.is_first else ():
            warn(f"{problem}; resuming from the one before it, at step {state.step}")
        return True

    def _latest(self) -> tuple[Path | None, list[str]]:
        """The latest intact checkpoint, and what is wrong with a later one, which is deleted."""
        for partial in self.folder.glob("checkpoint-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        problems: list[str] = []
        for path in (self.last, self.before):
            if not path.exists():
                continue
            if (problem := _damage(path)) is None:
                if problems:
                    shutil.rmtree(self.last, ignore_errors=True)
                return path, problems
            problems.append(f"the checkpoint {path} is damaged: {problem}")
        return None, problems

    def check_space(self, state: TrainingState) -> None:
        """Check before training that there is room for two checkpoints."""
        needed = 3 * sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"the disk of {self.folder} has {free / 1e6:.0f} MB left, but the training writes up to "
                f"{needed / 1e6:.0f} MB (two checkpoints and the crosscoder); free some space and run the same command again"
            )
        try:
            probe = self.folder / "probe.partial"
            probe.write_bytes(b"")
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose a folder you may write to") from None


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are intact."""
    try:
        numbers = Numbers.model_validate_json((folder / STATE).read_bytes())
        for name, checksum in numbers.checksums.items():
            if _crc32(folder / name) != checksum:
                return f"the checksum of {name} does not match"
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "its content"
        return f"{STATE}: {where}: {error.errors()[0]['msg']}"
    except OSError as error:
        return str(error)
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _reason(error: BaseException) -> str:
    """The cause of a failure; a distributed checkpoint wraps the failures of the ranks."""
    if isinstance(error, CheckpointException):
        return "; ".join(str(failure[0]) for failure in error.failures.values())
    return str(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warning that a single process is not distributed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
