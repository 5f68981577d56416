"""The crosscoder: parameters, encoding, decoding, and the views of its directions that the later stages use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from crossdiff.config import BatchTopKConfig, L1Config
from crossdiff.crosscoder.kernels import Code, SparseCode, above_code, positive_code
from crossdiff.shapes import Float, Tensor

DENSE_ABOVE = 0.05
"""Share of active latents above which dense products are faster than sparse ones (measured)."""


@dataclass
class Crosscoder:
    """Weights in the normalised space, latent-major with source and d_model flattened into columns.

    f_j(x) = act(sum_s <x_s, e_j^s> + b_j),  xhat_s = sum_j f_j d_j^s + b^s      (METHOD: crosscoder; Lindsey et al. 2024)

    Attributes:
        encoder, decoder: `[latent, source * d_model]`.
        encoder_bias: `[latent]`; decoder_bias: `[source * d_model]`.
        mean: `[source, d_model]` and scale: the normalisation x = (h - mean) * scale.
        threshold: smallest v that counts as active at inference (BatchTopK; 0 for ReLU).
        origin: what it was trained on: pair, layer, sources, settings.
    """

    encoder: Float[Tensor, "latent column"]
    encoder_bias: Float[Tensor, " latent"]
    decoder: Float[Tensor, "latent column"]
    decoder_bias: Float[Tensor, " column"]
    mean: Float[Tensor, "source d_model"]
    scale: float
    sparsity: L1Config | BatchTopKConfig
    threshold: float = 0.0
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def n_latents(self) -> int:
        return self.encoder.shape[0]

    @property
    def n_sources(self) -> int:
        return self.mean.shape[0]

    @property
    def d_model(self) -> int:
        return self.mean.shape[1]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.origin["sources"])

    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return {
            "encoder": self.encoder,
            "encoder_bias": self.encoder_bias,
            "decoder": self.decoder,
            "decoder_bias": self.decoder_bias,
        }

    def directions(self) -> Float[Tensor, "source latent d_model"]:
        """Decoder directions d_j^s in the normalised space; divide by `scale` for the space of the models."""
        return self.decoder.view(self.n_latents, self.n_sources, self.d_model).transpose(0, 1)

    def norms(self) -> Float[Tensor, "latent source"]:
        """||d_j^s|| in the normalised space."""
        norms: Tensor = torch.linalg.vector_norm(self.decoder.view(self.n_latents, self.n_sources, self.d_model), dim=2)
        return norms

    def normalise(self, h: Float[Tensor, "batch source d_model"]) -> Float[Tensor, "batch source d_model"]:
        """From the models' space to the crosscoder's."""
        return (h - self.mean.to(h.dtype)) * self.scale

    def pre_activations(self, x: Float[Tensor, "batch source d_model"]) -> Float[Tensor, "batch latent"]:
        """sum_s <x_s, e_j^s> + b_j."""
        return torch.addmm(self.encoder_bias, x.flatten(1), self.encoder.T)

    def code(self, x: Float[Tensor, "batch source d_model"]) -> Code:
        """Latent activations of normalised inputs, as at inference."""
        pre = self.pre_activations(x)
        if isinstance(self.sparsity, BatchTopKConfig):
            return above_code(pre, self.norms().sum(1), self.threshold)
        return positive_code(pre, DENSE_ABOVE)

    def sparse_code(self, x: Float[Tensor, "batch source d_model"]) -> SparseCode:
        """The same, always as active pairs."""
        pre = self.pre_activations(x)
        if isinstance(self.sparsity, BatchTopKConfig):
            return above_code(pre, self.norms().sum(1), self.threshold)
        code = positive_code(pre, dense_above=1.0)
        assert isinstance(code, SparseCode)
        return code

    def decode(self, code: Code) -> Float[Tensor, "batch source d_model"]:
        """Reconstruction in the normalised space."""
        return (code.decode(self.decoder) + self.decoder_bias).view(-1, self.n_sources, self.d_model)

    def reconstruct(self, h: Float[Tensor, "batch source d_model"]) -> Float[Tensor, "batch source d_model"]:
        """Reconstruction in the models' own space, bias mean_s + b^s / scale."""
        return self.decode(self.code(self.normalise(h))) / self.scale + self.mean.to(h.dtype)


def new_crosscoder(
    n_latents: int,
    mean: Float[Tensor, "source d_model"],
    scale: float,
    sparsity: L1Config | BatchTopKConfig,
    decoder_norm: float,
    seed: int,
) -> Crosscoder:
    """Random directions, the same for every source, each of norm `decoder_norm`; the encoder is their transpose."""
    n_sources, d_model = mean.shape
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(n_latents, d_model, generator=generator)
    direction *= decoder_norm / direction.norm(dim=1, keepdim=True)
    decoder = direction.repeat(1, n_sources)
    return Crosscoder(
        encoder=decoder.clone(),
        encoder_bias=torch.zeros(n_latents),
        decoder=decoder,
        decoder_bias=torch.zeros(n_sources * d_model),
        mean=mean.float(),
        scale=scale,
        sparsity=sparsity,
    )
