"""The kinds of sparsity: which latents are active, and what that adds to the loss and its gradients.

Each kind is one rule, bound to its settings in `config.py` (they live there so that the command line can list them without
loading torch). A new kind is its settings, one line in the union `Sparsity`, and its rule here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch

from crossdiff.config import AuxConfig, BatchTopKConfig, JumpReLUConfig, Kind, L1Config, TopKConfig
from crossdiff.crosscoder.kernels import Code, Encoded, SparseCode, largest_in_rows
from crossdiff.crosscoder.mesh import Mesh
from crossdiff.errors import UserError
from crossdiff.shapes import Float, Int64, Tensor

DENSE_ABOVE = 0.05
"""Share of active latents above which dense products are faster than sparse ones (measured)."""

S = TypeVar("S", bound=Kind)
RULES: dict[type[Kind], type[Rule[Any]]] = {}
"""The rule of each settings class; a rule enters itself when its class is defined."""


@dataclass
class Backward:
    """A batch in the middle of its backward pass; rules add their terms to `on_values` and `gradients` in place.

    Attributes:
        x: inputs, `[batch, column]`; error: xhat - x.
        source_norms: ||d_j^s||.
        on_values: gradient of the loss on f at the code's pairs, shaped as `code.values`.
        gradients: of each parameter, by name.
        weight: the penalty's weight at this step; shares: each latent's share of it.
        dead: latents that have been silent for long, this batch included.
        mesh: the ranks that have other tokens of the batch, or other latents.
    """

    encoded: Encoded
    code: Code
    x: Float[Tensor, "batch column"]
    error: Float[Tensor, "batch column"]
    decoder: Float[Tensor, "latent column"]
    source_norms: Float[Tensor, "latent source"]
    on_values: Tensor
    gradients: dict[str, Tensor]
    weight: float
    shares: Float[Tensor, " latent"]
    dead: Int64[Tensor, " dead"]
    mesh: Mesh

    def add_norm_gradient(self, per_latent: Float[Tensor, " latent"]) -> None:
        """Adds c_j * (gradient of sum_s ||d_j^s||) to the decoder's gradient: c_j d_j^s / ||d_j^s||."""
        weight = per_latent.unsqueeze(1) / self.source_norms.clamp(min=1e-12)
        split = (*self.source_norms.shape, -1)
        self.gradients["decoder"].view(split).addcmul_(self.decoder.view(split), weight.unsqueeze(2))


class Rule(ABC, Generic[S]):
    """One kind of sparsity. The methods that a kind does not need keep their neutral definition."""

    settings_class: ClassVar[type[Kind]]

    def __init_subclass__(cls) -> None:
        RULES[cls.settings_class] = cls

    def __init__(self, settings: S) -> None:
        self.settings = settings

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

    def penalty(self, b: Backward) -> float:
        """The penalty on f. Returns it and adds its gradients on f and on the decoder."""
        return 0.0

    def finish(self, b: Backward) -> tuple[float, float]:
        """What comes after the encoder's gradient. Returns more (penalty, auxiliary loss) and adds their gradients."""
        return 0.0, 0.0

    def check(self, n_latents: int) -> None:
        """Raises `UserError` for settings that no training of this size can have."""


class L1(Rule[L1Config]):
    """f = ReLU(pre); penalty weight * mean_i sum_j f_ij sum_s ||d_j^s||."""

    settings_class = L1Config

    def code(self, encoded: Encoded, dense_above: float) -> Code:
        return encoded.above(0.0, dense_above)

    def weight(self, progress: float) -> float:
        return self.settings.mu * min(1.0, progress / max(self.settings.mu_warmup_share, 1e-12))

    def penalty(self, b: Backward) -> float:
        each = b.shares * (b.weight / b.encoded.n_tokens)
        total = b.code.sum_tokens(b.code.values)
        b.on_values += b.code.of_latents(each * b.encoded.norms)
        b.add_norm_gradient(each * total)
        return float((each * total * b.encoded.norms).sum())


class BatchTopK(Rule[BatchTopKConfig]):
    """The k * batch largest v of a batch; at inference v > threshold."""

    settings_class = BatchTopKConfig

    def code(self, encoded: Encoded, dense_above: float) -> Code:
        safe = encoded.norms.clamp(min=torch.finfo(encoded.norms.dtype).tiny)
        return encoded.above(max(encoded.threshold, 0.0) / safe, dense_above)

    def select(self, encoded: Encoded, mesh: Mesh) -> tuple[Code, float | None]:
        return encoded.largest(self.settings.k * encoded.n_tokens * mesh.data.size, mesh.all)

    def finish(self, b: Backward) -> tuple[float, float]:
        return 0.0, aux_loss(b, self.settings.aux)

    def check(self, n_latents: int) -> None:
        check_k(self.settings.k, n_latents)


class TopK(Rule[TopKConfig]):
    """The k largest v of each token."""

    settings_class = TopKConfig

    def code(self, encoded: Encoded, dense_above: float) -> Code:
        return encoded.largest_of_each_token(self.settings.k)

    def select(self, encoded: Encoded, mesh: Mesh) -> tuple[Code, float | None]:
        return encoded.largest_of_each_token(self.settings.k, mesh.latent), None

    def finish(self, b: Backward) -> tuple[float, float]:
        return 0.0, aux_loss(b, self.settings.aux)

    def check(self, n_latents: int) -> None:
        check_k(self.settings.k, n_latents)


class JumpReLU(Rule[JumpReLUConfig]):
    """f = pre where pre > theta_j = exp(t_j), else 0.

    Penalty weight * mean_i sum_j tanh(c f_ij n_j) + p * mean_i sum_j ReLU(theta_j - pre_ij) n_j with n_j = sum_s ||d_j^s||.
    The gradient on theta is straight-through: d f / d theta = -(theta / w) where |pre - theta| < w / 2, else 0
    (Rajamanoharan et al. 2024; Anthropic, January 2025).
    """

    settings_class = JumpReLUConfig

    def own_parameters(self, n_latents: int) -> dict[str, Float[Tensor, " latent"]]:
        return {"log_threshold": torch.full((n_latents,), math.log(self.settings.threshold))}

    def code(self, encoded: Encoded, dense_above: float) -> Code:
        return encoded.above(encoded.own["log_threshold"].exp(), dense_above)

    def select(self, encoded: Encoded, mesh: Mesh) -> tuple[Code, float | None]:
        """The active pairs, and with f = 0 those of the window under the threshold, which have a gradient too."""
        theta = encoded.own["log_threshold"].exp()
        code = encoded.above(theta - self.settings.bandwidth / 2, DENSE_ABOVE)
        active = code.values > code.of_latents(theta)
        return _replace_values(code, code.values * active), None

    def weight(self, progress: float) -> float:
        return self.settings.weight * progress

    def penalty(self, b: Backward) -> float:
        each, c, norms = b.shares * (b.weight / b.encoded.n_tokens), self.settings.tanh_scale, b.encoded.norms
        bend = torch.tanh(c * b.code.values * b.code.of_latents(norms))
        slope = (1 - bend.square()) * b.code.of_latents(c * each)
        b.on_values += slope * b.code.of_latents(norms)
        b.add_norm_gradient(b.code.sum_tokens(slope * b.code.values))
        return float((each * b.code.sum_tokens(bend)).sum())

    def finish(self, b: Backward) -> tuple[float, float]:
        theta = b.encoded.own["log_threshold"].exp()
        pre = b.code.of_raw(b.encoded.raw) + b.code.of_latents(b.encoded.bias)
        near = (pre - b.code.of_latents(theta)).abs() < self.settings.bandwidth / 2
        slope = -theta.square() / self.settings.bandwidth  # d f / d theta * d theta / d t
        b.gradients["log_threshold"] = slope * b.code.sum_tokens(b.on_values * near)
        return self._pull_up(b, theta), 0.0

    def _pull_up(self, b: Backward, theta: Float[Tensor, " latent"]) -> float:
        """p * mean_i sum_j ReLU(theta_j - pre_ij) n_j and its gradients: what gives silent latents a gradient."""
        each = b.shares * (self.settings.pre_activation_weight / b.encoded.n_tokens)
        gap = (theta - b.encoded.bias) - b.encoded.raw
        below = (gap > 0).to(gap.dtype)
        total, n_below = gap.clamp_(min=0).sum(0), below.sum(0)
        on_pre = each * b.encoded.norms
        b.gradients["encoder"] -= on_pre.unsqueeze(1) * (below.T @ b.x)
        b.gradients["encoder_bias"] -= on_pre * n_below
        b.gradients["log_threshold"] += on_pre * n_below * theta
        b.add_norm_gradient(each * total)
        return float((on_pre * total).sum())


def rule_of(settings: Kind) -> Rule[Any]:
    """The rule that belongs to the settings."""
    return RULES[type(settings)](settings)


def _replace_values(code: Code, values: Tensor) -> Code:
    if isinstance(code, SparseCode):
        return SparseCode(code.token, code.latent, values, code.n_tokens, code.n_latents)
    return type(code)(values, code.mask)


def check_k(k: int, n_latents: int) -> None:
    """Raises `UserError` when k is larger than the number of latents."""
    if k > n_latents:
        raise UserError(f"k {k} is larger than the number of latents {n_latents}; lower k or raise expansion")


def aux_loss(b: Backward, settings: AuxConfig) -> float:
    """AuxK (METHOD: crosscoder; Gao et al. 2024): the dead latents reconstruct what the others left over.

    weight * mean_i ||r_i - sum_(j in the k largest v of the dead) f_ij d_j||^2 / mean_i ||r_i - mean r||^2, with the
    residual r = x - xhat detached and no bias.
    """
    n_dead = b.mesh.latent.total(len(b.dead)) if settings.weight else 0
    if not n_dead:
        return 0.0
    n_tokens, decoder, data = len(b.x), b.decoder[b.dead], b.mesh.data
    mean = data.mean(b.error.mean(0))
    variance = float(data.mean((b.error - mean).square().sum() / n_tokens))
    if variance == 0.0:
        return 0.0
    k = settings.k if settings.k is not None else max(1, b.x.shape[1] // (2 * b.source_norms.shape[1]))
    f = (b.encoded.raw[:, b.dead] + b.encoded.bias[b.dead]).clamp_(min=0)
    if k < n_dead:
        f *= largest_in_rows(f * b.encoded.norms[b.dead], k, b.mesh.latent)
    error = b.error + b.mesh.latent.sum(f @ decoder)  # the residual is -b.error
    on_error = error * (2.0 * settings.weight / (n_tokens * variance))
    on_pre = (on_error @ decoder.T).mul_(f > 0)
    b.gradients["decoder"].index_add_(0, b.dead, f.T @ on_error)
    b.gradients["encoder"].index_add_(0, b.dead, on_pre.T @ b.x)
    b.gradients["encoder_bias"].index_add_(0, b.dead, on_pre.sum(0))
    return settings.weight * float(error.square().sum()) / n_tokens / variance
