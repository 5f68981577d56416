"""A published coder in its own terms, its conversion into ours, and the file that its tensors come from."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from crossdiff.config import BatchTopKConfig, JumpReLUConfig, L1Config, Sparsity, TopKConfig
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.view import identity
from crossdiff.errors import UserError
from crossdiff.shapes import Float64, Tensor

SAME = 1e-6
"""Relative difference, about float32's rounding, up to which two measures count as proportional."""


@dataclass(frozen=True)
class ReLU:
    """f = ReLU(pre)."""


@dataclass(frozen=True)
class TopK:
    """f = ReLU(pre) where f * weight > threshold or, without a threshold, among the k largest f * weight of the token."""

    k: int
    threshold: float | None
    weight: Float64[Tensor, " latent"]


@dataclass(frozen=True)
class UnsetThreshold:
    """f = ReLU(pre): a BatchTopK whose threshold, on f * weight, was never set, so that every positive f passes it."""

    k: int
    weight: Float64[Tensor, " latent"]


@dataclass(frozen=True)
class JumpReLU:
    """f = pre where pre > threshold >= 0."""

    thresholds: Float64[Tensor, " latent"]


Activation = ReLU | TopK | UnsetThreshold | JumpReLU


@dataclass(frozen=True)
class Normalisation:
    """x = (h - mean) * scale_in on the way in, and h = x * scale_out + mean on the way out.

    Attributes:
        scale_in, scale_out: one number per source, or one per source and neuron; the second is the inverse of the first, up
            to a format's rounding.
    """

    mean: Float64[Tensor, "source d_model"]
    scale_in: Float64[Tensor, "source width"]
    scale_out: Float64[Tensor, "source width"]

    @property
    def is_none(self) -> bool:
        return bool((self.scale_in == 1).all() and (self.mean == 0).all())

    @property
    def one_scale(self) -> bool:
        return bool((self.scale_in == self.scale_in[0, 0]).all())

    def describe(self) -> dict[str, Any]:
        """What `origin["published"]` says about it: in words, and the scales if there is one per source."""
        if self.is_none:
            return {"normalisation": "none"}
        kind = "one scale" if self.one_scale else "a scale per source"
        if not bool((self.scale_in == self.scale_in[:, :1]).all()):
            return {"normalisation": "a scale per source and neuron"}
        return {"normalisation": kind, "scales": self.scale_in[:, 0].tolist()}


def no_normalisation(n_sources: int, d_model: int) -> Normalisation:
    """x = h."""
    ones = torch.ones(n_sources, 1, dtype=torch.float64)
    return Normalisation(torch.zeros(n_sources, d_model, dtype=torch.float64), ones, ones)


@dataclass(frozen=True)
class PublishedCoder:
    """A coder as it was published.

    Attributes:
        path: its file, for messages.
        origin: the `origin` of the crosscoder.
        needs_scales: the coder needs a scale_in that is not in the file.
    """

    path: Path
    encoder: Float64[Tensor, "source d_model latent"]
    encoder_bias: Float64[Tensor, " latent"]
    decoder: Float64[Tensor, "source latent d_model"]
    decoder_bias: Float64[Tensor, "source d_model"]
    normalisation: Normalisation
    activation: Activation
    origin: dict[str, Any]
    needs_scales: bool = False

    @property
    def n_sources(self) -> int:
        return len(self.decoder_bias)

    def with_input_scales(self, scales: tuple[float, ...]) -> PublishedCoder:
        """The same coder on activations that are first multiplied by one number per source."""
        if len(scales) != self.n_sources or not all(math.isfinite(scale) and scale > 0 for scale in scales):
            raise UserError(f"input_scales {scales} must be {self.n_sources} positive numbers, one per source of {self.path}")
        if not self.normalisation.is_none:
            raise UserError(f"{self.path} holds its own normalisation; omit input_scales")
        factor = torch.tensor(scales, dtype=torch.float64)[:, None]
        normalisation = Normalisation(self.normalisation.mean, factor, 1 / factor)
        origin = self.origin | {"published": self.origin["published"] | {"input_scales": list(scales)}}
        return replace(self, normalisation=normalisation, origin=origin, needs_scales=False)

    def with_threshold(self, threshold: float) -> PublishedCoder:
        """The same coder with a threshold that its training never set; it applies to f * weight, the file's own measure."""
        assert isinstance(self.activation, UnsetThreshold)
        activation = TopK(self.activation.k, threshold, self.activation.weight)
        said = {"threshold": "estimated from a store's held-out tokens", "estimated_threshold": threshold}
        origin = self.origin | {"published": self.origin["published"] | said}
        return replace(self, activation=activation, origin=origin)

    def crosscoder(self, sources: tuple[str, ...], dtype: torch.dtype = torch.float32) -> Crosscoder:
        """The same function with at most one scale; `sources` names the sources in the file's order.

        A scale that all sources and neurons share is kept. Any other is folded into encoder and decoder, whose space is then
        that of the models, so that norms, v and everything derived from them are the models'.
        """
        n = self.normalisation
        scale = float(n.scale_in[0, 0]) if n.one_scale else 1.0
        encoder = self.encoder * (n.scale_in / scale)[:, :, None]
        decoder = self.decoder * (n.scale_out * scale)[:, None, :]
        decoder_bias = self.decoder_bias * (n.scale_out * scale)
        sparsity, threshold, own = self._sparsity(decoder.norm(dim=2).sum(0))
        weights = {
            "encoder": encoder.permute(2, 0, 1).flatten(1),
            "encoder_bias": self.encoder_bias,
            "decoder": decoder.transpose(0, 1).flatten(1),
            "decoder_bias": decoder_bias.flatten(),
            "mean": n.mean,
        }
        converted = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
        for name, tensor in converted.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{self.path}: its {name} does not fit into {dtype}; download it again")
        return Crosscoder(
            **converted,
            scale=scale,
            sparsity=sparsity,
            view=identity(sources),
            own={name: tensor.to(dtype) for name, tensor in own.items()},
            threshold=threshold,
            origin=self.origin | {"published": self.origin["published"] | n.describe()},
        )

    def _sparsity(self, norms: Float64[Tensor, " latent"]) -> tuple[Sparsity, float, dict[str, Tensor]]:
        """Settings, threshold and parameters of the kind of sparsity, given our measure, the sums of the decoder norms."""
        match self.activation:
            case ReLU() | UnsetThreshold():
                return L1Config(), 0.0, {}
            case JumpReLU(thresholds):
                return JumpReLUConfig(), 0.0, {"log_threshold": thresholds.log()}
            case TopK(k, threshold, weight):
                factor = constant_factor(norms, weight)
                if threshold is None and factor is None:
                    raise UserError(
                        f"{self.path} is a TopK coder ({self.origin['published']['format']}) that ranks a token's latents by "
                        "another measure than the activation times the decoder norm, by which crossdiff ranks them; read so, "
                        f"other latents would be among the {k} active ones. Only coders whose decoder directions have equal "
                        "norms, or that rank as crossdiff does, can be read"
                    )
                if threshold is None:
                    return TopKConfig(k=k), 0.0, {}
                if factor is None:
                    thresholds = torch.where(weight > 0, threshold / weight, torch.inf)
                    return JumpReLUConfig(), 0.0, {"log_threshold": thresholds.log()}
                return BatchTopKConfig(k=k), threshold * factor, {}


def constant_factor(norms: Float64[Tensor, " latent"], weight: Float64[Tensor, " latent"]) -> float | None:
    """The c of norms = c * weight, or None. A latent for which both are 0 is never active and fits any c."""
    counts = (norms > 0) | (weight > 0)
    if not bool(counts.any()):
        return 1.0
    ratio = norms[counts] / weight[counts]
    middle = float(ratio.median())
    return middle if bool(((ratio / middle - 1).abs() <= SAME).all()) else None


def _read(path: Path) -> Any:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)


class TensorFile:
    """The tensors of a file, each to be taken once, with axes whose sizes must agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        try:
            stored = _read(path)
        except pickle.UnpicklingError:
            raise UserError(
                f"cannot read {path}: it is damaged or holds more than tensors, which is unsafe to read; download it again"
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(f"cannot read {path}: {error}; if it is damaged, download it again") from None
        if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
            raise UserError(f"{path} does not hold named tensors; expected the state dict of a coder")
        self._left: dict[str, Tensor] = {str(name).replace("_orig_mod.", ""): tensor for name, tensor in stored.items()}

    def has(self, key: str) -> bool:
        """Whether a tensor is left."""
        return key in self._left

    def n_axes(self, key: str) -> int:
        return self._left[key].ndim

    def names(self) -> str:
        """The tensors that are left, for messages."""
        return ", ".join(sorted(self._left)) or "nothing"

    def take(self, key: str, axes: str, finite: bool = True) -> Float64[Tensor, "..."]:
        """Take the tensor with these axes, in float64; `UserError` if it is missing, misshapen, or not finite as required."""
        if key not in self._left:
            raise UserError(f"{self.path} has no {key}; expected it with the axes [{axes}]; remaining: {self.names()}")
        tensor = self._left.pop(key)
        names = axes.split()
        fits = tensor.ndim == len(names) and all(
            self.sizes.get(name, size) == size for name, size in zip(names, tensor.shape, strict=True)
        )
        if not fits:
            known = " ".join(f"{name}={self.sizes[name]}" if name in self.sizes else name for name in names)
            raise UserError(f"{self.path}: {key} has the shape {tuple(tensor.shape)}, expected [{known}]")
        self.sizes |= dict(zip(names, tensor.shape, strict=True))
        if finite and not bool(tensor.isfinite().all()):
            raise UserError(f"{self.path}: {key} holds numbers that are not finite; download it again")
        return tensor.double()

    def take_copies(self, key: str, axes: str) -> Float64[Tensor, "..."] | None:
        """Take a tensor that a file may hold several times, under its name and under modules; None if it has none."""
        copies = [self.take(name, axes) for name in sorted(self._left) if name == key or name.endswith(f".{key}")]
        if any(not torch.equal(copy, copies[0]) for copy in copies):
            raise UserError(f"{self.path} holds {key} several times with different numbers; it is unclear which applies")
        return copies[0] if copies else None

    def scalar(self, key: str) -> float:
        """Take a tensor without axes."""
        return float(self.take(key, ""))

    def whole(self, value: Any, key: str) -> int:
        """Check that a setting is a whole number of latents."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value != round(value) or value < 1:
            raise UserError(f"{self.path}: {key} is {value}, expected a whole number of at least 1")
        if value > self.sizes["latent"]:
            raise UserError(f"{self.path}: {key} is {value:g}, more than its {self.sizes['latent']} latents")
        return int(value)

    def finish(self) -> None:
        """Check that every tensor was taken: any other would change what the coder computes."""
        if self._left:
            raise UserError(f"{self.path} has unknown keys: {self.names()}; this kind of coder cannot be read")


def origin_of(tensors: TensorFile, format_name: str, architecture: str, layer: int | None) -> dict[str, Any]:
    """The `origin` of a crosscoder that was read from a file."""
    published = {"format": format_name, "architecture": architecture, "path": str(tensors.path)}
    return {"pair": None, "layer": layer, "settings": None, "training_tokens": None, "published": published}


def batch_topk(tensors: TensorFile, config: dict[str, Any], weight: Tensor | None) -> TopK | UnsetThreshold:
    """k and threshold. A negative threshold means that the training had not set it yet, and so does a missing one, which is
    -1 in the class."""
    if weight is None:
        raise UserError(
            f"{tensors.path} has the code normalisation DECOUPLED: its latents are active in each source separately, "
            "but a crosscoder has one code for all sources; it cannot be read"
        )
    if not tensors.has("k") and "k" not in config:
        raise UserError(f"{tensors.path} is a BatchTopK crosscoder and has no k; it cannot be read")
    k = tensors.whole(tensors.scalar("k") if tensors.has("k") else config["k"], "k")
    threshold = tensors.scalar("threshold") if tensors.has("threshold") else -1.0
    return TopK(k, threshold, weight) if threshold >= 0 else UnsetThreshold(k, weight)
