"""Optimiser and checkpoints of the training scripts."""

import os
from pathlib import Path

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al. 2024) on a stack `[matrix, row, column]` with row <= column.

    In float32: `torch.optim.Muon` iterates in bfloat16, which is forty times slower on CPUs that lack it.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. Updates have the root mean square of an Adam step (0.2 per unit of learning rate)."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            stacks: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                stacks.setdefault(torch.Size(sorted(parameter.shape)), []).append(parameter)
            for shape, parameters in stacks.items():
                directions = []
                for parameter in parameters:
                    velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                    velocity.lerp_(parameter.grad, 1 - group["momentum"])
                    direction = parameter.grad.lerp(velocity, group["momentum"])
                    directions.append(direction if direction.shape == shape else direction.mT)
                updates = orthogonalise(torch.stack(directions))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update = update if update.shape == parameter.shape else update.mT
                    parameter.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def save_checkpoint(path: Path, **state: object) -> None:
    """Write to a temporary file, sync and rename, so that a kill leaves the previous checkpoint intact."""
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
