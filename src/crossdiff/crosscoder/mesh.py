"""How ranks share a training: they split the tokens of a batch, the latents of the crosscoder, or both.

With the latents split, each rank holds the weights, moments and counters of its latents and reads the whole batch. The ranks
exchange the reconstruction, `[batch, source, d_model]`, and the candidates of a selection, whatever the number of latents.
With the batch split, each rank holds all latents, and the ranks exchange their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from crossdiff.errors import UserError
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """The ranks `all` as a grid: the `data` ranks split the batch, the `latent` ranks split the latents."""

    data: Ranks = ALONE
    latent: Ranks = ALONE
    all: Ranks = ALONE
    device_mesh: DeviceMesh | None = None

    def placed(self, part: Tensor, n_rows: int | None) -> Tensor:
        """This rank's part of a tensor as a distributed tensor, which is how checkpoints store it.

        Args:
            n_rows: rows of the full tensor, of which this rank has `latent.part(n_rows)`; None when every rank has all of it.
        """
        if self.device_mesh is None:
            return part
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if n_rows is None:
            return DTensor.from_local(part, self.device_mesh, [Replicate(), Replicate()], run_check=False)
        shape = torch.Size((n_rows, *part.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        placements = [Replicate(), Shard(0)]
        return DTensor.from_local(part, self.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def number_of_latent_ranks(ranks: Ranks, latent_ranks: int | None) -> int:
    """Over how many processes the latents are split; a process alone has all of them.

    Raises:
        UserError: the number that the settings name does not divide the processes.
    """
    n_latent = ranks.size if latent_ranks is None or ranks.size == 1 else latent_ranks
    if ranks.size % n_latent:
        raise UserError(f"latent_ranks {n_latent} does not divide the {ranks.size} processes; choose a divisor")
    return n_latent


def mesh_of(ranks: Ranks, latent_ranks: int | None, device: torch.device) -> Mesh:
    """Split the latents over `latent_ranks` of the ranks (None: all of them) and the batch over the others."""
    if ranks.size == 1:
        return Mesh()
    from torch.distributed.device_mesh import init_device_mesh

    n_latent = number_of_latent_ranks(ranks, latent_ranks)
    mesh = init_device_mesh(device.type, (ranks.size // n_latent, n_latent), mesh_dim_names=("data", "latent"))
    data, latent = (
        Ranks(mesh.get_local_rank(name), mesh.size(index), mesh.get_group(name)) if mesh.size(index) > 1 else ALONE
        for index, name in enumerate(("data", "latent"))
    )
    return Mesh(data, latent, ranks, mesh)
