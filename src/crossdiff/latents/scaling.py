"""Latent scaling: how much of each latent's direction is present in each model's error, reconstruction and activation.

    beta_j(y) = sum_i f_ij <y_i, d_j> / (||d_j||^2 sum_i f_ij^2)          (METHOD: latent scaling; Minder, Dumas et al. 2025)

for all latents and all targets in one pass. Since sum_i f_ij <y_i, d_j> = <sum_i f_ij y_i, d_j>, each chunk is summed into one
vector per latent and source, for the reconstruction and for the error, and multiplied with the directions; of every block only
these products are kept. Every target follows:

    reconstruction = <sum f hhat>, activation = reconstruction + <sum f eps>, error = <sum f eps> + sum f^2 <d^m, d_j>

The ratios are the same in the normalised and the models' own space, but for the bias, which is taken in the latter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy.stats import t as student

from crossdiff.crosscoder.model import Crosscoder
from crossdiff.latents.stream import Chunk
from crossdiff.shapes import Float, Float64, Int64, Tensor

TARGETS = ("error", "reconstruction", "reconstruction_nobias", "activation", "activation_nobias")
CONFIDENCE = 0.95


@dataclass
class Sums:
    """Sums of every block, in float64; sums over disjoint tokens add up.

    Attributes:
        n, f, f2: number of active tokens, sum of f and of f^2, `[block, latent]`.
        reconstruction, error: sum f <y^m, d^t> with y without bias, `[direction, source, block, latent]`.
    """

    n: Int64[Tensor, "block latent"]
    f: Float64[Tensor, "block latent"]
    f2: Float64[Tensor, "block latent"]
    reconstruction: Float64[Tensor, "direction source block latent"]
    error: Float64[Tensor, "direction source block latent"]

    def __add__(self, other: Sums) -> Sums:
        """Merge two passes over disjoint tokens.

        Raises:
            ValueError: they have different latents, blocks, directions or sources.
        """
        if self.error.shape != other.error.shape:
            raise ValueError(f"sums of shapes {tuple(self.error.shape)} and {tuple(other.error.shape)} do not add up")
        return Sums(*(getattr(self, key) + getattr(other, key) for key in self.__dataclass_fields__))


class ScalingAccumulator:
    """Collects `Sums` from the chunks of a pass, in any order.

    Args:
        directions: `[direction, latent, d_model]` in the normalised space; by default the crosscoder's own,
            one set per source. Others serve as controls.
    """

    def __init__(
        self, crosscoder: Crosscoder, n_blocks: int, directions: Float[Tensor, "direction latent d_model"] | None = None
    ) -> None:
        directions = crosscoder.directions() if directions is None else directions
        self._by_latent = directions.transpose(0, 1).contiguous()
        self.n_sources, latents = crosscoder.n_sources, crosscoder.n_latents
        shape = (len(directions), self.n_sources, n_blocks, latents)
        self.sums = Sums(
            n=torch.zeros(n_blocks, latents, dtype=torch.int64),
            f=torch.zeros(n_blocks, latents, dtype=torch.float64),
            f2=torch.zeros(n_blocks, latents, dtype=torch.float64),
            reconstruction=torch.zeros(shape, dtype=torch.float64),
            error=torch.zeros(shape, dtype=torch.float64),
        )

    def add(self, chunk: Chunk) -> None:
        """Add a chunk. Its own sums are taken in the precision of its activations, what is kept of them in float64."""
        code, block = chunk.code, chunk.block
        wide = code.values.double()
        self.sums.n[block] += code.counts()
        self.sums.f[block] += code.sum_tokens(wide)
        self.sums.f2[block] += code.sum_tokens(wide.square())
        for target, table in ((self.sums.reconstruction, chunk.reconstruction), (self.sums.error, chunk.error)):
            vectors = code.accumulate(code.values, table).view(code.n_latents, self.n_sources, -1)
            target[:, :, block] += torch.einsum("jtd,jsd->tsj", self._by_latent, vectors)

    def finish(self) -> Sums:
        """The sums of all blocks."""
        return self.sums


@dataclass(frozen=True)
class Estimate:
    """A quantity per latent with its jackknife standard error and 95% interval."""

    value: Float64[Tensor, " latent"]
    se: Float64[Tensor, " latent"]

    def __post_init__(self) -> None:
        assert self.value.shape == self.se.shape

    def half_width(self, n_blocks: int) -> Float64[Tensor, " latent"]:
        return self.se * float(student.ppf(0.5 + CONFIDENCE / 2, n_blocks - 1))


def numerators(
    crosscoder: Crosscoder, sums: Sums, direction: int, directions: Float[Tensor, "direction latent d_model"] | None = None
) -> dict[str, Float64[Tensor, "source block latent"]]:
    """sum_i f <y_i^m, d_j> of every target, for each source m and block."""
    own = crosscoder.directions().double()
    d = (own if directions is None else directions.double())[direction]
    bias = crosscoder.decoder_bias.view(crosscoder.n_sources, -1).double() + crosscoder.mean.double() * crosscoder.scale
    on_bias = torch.einsum("sd,jd->sj", bias, d).unsqueeze(1) * sums.f
    on_self = torch.einsum("sjd,jd->sj", own, d).unsqueeze(1) * sums.f2
    reconstruction, error = sums.reconstruction[direction], sums.error[direction]
    return {
        "error": error + on_self,
        "reconstruction": reconstruction + on_bias,
        "reconstruction_nobias": reconstruction,
        "activation": reconstruction + error + on_bias,
        "activation_nobias": reconstruction + error,
    }


def jackknife(values: Float64[Tensor, "block latent"]) -> Float64[Tensor, " latent"]:
    """Standard error from the leave-one-block-out values (Efron & Stein 1981)."""
    n_blocks = len(values)
    return ((n_blocks - 1) * (values - values.mean(0)).square().mean(0)).sqrt()


def _without_each(values: Float64[Tensor, "... block latent"]) -> Float64[Tensor, "... block latent"]:
    return values.sum(-2, keepdim=True) - values


@dataclass(frozen=True)
class Scaling:
    """Betas and nus of one direction for all latents.

    Attributes:
        betas: `(target, source index)` -> estimate.
        nus: target -> estimate of beta(numerator source) / beta(denominator source).
        undefined: target -> `[latent]`, True where the denominator's interval contains 0.
    """

    betas: dict[tuple[str, int], Estimate]
    nus: dict[str, Estimate]
    undefined: dict[str, Tensor]


def scaling(
    crosscoder: Crosscoder,
    sums: Sums,
    direction: int,
    numerator: int,
    denominator: int,
    directions: Float[Tensor, "direction latent d_model"] | None = None,
    targets: Iterable[str] = TARGETS,
) -> Scaling:
    """Estimates along `direction` (of the accumulator's); nu is beta(source `numerator`) over beta(source `denominator`)."""
    d = (crosscoder.directions() if directions is None else directions)[direction].double()
    square = d.square().sum(1)
    whole, parts = square * sums.f2.sum(0), square * _without_each(sums.f2)
    betas, nus, undefined = {}, {}, {}
    n_blocks = len(sums.f2)
    every = numerators(crosscoder, sums, direction, directions)
    for target in targets:
        value, left_out = every[target].sum(1) / whole, _without_each(every[target]) / parts
        for source in range(crosscoder.n_sources):
            betas[target, source] = Estimate(value[source], jackknife(left_out[source]))
        if crosscoder.n_sources == 1:
            continue
        under = betas[target, denominator]
        nus[target] = Estimate(value[numerator] / value[denominator], jackknife(left_out[numerator] / left_out[denominator]))
        undefined[target] = ~(under.value.abs() > under.half_width(n_blocks))
    return Scaling(betas, nus, undefined)
