"""Latent scaling: how much of each latent's direction is present in each model's error, reconstruction and activation.

    beta_j(y) = sum_i f_ij <y_i, d_j> / (||d_j||^2 sum_i f_ij^2)    (docs/method.md#latent-scaling; Minder, Dumas et al. 2025)

All latents and targets are measured in one pass. Since sum_i f_ij <y_i, d_j> = <sum_i f_ij y_i, d_j>, each chunk is summed into
one vector per latent and source, for the reconstruction and for the error, and multiplied with the directions. Only these
products are kept, per block of documents. Every target follows from them:

    reconstruction = <sum f hhat>, activation = reconstruction + <sum f eps>, error = <sum f eps> + sum f^2 <d^m, d_j>

The ratios are the same in the normalised space and in the models' own space, except for the bias, which is that of the latter.

A coder with one decoder (an SAE, a diff-SAE) does not reconstruct both models, so there is no error or reconstruction to
compare. It has the activation targets only: the models' activations along its one direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.errors import UserError
from crossdiff.files import replacing
from crossdiff.integrity import intact
from crossdiff.latents.stream import Chunk
from crossdiff.ranks import Ranks
from crossdiff.shapes import Float, Float64, Int64, Tensor
from crossdiff.statistics import Estimate, jackknife_se, ratio

TARGETS = ("error", "reconstruction", "reconstruction_nobias", "activation", "activation_nobias")
TARGETS_OF_ONE_DECODER = ("activation", "activation_nobias")


@dataclass
class Sums:
    """Sums per block, in float64.

    Attributes:
        directions: the measured directions in the normalised space: the crosscoder's own, one set per source, then others.
        n, f, f2: number of active tokens, sum of f and of f^2, `[block, latent]`.
        products: sum f <y^m, d^t>, `[direction, model, block, latent]`, where y is `reconstruction` or `error`, without bias;
            for a coder with one decoder, one of `TARGETS_OF_ONE_DECODER`.
    """

    directions: Float[Tensor, "direction latent d_model"]
    n: Int64[Tensor, "block latent"]
    f: Float64[Tensor, "block latent"]
    f2: Float64[Tensor, "block latent"]
    products: dict[str, Float64[Tensor, "direction model block latent"]]

    def of_blocks(self, blocks: Int64[Tensor, " block"]) -> Sums:
        """The sums of some blocks alone."""
        products = {key: value[:, :, blocks] for key, value in self.products.items()}
        return Sums(self.directions, self.n[blocks], self.f[blocks], self.f2[blocks], products)

    def of_latents(self, latents: Int64[Tensor, " chosen"]) -> Sums:
        """The sums of some latents alone, in the order given."""
        products = {key: value[..., latents] for key, value in self.products.items()}
        return Sums(self.directions[:, latents], self.n[:, latents], self.f[:, latents], self.f2[:, latents], products)

    def save(self, path: Path) -> None:
        """Write the sums, from which `crossdiff.concepts` computes the latent scaling of groups of latents."""
        fixed = {"directions": self.directions, "n": self.n, "f": self.f, "f2": self.f2}
        tensors = fixed | {f"products.{target}": values for target, values in self.products.items()}
        with replacing(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)

    @classmethod
    def load(cls, path: Path) -> Sums:
        """Read what `save` wrote. A `UserError` names a file that is missing or damaged."""
        try:
            tensors = load_file(intact(path))
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path}: {error}; run `crossdiff analyze` again") from None
        products = {name.removeprefix("products."): tensors.pop(name) for name in list(tensors) if "." in name}
        return cls(**tensors, products=products)


class ScalingAccumulator:
    """Collects `sums` from the chunks of a pass, on the device of the directions until `over` brings them to the host.

    Args:
        directions: those of `Sums`; by default the crosscoder's own.
        means: mean activations of the models; needed for a coder with one decoder.
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
        self._n_models = crosscoder.n_sources if self._one_decoder is None else len(self._one_decoder[1])
        targets = ("reconstruction", "error") if self._one_decoder is None else TARGETS_OF_ONE_DECODER
        per_block = (n_blocks, crosscoder.n_latents)
        per_pair = (len(directions), self._n_models, *per_block)
        self.sums = Sums(
            directions=directions,
            n=torch.zeros(per_block, dtype=torch.int64, device=directions.device),
            f=torch.zeros(per_block, dtype=torch.float64, device=directions.device),
            f2=torch.zeros(per_block, dtype=torch.float64, device=directions.device),
            products={target: torch.zeros(per_pair, dtype=torch.float64, device=directions.device) for target in targets},
        )

    def add(self, chunk: Chunk) -> None:
        """Add a chunk. Sums within it have the precision of its activations; sums over chunks are in float64."""
        code = chunk.code
        block = chunk.block
        wide = code.values.double()
        self.sums.n[block] += code.counts()
        self.sums.f[block] += code.sum_tokens(wide)
        self.sums.f2[block] += code.sum_tokens(wide.square())
        for target, y in self._targets(chunk).items():
            self.sums.products[target][:, :, block] += code.accumulate_along(y, self._by_latent)

    def _targets(self, chunk: Chunk) -> dict[str, Float[Tensor, "token column"]]:
        """The vectors that are summed per latent and model."""
        if self._one_decoder is None:
            return {"reconstruction": chunk.reconstruction, "error": chunk.error}
        scale, means = self._one_decoder
        centred = chunk.h - means.to(chunk.h)
        return {"activation": chunk.h.flatten(1) * scale, "activation_nobias": centred.flatten(1) * scale}

    def over(self, ranks: Ranks) -> ScalingAccumulator:
        """Merge the passes of several ranks, in place, and bring the sums to the host."""
        sums = self.sums
        self.sums = Sums(
            directions=sums.directions.cpu(),
            n=ranks.sum(sums.n).cpu(),
            f=ranks.sum(sums.f).cpu(),
            f2=ranks.sum(sums.f2).cpu(),
            products={target: ranks.sum(values).cpu() for target, values in sums.products.items()},
        )
        return self


class Beta(NamedTuple):
    """A beta per latent with its jackknife standard error."""

    value: Float64[Tensor, " latent"]
    se: Float64[Tensor, " latent"]


class Scaling(NamedTuple):
    """Betas and nus along one direction for all latents.

    Attributes:
        betas: `(target, model)` -> beta.
        nus: target -> beta(numerator) / beta(denominator); NaN where the denominator's interval contains 0.
    """

    betas: dict[tuple[str, int], Beta]
    nus: dict[str, Estimate[Tensor]]


def numerators(crosscoder: Crosscoder, sums: Sums, direction: int) -> dict[str, Float64[Tensor, "source block latent"]]:
    """sum_i f <y_i^m, d_j> of every target that the coder has, for each model m and block.

    Args:
        direction: index into `sums.directions`; negative counts from the end of the coder's own.
    """
    products = {target: values[_position(crosscoder, direction)] for target, values in sums.products.items()}
    if crosscoder.n_sources == 1:
        return products
    own = crosscoder.directions().double()
    d = sums.directions[_position(crosscoder, direction)].double()
    bias = crosscoder.decoder_bias.view(crosscoder.n_sources, -1).double() + crosscoder.mean.double() * crosscoder.scale
    on_bias = torch.einsum("sd,jd->sj", bias, d).unsqueeze(1) * sums.f
    on_self = torch.einsum("sjd,jd->sj", own, d).unsqueeze(1) * sums.f2
    reconstruction = products["reconstruction"]
    error = products["error"]
    return {
        "error": error + on_self,
        "reconstruction": reconstruction + on_bias,
        "reconstruction_nobias": reconstruction,
        "activation": reconstruction + error + on_bias,
        "activation_nobias": reconstruction + error,
    }


def _position(crosscoder: Crosscoder, direction: int) -> int:
    return direction if direction >= 0 else crosscoder.n_sources + direction


def _without_each(values: Float64[Tensor, "... block latent"]) -> Float64[Tensor, "... block latent"]:
    """Sums over all blocks but one."""
    return values.sum(-2, keepdim=True) - values


def scaling(
    crosscoder: Crosscoder,
    sums: Sums,
    direction: int,
    numerator: int,
    denominator: int,
    targets: Iterable[str] = TARGETS,
) -> Scaling:
    """Estimates along a direction, for those targets that the coder has.

    Args:
        direction: as in `numerators`.
        numerator, denominator: the models whose betas nu divides.
    """
    square = sums.directions[_position(crosscoder, direction)].double().square().sum(1) * sums.f2
    found = numerators(crosscoder, sums, direction)
    return estimates({name: found[name] for name in targets if name in found}, square, numerator, denominator)


def estimates(
    found: Mapping[str, Float64[Tensor, "model block unit"]],
    square: Float64[Tensor, "block unit"],
    numerator: int,
    denominator: int,
) -> Scaling:
    """Betas and nus of latents, or of groups of latents, from sums per block.

    Args:
        found: target -> sum_i <y_i^m, g_i>, where g_i is the unit's contribution f_ij d_j (or that of a group).
        square: sum_i ||g_i||^2.
        numerator, denominator: the models whose betas nu divides.
    """
    whole, left_out_square = square.sum(0), _without_each(square)
    betas, nus = {}, {}
    for target, sums in found.items():
        value = sums.sum(1) / whole
        left_out = _without_each(sums) / left_out_square
        for model in range(len(value)):
            betas[target, model] = Beta(value[model], jackknife_se(left_out[model]))
        nus[target] = ratio(value[numerator], value[denominator], left_out[numerator], left_out[denominator])
    return Scaling(betas, nus)
