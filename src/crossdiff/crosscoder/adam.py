"""Adam on clipped gradients, with moments in float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from crossdiff.crosscoder import gpu
from crossdiff.shapes import Float, Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015) without weight decay.

    Moments in bfloat16 are rounded up or down at random, with a chance that keeps their mean. Rounded to the nearest number,
    small decreases of the second moment would be lost: it changes by less than bfloat16 can tell.

    Attributes:
        parameters: updated in place; first, second: their moments.
        copies: the same parameters in the dtype of the products, kept up to date; the parameters themselves where they serve.
        seed: of the rounding.
    """

    parameters: Mapping[str, Tensor]
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], moments: torch.dtype, products: torch.dtype, seed: int) -> Adam:
        """Adam at its start, with the copies of encoder and decoder that the products need."""
        first, second = ({name: torch.zeros_like(p, dtype=moments) for name, p in parameters.items()} for _ in range(2))
        copies = {name: parameters[name].to(products) for name in ("encoder", "decoder")}
        return cls(parameters, first, second, copies, seed)

    def refresh(self) -> None:
        """Bring the copies up to date after a change of the parameters from outside."""
        for name, copy in self.copies.items():
            if copy is not self.parameters[name]:
                copy.copy_(self.parameters[name])

    def update(self, gradients: Mapping[str, Tensor], scale: Float[Tensor, ""], rate: float, step: int) -> None:
        """Make one update.

        Args:
            scale: what the gradients are divided by, for clipping. Nothing is updated if it is not finite.
            step: number of the update, from 1.
        """
        names = list(self.parameters)
        seeds = {name: (self.seed * 8191 + step) * len(names) + index for index, name in enumerate(names)}
        if gpu.has_kernels(scale):
            for name in names:
                copy = self.copies.get(name)
                gpu.kernels().adam(
                    self.parameters[name], gradients[name], self.first[name], self.second[name],
                    None if copy is self.parameters[name] else copy, scale, rate, step, seeds[name] % 2**31,
                )  # fmt: skip
            return
        first, second = ([moments[name].float() for name in names] for moments in (self.first, self.second))
        torch._fused_adam_(
            [self.parameters[name] for name in names], [gradients[name] for name in names], first, second, [],
            [torch.tensor(float(step), device=scale.device) for _ in names],
            lr=rate, beta1=BETA1, beta2=BETA2, weight_decay=0.0, eps=EPSILON, amsgrad=False, maximize=False, grad_scale=scale,
            found_inf=(~torch.isfinite(scale)).float(),
        )  # fmt: skip
        for moments, found in ((self.first, first), (self.second, second)):
            for name, new in zip(names, found, strict=True):
                if new is not moments[name]:
                    moments[name].copy_(rounded_at_random(new, seeds[name]))
        self.refresh()


def rounded_at_random(x: Float[Tensor, "..."], seed: int) -> Float[Tensor, "..."]:
    """The numbers, each rounded to one of the two nearest in bfloat16 with a chance that keeps its mean."""
    generator = torch.Generator(x.device).manual_seed(seed)
    drawn = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + drawn) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
