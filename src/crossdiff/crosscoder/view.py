"""What a coder reads: every stored source, one of them, or their difference, as a linear map."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crossdiff.config import DifferenceConfig, Inputs, SingleConfig
from crossdiff.errors import UserError
from crossdiff.shapes import Float, Tensor
from crossdiff.sources import SOURCES


@dataclass(frozen=True)
class View:
    """The linear map x_v = sum_s matrix_vs h_s: the identity on some sources, or the difference of two.

    Attributes:
        reads: names of the stored sources, one per column of the matrix.
        names: names of the results, one per row.
    """

    matrix: Float[Tensor, "view source"]
    reads: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def is_identity(self) -> bool:
        return self.reads == self.names

    def apply(self, h: Float[Tensor, "batch source d_model"]) -> Float[Tensor, "batch view d_model"]:
        """Apply the map to activations, or to anything linear in them."""
        return h if self.is_identity else torch.einsum("vs,bsd->bvd", self.matrix.to(h), h)

    def writes(self) -> tuple[str, ...]:
        """The stored sources whose activations a reconstruction of the view determines."""
        return self.names if self.is_identity else self.reads[-1:]

    def written(
        self, h: Float[Tensor, "batch source d_model"], reconstruction: Float[Tensor, "batch view d_model"]
    ) -> dict[str, Float[Tensor, "batch d_model"]]:
        """Reconstructed activations of each source that the view writes; a difference is added to those of the base model."""
        if self.is_identity:
            return {name: reconstruction[:, i] for i, name in enumerate(self.names)}
        return {self.reads[-1]: h[:, 0] + reconstruction[:, 0]}


def identity(names: tuple[str, ...] = SOURCES) -> View:
    """The view that leaves the sources as they are."""
    return View(torch.eye(len(names)), names, names)


def view_of(inputs: Inputs, sources: tuple[str, ...]) -> View:
    """The view of a store's sources that the settings describe."""
    if isinstance(inputs, SingleConfig):
        if inputs.source not in sources:
            raise UserError(f"inputs.source {inputs.source!r} is not in the store; it has {', '.join(sources)}")
        return identity((inputs.source,))
    if isinstance(inputs, DifferenceConfig):
        before, after = inputs.of
        for name in inputs.of:
            if name not in sources:
                raise UserError(f"inputs.of has {name!r}, which is not in the store; it has {', '.join(sources)}")
        return View(torch.tensor([[-1.0, 1.0]]), (before, after), (f"{after}-{before}",))
    return identity(sources)
