"""Latent scaling: how much of each latent's direction is present in each model's error, reconstruction and activation.

    beta_j(y) = sum_i f_ij <y_i, d_j> / (||d_j||^2 sum_i f_ij^2)          (METHOD: latent scaling; Minder, Dumas et al. 2025)

for all latents and all targets in one pass. Since sum_i f_ij <y_i, d_j> = <sum_i f_ij y_i, d_j>, each chunk is summed into one
vector per latent and source, for the reconstruction and for the error, and multiplied with the directions; of every block only
these products are kept. Every target follows:

    reconstruction = <sum f hhat>, activation = reconstruction + <sum f eps>, error = <sum f eps> + sum f^2 <d^m, d_j>

The ratios are the same in the normalised and the models' own space, but for the bias, which is taken in the latter.

A coder with one decoder (an SAE, a diff-SAE) reconstructs no model of the two, or one alone, so that there is no error or
reconstruction to compare. It has the activation targets only: the models' activations themselves along its one direction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.latents.stream import Chunk
from crossdiff.ranks import Ranks
from crossdiff.shapes import Float, Float64, Int64, Tensor
from crossdiff.statistics import Estimate, jackknife_se, ratio

TARGETS = ("error", "reconstruction", "reconstruction_nobias", "activation", "activation_nobias")
OF_ONE_DECODER = ("activation", "activation_nobias")


@dataclass
class Sums:
    """Sums of every block, in float64; sums over disjoint tokens add up.

    Attributes:
        n, f, f2: number of active tokens, sum of f and of f^2, `[block, latent]`.
        products: sum f <y^m, d^t>, `[direction, model, block, latent]`, of y: `reconstruction` and `error`, without bias; of a
            coder with one decoder those of `OF_ONE_DECODER`.
    """

    n: Int64[Tensor, "block latent"]
    f: Float64[Tensor, "block latent"]
    f2: Float64[Tensor, "block latent"]
    products: dict[str, Float64[Tensor, "direction model block latent"]]

    def __add__(self, other: Sums) -> Sums:
        """Merge two passes over disjoint tokens.

        Raises:
            ValueError: they have different latents, blocks, directions, models or targets.
        """
        ours, theirs = ({key: tuple(value.shape) for key, value in sums.products.items()} for sums in (self, other))
        if ours != theirs:
            raise ValueError(f"sums of shapes {ours} and {theirs} do not add up")
        products = {key: value + other.products[key] for key, value in self.products.items()}
        return Sums(self.n + other.n, self.f + other.f, self.f2 + other.f2, products)

    def over(self, ranks: Ranks) -> Sums:
        """Merge the passes of several ranks, in place."""
        for tensor in (self.n, self.f, self.f2, *self.products.values()):
            ranks.sum(tensor)
        return self

    def of_blocks(self, blocks: Int64[Tensor, " block"]) -> Sums:
        """The sums of some blocks alone."""
        products = {key: value[:, :, blocks] for key, value in self.products.items()}
        return Sums(self.n[blocks], self.f[blocks], self.f2[blocks], products)


class ScalingAccumulator:
    """Collects `Sums` from the chunks of a pass, in any order.

    Args:
        directions: `[direction, latent, d_model]` in the normalised space; by default the crosscoder's own,
            one set per source. Others serve as controls.
        means: of the models' activations, for a coder with one decoder.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        n_blocks: int,
        directions: Float[Tensor, "direction latent d_model"] | None = None,
        means: Float[Tensor, "model d_model"] | None = None,
    ) -> None:
        directions = crosscoder.directions() if directions is None else directions
        self._by_latent = directions.transpose(0, 1).contiguous()
        self._one_decoder = None
        if crosscoder.n_sources == 1:
            assert means is not None
            self._one_decoder = (crosscoder.scale, means)
        self._n_models = crosscoder.n_sources if means is None else len(means)
        latents, shape = crosscoder.n_latents, (len(directions), self._n_models, n_blocks, crosscoder.n_latents)
        targets = ("reconstruction", "error") if self._one_decoder is None else OF_ONE_DECODER
        self.sums = Sums(
            n=torch.zeros(n_blocks, latents, dtype=torch.int64),
            f=torch.zeros(n_blocks, latents, dtype=torch.float64),
            f2=torch.zeros(n_blocks, latents, dtype=torch.float64),
            products={target: torch.zeros(shape, dtype=torch.float64) for target in targets},
        )

    def add(self, chunk: Chunk) -> None:
        """Add a chunk. Its own sums are taken in the precision of its activations, what is kept of them in float64."""
        code, block = chunk.code, chunk.block
        wide = code.values.double()
        self.sums.n[block] += code.counts()
        self.sums.f[block] += code.sum_tokens(wide)
        self.sums.f2[block] += code.sum_tokens(wide.square())
        for target, table in self._tables(chunk).items():
            vectors = code.accumulate(code.values, table).view(code.n_latents, self._n_models, -1)
            self.sums.products[target][:, :, block] += torch.einsum("jtd,jsd->tsj", self._by_latent, vectors)

    def _tables(self, chunk: Chunk) -> dict[str, Float[Tensor, "token column"]]:
        """What is summed into a vector per latent and model."""
        if self._one_decoder is None:
            return {"reconstruction": chunk.reconstruction, "error": chunk.error}
        scale, means = self._one_decoder
        centred = chunk.h - means.to(chunk.h)
        return {"activation": chunk.h.flatten(1) * scale, "activation_nobias": centred.flatten(1) * scale}

    def finish(self) -> Sums:
        """The sums of all blocks."""
        return self.sums


@dataclass(frozen=True)
class Beta:
    """A beta per latent with its jackknife standard error."""

    value: Float64[Tensor, " latent"]
    se: Float64[Tensor, " latent"]


def numerators(
    crosscoder: Crosscoder, sums: Sums, direction: int, directions: Float[Tensor, "direction latent d_model"] | None = None
) -> dict[str, Float64[Tensor, "source block latent"]]:
    """sum_i f <y_i^m, d_j> of every target, for each model m and block.

    Args:
        direction: among the coder's own directions, or among `directions` where they are given; negative from the end.
    """
    direction = range(crosscoder.n_sources if directions is None else len(directions))[direction]
    products = {target: values[direction] for target, values in sums.products.items()}
    if crosscoder.n_sources == 1:
        return products
    own = crosscoder.directions().double()
    d = (own if directions is None else directions.double())[direction]
    bias = crosscoder.decoder_bias.view(crosscoder.n_sources, -1).double() + crosscoder.mean.double() * crosscoder.scale
    on_bias = torch.einsum("sd,jd->sj", bias, d).unsqueeze(1) * sums.f
    on_self = torch.einsum("sjd,jd->sj", own, d).unsqueeze(1) * sums.f2
    reconstruction, error = products["reconstruction"], products["error"]
    return {
        "error": error + on_self,
        "reconstruction": reconstruction + on_bias,
        "reconstruction_nobias": reconstruction,
        "activation": reconstruction + error + on_bias,
        "activation_nobias": reconstruction + error,
    }


def _without_each(values: Float64[Tensor, "... block latent"]) -> Float64[Tensor, "... block latent"]:
    return values.sum(-2, keepdim=True) - values


@dataclass(frozen=True)
class Scaling:
    """Betas and nus of one direction for all latents.

    Attributes:
        betas: `(target, model)` -> beta.
        nus: target -> beta(numerator) / beta(denominator); NaN where the denominator's interval contains 0.
    """

    betas: dict[tuple[str, int], Beta]
    nus: dict[str, Estimate[Tensor]]


def scaling(
    crosscoder: Crosscoder,
    sums: Sums,
    direction: int,
    numerator: int,
    denominator: int,
    directions: Float[Tensor, "direction latent d_model"] | None = None,
    targets: Iterable[str] = TARGETS,
) -> Scaling:
    """Estimates along `direction` (of the accumulator's), of those targets that the coder has; nu is beta of model `numerator`
    over beta of model `denominator`."""
    d = (crosscoder.directions() if directions is None else directions)[direction].double()
    square = d.square().sum(1)
    whole, parts = square * sums.f2.sum(0), square * _without_each(sums.f2)
    betas, nus = {}, {}
    every = numerators(crosscoder, sums, direction, directions)
    for target in filter(every.__contains__, targets):
        value, left_out = every[target].sum(1) / whole, _without_each(every[target]) / parts
        for model in range(len(value)):
            betas[target, model] = Beta(value[model], jackknife_se(left_out[model]))
        nus[target] = ratio(value[numerator], value[denominator], left_out[numerator], left_out[denominator])
    return Scaling(betas, nus)
