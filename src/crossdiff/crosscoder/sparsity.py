"""The kinds of sparsity: which latents are active, and what that adds to the loss.

Each kind is one rule, bound to its settings in `config.py`, where the command line can list them without loading torch. A new
kind is its settings, one line in the union `Sparsity`, and its rule here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch

from crossdiff.config import AuxConfig, BatchTopKConfig, JumpReLUConfig, Kind, L1Config, TopKConfig
from crossdiff.crosscoder.kernels import Code, Encoded, largest_in_rows
from crossdiff.crosscoder.mesh import Mesh
from crossdiff.crosscoder.sparse_autograd import StraightThroughThreshold, SumOverRanks, TotalShortfall, apply
from crossdiff.errors import UserError
from crossdiff.shapes import Float, Tensor

DENSE_ABOVE = 0.05
"""Share of active latents above which dense products are faster than sparse ones (measured)."""

S = TypeVar("S", bound=Kind)
RULES: dict[type[Kind], type[Rule[Any]]] = {}
"""The rule of each settings class. A rule is entered when its class is defined."""


@dataclass(frozen=True)
class TrainingBatch:
    """One batch as the terms of the loss see it. Gradients flow through `f`, `norms`, `pre_dead`, `decoder_dead` and `weights`.

    Attributes:
        d_model: width of one source.
        x: inputs, `[batch, column]`, in the dtype of the products; error: xhat - x, without gradient.
        f: activations at the pairs of `code`, shaped as `code.values`.
        norms: sum_s ||d_j^s||.
        pre_dead, decoder_dead, norms_dead: pre-activations on every token, decoder rows and norms of the latents that have been
            silent for long, this batch included; empty for a kind that does not revive them.
        weights: the parameters by name.
        weight: of the penalty at this step; shares: each latent's share of it.
        mesh: the ranks that have other tokens of the batch, or other latents.
    """

    d_model: int
    x: Float[Tensor, "batch column"]
    encoded: Encoded
    code: Code
    f: Tensor
    norms: Float[Tensor, " latent"]
    error: Float[Tensor, "batch column"]
    pre_dead: Float[Tensor, "batch dead"]
    decoder_dead: Float[Tensor, "dead column"]
    norms_dead: Float[Tensor, " dead"]
    weights: dict[str, Tensor]
    weight: float
    shares: Float[Tensor, " latent"]
    mesh: Mesh

    def weighted(self, weight: float) -> Float[Tensor, " latent"]:
        """Weight of each latent in a penalty that is a mean over tokens."""
        return self.shares * (weight / self.encoded.n_tokens)


class Rule(ABC, Generic[S]):
    """One kind of sparsity. A kind overrides the methods that it needs."""

    settings_class: ClassVar[type[Kind]]
    compares_latents: ClassVar[bool] = False
    """Whether a latent's activation at inference depends on other latents."""

    def __init_subclass__(cls) -> None:
        if "settings_class" in vars(cls):
            RULES[cls.settings_class] = cls

    def __init__(self, settings: S) -> None:
        self.settings = settings

    @property
    def revives_dead(self) -> bool:
        """Whether the auxiliary loss needs the dead latents."""
        return False

    def own_parameters(self, n_latents: int) -> dict[str, Float[Tensor, " latent"]]:
        """Parameters per latent beside encoder and decoder, at the start of training."""
        return {}

    @abstractmethod
    def code(self, encoded: Encoded, dense_above: float) -> Code:
        """Latent activations at inference; dense only if more than the share `dense_above` is active."""

    def select(self, encoded: Encoded, mesh: Mesh) -> tuple[Code, float | None]:
        """Latent activations of a training batch, and the smallest v that a selection over the batch kept."""
        return self.code(encoded, DENSE_ABOVE), None

    def weight(self, progress: float) -> float:
        """Weight of the penalty after a share `progress` of the run."""
        return 0.0

    def with_threshold(self, f: Tensor, code: Code, encoded: Encoded, weights: dict[str, Tensor]) -> Tensor:
        """The activations f of a code, with the gradient on a threshold where the kind trains one."""
        return f

    def penalty(self, b: TrainingBatch) -> Tensor:
        """The sparsity penalty."""
        return b.error.new_zeros(())

    def auxiliary_loss(self, b: TrainingBatch) -> Tensor:
        """What revives dead latents."""
        return b.error.new_zeros(())

    def check(self, n_latents: int) -> None:
        """Raises `UserError` for settings that no training of this size can have."""


class L1(Rule[L1Config]):
    """f = ReLU(pre); penalty weight * mean_i sum_j f_ij sum_s ||d_j^s|| (docs/method.md#crosscoder; Lindsey et al. 2024)."""

    settings_class = L1Config

    def code(self, encoded: Encoded, dense_above: float) -> Code:
        return encoded.above(0.0, dense_above)

    def weight(self, progress: float) -> float:
        return self.settings.mu * min(1.0, progress / max(self.settings.mu_warmup_share, 1e-12))

    def penalty(self, b: TrainingBatch) -> Tensor:
        penalty: Tensor = (b.weighted(b.weight) * b.code.sum_tokens(b.f) * b.norms).sum()
        return penalty


K = TypeVar("K", BatchTopKConfig, TopKConfig)


class LargestRule(Rule[K]):
    """What the kinds that keep the largest v share: a k, and an auxiliary loss that revives dead latents."""

    @property
    def revives_dead(self) -> bool:
        return self.settings.aux.weight > 0

    def auxiliary_loss(self, b: TrainingBatch) -> Tensor:
        return aux_k(b, self.settings.aux)

    def check(self, n_latents: int) -> None:
        if self.settings.k > n_latents:
            raise UserError(f"k {self.settings.k} is larger than the number of latents {n_latents}; lower k or raise expansion")


class BatchTopK(LargestRule[BatchTopKConfig]):
    """The k * batch largest v of a batch; at inference v > threshold (Bussmann et al. 2024; Minder, Dumas et al. 2025)."""

    settings_class = BatchTopKConfig

    def code(self, encoded: Encoded, dense_above: float) -> Code:
        safe = encoded.norms.clamp(min=torch.finfo(encoded.norms.dtype).tiny)
        return encoded.above(max(encoded.threshold, 0.0) / safe, dense_above)

    def select(self, encoded: Encoded, mesh: Mesh) -> tuple[Code, float | None]:
        return encoded.largest(self.settings.k * encoded.n_tokens * mesh.data.size, mesh.all)


class TopK(LargestRule[TopKConfig]):
    """The k largest v of each token (Gao et al. 2024)."""

    settings_class = TopKConfig
    compares_latents = True

    def code(self, encoded: Encoded, dense_above: float) -> Code:
        return encoded.largest_of_each_token(self.settings.k)

    def select(self, encoded: Encoded, mesh: Mesh) -> tuple[Code, float | None]:
        return encoded.largest_of_each_token(self.settings.k, mesh.latent), None


class JumpReLU(Rule[JumpReLUConfig]):
    """f = pre where pre > theta_j = exp(t_j), else 0.

    Penalty weight * mean_i sum_j tanh(c f_ij n_j) + p * mean_i sum_j ReLU(theta_j - pre_ij) n_j with n_j = sum_s ||d_j^s||; the
    second term is what gives silent latents a gradient. The gradient on theta is straight-through: d f / d theta =
    -(theta / w) where |pre - theta| < w / 2, else 0 (Rajamanoharan et al. 2024; Anthropic, January 2025).
    """

    settings_class = JumpReLUConfig

    def own_parameters(self, n_latents: int) -> dict[str, Float[Tensor, " latent"]]:
        return {"log_threshold": torch.full((n_latents,), math.log(self.settings.threshold))}

    def code(self, encoded: Encoded, dense_above: float) -> Code:
        return encoded.above(encoded.own["log_threshold"].exp(), dense_above)

    def select(self, encoded: Encoded, mesh: Mesh) -> tuple[Code, float | None]:
        """The active pairs, and with f = 0 those in the window below the threshold, which have a gradient too."""
        theta = encoded.own["log_threshold"].exp()
        code = encoded.above(theta - self.settings.bandwidth / 2, DENSE_ABOVE)
        active = code.values > code.of_latents(theta)
        return code.with_values(code.values * active), None

    def weight(self, progress: float) -> float:
        return self.settings.weight * progress

    def with_threshold(self, f: Tensor, code: Code, encoded: Encoded, weights: dict[str, Tensor]) -> Tensor:
        theta = weights["log_threshold"].exp()
        pre = code.of_raw(encoded.raw) + code.of_latents(encoded.bias)
        near = (pre - code.of_latents(theta.detach())).abs() < self.settings.bandwidth / 2
        found: Tensor = apply(StraightThroughThreshold, f, theta, near, code, self.settings.bandwidth)
        return found

    def penalty(self, b: TrainingBatch) -> Tensor:
        bent = torch.tanh(self.settings.tanh_scale * b.f * b.code.of_latents(b.norms))
        sparsity = (b.weighted(b.weight) * b.code.sum_tokens(bent)).sum()
        theta = b.weights["log_threshold"].exp()
        shortfall: Tensor = apply(TotalShortfall, b.weights["encoder"], b.weights["encoder_bias"], theta, b.x, b.encoded.raw)
        return sparsity + (b.weighted(self.settings.pre_activation_weight) * shortfall * b.norms).sum()


def rule_of(settings: Kind) -> Rule[Any]:
    """The rule that belongs to the settings."""
    return RULES[type(settings)](settings)


def aux_k(b: TrainingBatch, settings: AuxConfig) -> Tensor:
    """AuxK (docs/method.md#auxiliary-loss; Gao et al. 2024): the dead latents reconstruct the residual of the others.

    weight * mean_i ||r_i - sum_(j in the k largest v of the dead) f_ij d_j||^2 / mean_i ||r_i - mean r||^2, with the
    residual r = x - xhat detached and without the bias.
    """
    n_dead = b.mesh.latent.total(len(b.norms_dead))
    if not n_dead:
        return b.error.new_zeros(())
    n_tokens = len(b.x)
    mean = b.mesh.data.mean(b.error.mean(0))
    variance = b.mesh.data.mean((b.error - mean).square().sum() / n_tokens)
    k = settings.k if settings.k is not None else max(1, b.d_model // 2)
    f = b.pre_dead.relu()
    if k < n_dead:
        f = f * largest_in_rows(f.detach() * b.norms_dead, k, b.mesh.latent)
    error: Tensor = b.error + apply(SumOverRanks, f @ b.decoder_dead, b.mesh.latent)  # the residual is -b.error
    share = settings.weight / (n_tokens * variance.clamp(min=torch.finfo(variance.dtype).tiny))
    return error.square().sum() * torch.where(variance > 0, share, 0.0)
