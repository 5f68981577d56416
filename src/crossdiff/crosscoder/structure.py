"""How latents are tied between sources: not at all, by one decoder for all sources, or by belonging to one source only.

A constraint holds throughout because the parameters satisfy it at the start and every gradient is projected onto it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from crossdiff.config import CrosscoderConfig, DesignatedConfig, FreeConfig, PartitionedConfig, Structure
from crossdiff.crosscoder.sparsity import rule_of
from crossdiff.crosscoder.view import view_of
from crossdiff.errors import UserError
from crossdiff.shapes import Bool, Float, Tensor


@dataclass(frozen=True)
class Constraint:
    """The constraint on each latent.

    Attributes:
        tied: whether it has the same decoder direction in every source (Anthropic, February 2025).
        present: whether it has an encoder and a decoder direction in a source (DFC, arXiv 2602.11729).
        shares: its share of the sparsity penalty.
    """

    tied: Bool[Tensor, " latent"]
    present: Bool[Tensor, "latent source"]
    shares: Float[Tensor, " latent"]

    @cached_property
    def is_free(self) -> bool:
        return not bool(self.tied.any()) and bool(self.present.all())

    def of_latents(self, part: slice) -> Constraint:
        """The constraint on some of the latents."""
        return Constraint(self.tied[part], self.present[part], self.shares[part])

    def to(self, device: torch.device) -> Constraint:
        """The same constraint with its tensors on a device."""
        return Constraint(self.tied.to(device), self.present.to(device), self.shares.to(device))

    def settle(self, parameters: dict[str, Tensor]) -> None:
        """Make parameters satisfy the constraint, in place: a tied direction becomes the mean over the sources."""
        if self.is_free:
            return
        decoder = parameters["decoder"].view(*self.present.shape, -1)
        decoder[self.tied] = decoder[self.tied].mean(1, keepdim=True).expand(-1, self.present.shape[1], -1)
        self._remove_absent(parameters)

    def project(self, gradients: dict[str, Tensor]) -> None:
        """Project gradients onto the constraint, in place.

        A tied direction is one parameter used in every source, so its gradient is the sum over the sources.
        """
        if self.is_free:
            return
        decoder = gradients["decoder"].view(*self.present.shape, -1)
        decoder[self.tied] = decoder[self.tied].sum(1, keepdim=True).expand(-1, self.present.shape[1], -1)
        self._remove_absent(gradients)

    def _remove_absent(self, tensors: dict[str, Tensor]) -> None:
        for name in ("encoder", "decoder"):
            tensors[name].view(*self.present.shape, -1).mul_(self.present.unsqueeze(2))


def constraint_of(settings: Structure, n_latents: int, n_sources: int) -> Constraint:
    """The constraint on `n_latents` latents; the constrained ones are the first."""
    tied = torch.zeros(n_latents, dtype=torch.bool)
    present = torch.ones(n_latents, n_sources, dtype=torch.bool)
    shares = torch.ones(n_latents)
    n_group = _group_size(settings, n_latents, n_sources)
    if isinstance(settings, DesignatedConfig):
        tied[:n_group] = True
        shares[:n_group] = settings.penalty_factor
    elif isinstance(settings, PartitionedConfig):
        for source in range(n_sources):
            group = slice(source * n_group, (source + 1) * n_group)
            present[group] = False
            present[group, source] = True
    else:
        assert isinstance(settings, FreeConfig)
    return Constraint(tied, present, shares)


def check_sizes(config: CrosscoderConfig, d_model: int, sources: tuple[str, ...]) -> None:
    """Check that a crosscoder's settings fit its size and the sources, before anything is harvested for it."""
    n_latents = config.latents_for(d_model)
    rule_of(config.sparsity).check(n_latents)
    _group_size(config.structure, n_latents, len(view_of(config.inputs, sources).names))


def _group_size(settings: Structure, n_latents: int, n_sources: int) -> int:
    """Number of latents that are constrained together: the tied ones, or those of each source; 0 without a constraint."""
    if isinstance(settings, DesignatedConfig):
        name, share, most = "shared_share", settings.shared_share, n_latents
    elif isinstance(settings, PartitionedConfig):
        name, share, most = "exclusive_share", settings.exclusive_share, n_latents // n_sources
    else:
        return 0
    n_group = round(share * n_latents)
    if not 1 <= n_group <= most:
        raise UserError(
            f"structure.{name} {share} makes a group of {n_group} latents; with these sizes, a group can have 1 to {most}"
        )
    return n_group
