"""The crosscoder: its parameters, encoding and decoding, and its decoder directions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from crossdiff.activations.loader import source_indices
from crossdiff.activations.store import Store
from crossdiff.config import Kind
from crossdiff.crosscoder.kernels import Code, Encoded, SparseCode, matmul, product_dtype
from crossdiff.crosscoder.sparsity import DENSE_ABOVE, Rule, rule_of
from crossdiff.crosscoder.view import View, identity
from crossdiff.shapes import Float, Int64, Tensor


@dataclass
class Crosscoder:
    """Weights in the normalised space, latent-major with source and d_model flattened into columns.

    f_j(x) = act(sum_s <x_s, e_j^s> + b_j),  xhat_s = sum_j f_j d_j^s + b^s     (docs/method.md#crosscoder; Lindsey et al. 2024)

    SAEs and diff-SAEs are crosscoders with a single source: one of the stored ones, or their difference (`view`).

    Examples:
        >>> crosscoder = crossdiff.load("runs/demo", "batchtopk")
        >>> h = torch.zeros(3, 2, crosscoder.d_model)               # [token, source, d_model], as the models have it
        >>> code = crosscoder.sparse_code(crosscoder.normalise(h))  # active (token, latent) pairs
        >>> code.n_tokens, crosscoder.reconstruct(h).shape == h.shape
        (3, True)

    Attributes:
        encoder, decoder: `[latent, source * d_model]`.
        encoder_bias: `[latent]`; decoder_bias: `[source * d_model]`.
        mean: `[source, d_model]` and scale: the normalisation x = (view(h) - mean) * scale.
        sparsity: settings of the kind of sparsity, one of the union `Sparsity` in `config.py`.
        view: how the sources follow from the stored ones.
        own: parameters per latent of the kind of sparsity.
        threshold: v above which a latent is active at inference (BatchTopK; 0 for the others).
        origin: what it was trained on: pair, layer, settings of the harvest and of the training, training_tokens.
    """

    encoder: Float[Tensor, "latent column"]
    encoder_bias: Float[Tensor, " latent"]
    decoder: Float[Tensor, "latent column"]
    decoder_bias: Float[Tensor, " column"]
    mean: Float[Tensor, "source d_model"]
    scale: float
    sparsity: Kind
    view: View = field(default_factory=identity)
    own: dict[str, Tensor] = field(default_factory=dict)
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
        return self.view.names

    @property
    def rule(self) -> Rule[Any]:
        """The rule of its kind of sparsity."""
        return rule_of(self.sparsity)

    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return {
            "encoder": self.encoder,
            "encoder_bias": self.encoder_bias,
            "decoder": self.decoder,
            "decoder_bias": self.decoder_bias,
            **self.own,
        }

    def to(self, device: torch.device) -> Crosscoder:
        """The same crosscoder with its tensors on a device."""
        names = ("encoder", "encoder_bias", "decoder", "decoder_bias", "mean")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved, own={name: tensor.to(device) for name, tensor in self.own.items()})

    def of_latents(self, part: slice | Int64[Tensor, " chosen"]) -> Crosscoder:
        """A copy with some of its latents, in the order given."""
        own = {name: tensor[part].clone() for name, tensor in self.own.items()}
        kept = {name: getattr(self, name)[part].clone() for name in ("encoder", "encoder_bias", "decoder")}
        return replace(self, **kept, own=own)

    def directions(self) -> Float[Tensor, "source latent d_model"]:
        """Decoder directions d_j^s in the normalised space; divide by `scale` for the space of the models."""
        return self.decoder.view(self.n_latents, self.n_sources, self.d_model).transpose(0, 1)

    def norms(self) -> Float[Tensor, "latent source"]:
        """||d_j^s|| in the normalised space."""
        norms: Tensor = torch.linalg.vector_norm(self.decoder.view(self.n_latents, self.n_sources, self.d_model), dim=2)
        return norms

    def norm_sums(self) -> Float[Tensor, " latent"]:
        """sum_s ||d_j^s|| in the normalised space."""
        return self.norms().sum(1)

    def v(self, code: Code) -> Tensor:
        """Activations v = f * sum_s ||d_j^s||, shaped as `code.values`.

        This is the unit of every activation that is stored or shown: it does not change when a latent is rescaled.
        """
        return code.values * code.of_latents(self.norm_sums())

    def inputs(self, store: Store, rows: npt.NDArray[np.int64]) -> Float[Tensor, "token source d_model"]:
        """Normalised activations of rows of a store, on the crosscoder's device.

        Raises:
            UserError: the store lacks a source that the crosscoder reads.
        """
        h = store.gather(rows)[:, source_indices(store, self.view.reads)]
        return self.normalise(h.to(self.encoder))

    def normalise(self, h: Float[Tensor, "batch stored_source d_model"]) -> Float[Tensor, "batch source d_model"]:
        """Map activations from the models' space to the crosscoder's; `h` has the sources that the view reads, in its order."""
        return (self.view.apply(h) - self.mean.to(h)) * self.scale

    def encoded(self, raw: Float[Tensor, "batch latent"], norms: Float[Tensor, " latent"], guess: float = 0.0) -> Encoded:
        """The encoder's product `raw` with what the selection needs. `norms` are those of `norm_sums`."""
        return Encoded(raw, self.encoder_bias, norms, self.threshold, self.own, guess)

    @property
    def products(self) -> torch.dtype:
        """The dtype that the encoder's product reads: as in training (`matmul`) on a GPU, that of the weights on a CPU."""
        settings = self.origin.get("settings") or {}
        return product_dtype(settings.get("matmul", "bfloat16"), self.encoder)

    def encode(self, x: Float[Tensor, "batch source d_model"], norms: Float[Tensor, " latent"]) -> Encoded:
        """The encoder's product, added up in float32. `norms` are those of `norm_sums`.

        Sums rounded to bfloat16 would often be equal, and a selection of the largest would be left to chance.
        """
        return self.encoded(matmul(x.flatten(1), self.encoder.to(self.products).T), norms)

    def pre_activations(self, x: Float[Tensor, "batch source d_model"]) -> Float[Tensor, "batch latent"]:
        """sum_s <x_s, e_j^s> + b_j."""
        return self.encode(x, self.norm_sums()).pre()

    def code(self, x: Float[Tensor, "batch source d_model"]) -> Code:
        """Latent activations of normalised inputs at inference."""
        return self.rule.code(self.encode(x, self.norm_sums()), DENSE_ABOVE)

    def sparse_code(self, x: Float[Tensor, "batch source d_model"]) -> SparseCode:
        """Latent activations of normalised inputs at inference, always as active pairs."""
        code = self.rule.code(self.encode(x, self.norm_sums()), dense_above=1.0)
        assert isinstance(code, SparseCode)
        return code

    def decode(self, code: Code) -> Float[Tensor, "batch source d_model"]:
        """Reconstruction in the normalised space."""
        return (code.decode(self.decoder) + self.decoder_bias).view(-1, self.n_sources, self.d_model)

    def reconstruct(self, h: Float[Tensor, "batch stored_source d_model"]) -> Float[Tensor, "batch source d_model"]:
        """Reconstruction of view(h) in the models' own space, with the bias mean_s + b^s / scale."""
        return self.decode(self.code(self.normalise(h))) / self.scale + self.mean.to(h)


class Part:
    """Some latents of a crosscoder, with the activations that they have beside all others.

    Only these latents are encoded, unless the rule makes them compete with the rest (TopK).

    Attributes:
        crosscoder: a copy with these latents alone, in the order given, on the device of the whole.
    """

    def __init__(self, whole: Crosscoder, latents: Int64[Tensor, " chosen"]) -> None:
        self.crosscoder = whole.of_latents(latents)
        self._whole = whole if whole.rule.compares_latents else None
        place = torch.full((whole.n_latents,), -1).index_copy_(0, latents, torch.arange(len(latents)))
        self._place = place.to(whole.encoder.device)

    @property
    def n_latents(self) -> int:
        return self.crosscoder.n_latents

    def sparse_code(self, x: Float[Tensor, "batch source d_model"]) -> SparseCode:
        """Activations of the chosen latents at inference, which are numbered in their order."""
        if self._whole is None:
            return self.crosscoder.sparse_code(x)
        code = self._whole.sparse_code(x)
        latent = self._place[code.latent]
        kept = latent >= 0
        return SparseCode(code.token[kept], latent[kept], code.values[kept], code.n_tokens, self.n_latents)


def new_crosscoder(
    n_latents: int,
    mean: Float[Tensor, "source d_model"],
    scale: float,
    sparsity: Kind,
    decoder_norm: float,
    seed: int,
    view: View | None = None,
) -> Crosscoder:
    """A new crosscoder: random directions of norm `decoder_norm`, equal in every source; the encoder is their transpose.

    With more than two sources the encoder is shorter, so that its sum over the sources stays that of two.
    """
    n_sources, d_model = mean.shape
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(n_latents, d_model, generator=generator)
    direction *= decoder_norm / direction.norm(dim=1, keepdim=True)
    decoder = direction.repeat(1, n_sources)
    return Crosscoder(
        encoder=decoder * (2 / n_sources) if n_sources > 2 else decoder.clone(),
        encoder_bias=torch.zeros(n_latents),
        decoder=decoder,
        decoder_bias=torch.zeros(n_sources * d_model),
        mean=mean.float(),
        scale=scale,
        sparsity=sparsity,
        view=identity() if view is None else view,
        own=rule_of(sparsity).own_parameters(n_latents),
    )
