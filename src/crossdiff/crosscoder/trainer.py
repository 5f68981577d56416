"""Training of one crosscoder: schedules, Adam on clipped gradients, the inference threshold, dead latents."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from crossdiff.config import BatchTopKConfig, CrosscoderConfig, L1Config
from crossdiff.crosscoder.adam import Adam
from crossdiff.crosscoder.checkpoint import TrainingState
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.kernels import product_dtype
from crossdiff.crosscoder.losses import Loss, StepResult, TokensSinceFired
from crossdiff.crosscoder.mesh import Mesh
from crossdiff.crosscoder.structure import constraint_of
from crossdiff.errors import UserError
from crossdiff.files import fingerprint
from crossdiff.shapes import Float, Float64, Tensor

GUESS_MARGIN = 0.93
"""The k-th largest v moves by a few percent from batch to batch; the search starts a little below the last one."""
RESAMPLED_ENCODER = 0.2
"""Norm of a resampled latent's encoder direction over the mean of the live ones (Bricken et al. 2023)."""

EVERYWHERE = "decoder_bias"
"""The parameter that does not belong to a latent, so every rank has all of it."""


class Diverged(Exception):
    """A training cannot continue; the message says what was found. step: number of the step that went wrong, if it is known."""

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Schedule:
    """Everything that depends on the step number alone."""

    n_steps: int
    config: CrosscoderConfig

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, linear decay to 0."""
        up = (step + 1) / max(1, self.config.warmup_steps)
        down = (self.n_steps - step) / max(1.0, self.config.decay_share * self.n_steps)
        return self.config.lr * min(1.0, up, down)

    @property
    def dead_after(self) -> int:
        """Tokens after which a silent latent is dead (docs/method.md#auxiliary-loss: min(10M, 5% of the run's tokens))."""
        given = self.config.dead_after_tokens
        return given if given is not None else min(10_000_000, max(1, self.n_steps * self.config.batch_size // 20))

    def resamples_after(self, step: int) -> bool:
        """Whether dead latents are resampled after this many steps: evenly up to the middle of the run."""
        if not isinstance(self.config.sparsity, L1Config):
            return False
        times = self.config.sparsity.resamplings
        return step in {self.n_steps * (i + 1) // (2 * times) for i in range(times)}


class Trainer:
    """Updates a crosscoder batch by batch. The same batches give the same weights, wherever training is stopped and resumed.

    Each of several ranks has the latents `mesh.latent.part(n_latents)` and its part of each batch; see `mesh`.
    """

    def __init__(
        self,
        config: CrosscoderConfig,
        crosscoder: Crosscoder,
        n_steps: int,
        mesh: Mesh = Mesh(),  # noqa: B008 - frozen
        device: torch.device | None = None,
    ) -> None:
        if config.warmup_steps > n_steps:
            raise UserError(
                f"warmup_steps {config.warmup_steps} is longer than the training ({n_steps} steps); lower it or raise epochs"
            )
        self.n_latents, self.mesh = crosscoder.n_latents, mesh
        part = mesh.latent.part(self.n_latents)
        _check_split(config.batch_size, self.n_latents, mesh)
        crosscoder.rule.check(self.n_latents)
        if mesh.latent.size > 1:
            crosscoder = crosscoder.of_latents(part)
        if device is not None:
            crosscoder = crosscoder.to(device)
        self.config, self.crosscoder = config, crosscoder
        constraint = constraint_of(config.structure, self.n_latents, crosscoder.n_sources).of_latents(part)
        self.constraint = constraint.to(crosscoder.encoder.device)
        self.constraint.settle(crosscoder.parameters())
        self.schedule = Schedule(n_steps, config)
        self._loss = Loss(crosscoder, config.reconstruction, self.constraint, mesh, config.difference_weight)
        self.step = 0
        self.guess = 0.0
        self.since_fired = TokensSinceFired(
            crosscoder.encoder.new_zeros(crosscoder.n_latents, dtype=torch.int64), self.schedule.dead_after
        )
        self.adam = Adam.of(
            crosscoder.parameters(),
            getattr(torch, config.optimizer_state),
            product_dtype(config.matmul, crosscoder.encoder),
            config.seed,
        )
        # The first step that is not finite, its loss and its gradient's norm; 0 until there is one.
        self._wrong = crosscoder.encoder.new_zeros(3, dtype=torch.float64)
        self._raw: Tensor | None = None

    @property
    def is_done(self) -> bool:
        return self.step >= self.schedule.n_steps

    def train_step(self, x: Float[Tensor, "batch source d_model"]) -> StepResult:
        """Make one update from normalised inputs, this rank's part of the batch."""
        crosscoder = self.crosscoder
        if self._raw is None and x.device.type == "cpu":
            self._raw = x.new_empty(len(x), crosscoder.n_latents)
        weight = crosscoder.rule.weight((self.step + 1) / self.schedule.n_steps)
        result = self._loss.gradients(x, self.since_fired, weight, self.guess, self._raw, self.adam.copies)
        norm = self._norm(result.gradients)
        self._note(result.loss, norm)
        if x.device.type == "cpu":
            self._check_noted()
        self.since_fired = result.since_fired
        if result.smallest_kept is not None:
            self._update_threshold(result.smallest_kept)
        scale = (norm / self.config.gradient_clip).clamp(min=1.0).float()
        self.adam.update(result.gradients, scale, self.schedule.rate(self.step), self.step + 1)
        self.step += 1
        if self.schedule.resamples_after(self.step):
            self._resample(x, result.token_error)
        return result

    def _norm(self, gradients: dict[str, Tensor]) -> Float64[Tensor, ""]:
        """Norm of the gradient of all parameters."""
        squares = {name: torch.linalg.vector_norm(gradients[name]).double().square() for name in self.crosscoder.parameters()}
        on_bias = squares.pop(EVERYWHERE)
        total: Tensor = self.mesh.latent.sum(torch.stack(list(squares.values())).sum()) + on_bias
        return total.sqrt()

    def _note(self, loss: Float64[Tensor, ""], norm: Float64[Tensor, ""]) -> None:
        """Note on the device if a step is the first whose loss or gradient is not finite."""
        found = torch.stack([torch.full_like(norm, self.step + 1), loss, norm])
        is_first = ~torch.isfinite(found).all() & (self._wrong[0] == 0)
        self._wrong = torch.where(is_first, found, self._wrong)

    def _check_noted(self) -> None:
        step, loss, norm = self._wrong.tolist()
        if step and not math.isfinite(loss):
            raise Diverged(f"the loss is {loss}", int(step))
        if step:
            raise Diverged(f"the gradient's norm is {norm}", int(step))

    def _update_threshold(self, smallest: float) -> None:
        """Update theta, the running mean of the smallest kept v, which starts over when the run has settled.

        Until there are 1 / (1 - beta) values it is their plain mean; in a short run, the first value would outweigh the rest.
        """
        settings = self.config.sparsity
        assert isinstance(settings, BatchTopKConfig)
        self.guess = GUESS_MARGIN * smallest
        n_values = max(1, self.step - round(settings.threshold_start_share * self.schedule.n_steps) + 1)
        share = max(1 - settings.threshold_beta, 1 / n_values)
        self.crosscoder.threshold += share * (smallest - self.crosscoder.threshold)

    def check(self) -> None:
        """Raises `Diverged` if the loss or the gradient of a step was not finite, or if a weight is not.

        A GPU is not waited for after each step, so there it is found out here; an update from such a gradient is not made.
        """
        self._check_noted()
        parameters = self.crosscoder.parameters()
        spoilt = self.mesh.all.any([not torch.isfinite(p.sum()) for p in parameters.values()])  # one NaN makes the sum NaN
        for name, is_spoilt in zip(parameters, spoilt, strict=True):
            if is_spoilt:
                raise Diverged(f"the update made {name} infinite or NaN")

    def _resample(self, x: Float[Tensor, "batch source d_model"], token_error: Float[Tensor, " batch"]) -> None:
        """Restart dead latents at inputs that are reconstructed badly (Bricken et al. 2023).

        Tokens are drawn with a probability proportional to their squared loss. The input minus the decoder bias gives the
        direction, with the mean decoder norm of the live latents and a fifth of their mean encoder norm.
        """
        dead = self.since_fired.dead()
        coder, latent = self.crosscoder, self.mesh.latent
        numbers = latent.gather(len(dead))
        n_alive = self.n_latents - sum(numbers)
        if not sum(numbers) or not n_alive:
            return
        inputs, error = (self.mesh.data.stack(own).flatten(0, 1) for own in (x.flatten(1), token_error.double().unsqueeze(1)))
        generator = np.random.default_rng([self.config.seed, self.step])
        chances = error.square().flatten().cpu().numpy()
        drawn = generator.choice(len(inputs), size=sum(numbers), p=chances / chances.sum())
        drawn = drawn[sum(numbers[: latent.rank]) :][: len(dead)]
        directions = inputs[torch.from_numpy(drawn).to(x.device)] - coder.decoder_bias
        directions /= directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
        alive = torch.ones(coder.n_latents, dtype=torch.bool, device=x.device)
        alive[dead] = False
        for weights, share in ((coder.decoder, 1.0), (coder.encoder, RESAMPLED_ENCODER)):
            weights[dead] = directions * (share * latent.sum(weights[alive].norm(dim=1).sum()) / n_alive)
        coder.encoder_bias[dead] = 0.0
        self.constraint.settle(coder.parameters())
        for moments in (self.adam.first, self.adam.second):
            for name in ("encoder", "decoder", "encoder_bias"):
                moments[name][dead] = 0.0
        self.adam.refresh()
        self.since_fired.tokens[dead] = 0

    def state(self) -> TrainingState:
        """Everything that the next step depends on. The tensors are the trainer's own, so reading into them restores it."""
        groups = {
            "parameters": self.crosscoder.parameters(), "first_moments": self.adam.first, "second_moments": self.adam.second,
        }  # fmt: skip
        tensors = {"silent_tokens": self.mesh.placed(self.since_fired.tokens, self.n_latents)}
        for group, named in groups.items():
            for name, tensor in named.items():
                tensors[f"{group}.{name}"] = self.mesh.placed(tensor, self._n_rows(name))
        settings = self.config.model_dump(mode="json", exclude={"checkpoint_seconds"}) | {"n_steps": self.schedule.n_steps}
        return TrainingState(self.step, self.crosscoder.threshold, self.guess, tensors, fingerprint(settings))

    def restore(self, state: TrainingState) -> None:
        """Resume from a state whose tensors are those of `state()`."""
        self.step = state.step
        self.guess = state.guess
        self.crosscoder.threshold = state.threshold
        self.adam.refresh()

    def assembled(self) -> Crosscoder | None:
        """The crosscoder with all its latents, in host memory, on the first rank; None on the others."""
        coder = self.crosscoder.to(torch.device("cpu"))
        latent = self.mesh.latent
        if latent.size == 1:
            return coder if self.mesh.all.is_first else None
        parts = {name: latent.collect(tensor) for name, tensor in coder.parameters().items()}
        if not self.mesh.all.is_first:
            return None
        whole: dict[str, Any] = {name: found[0] if name == EVERYWHERE else torch.cat(found) for name, found in parts.items()}
        own = {name: whole.pop(name) for name in coder.own}
        return replace(coder, **whole, own=own)

    def _n_rows(self, name: str) -> int | None:
        """Number of rows of the full parameter; None for the one that does not belong to a latent."""
        return None if name == EVERYWHERE else self.n_latents


def _check_split(batch_size: int, n_latents: int, mesh: Mesh) -> None:
    if batch_size % mesh.data.size:
        raise UserError(f"batch_size {batch_size} cannot be split evenly over {mesh.data.size} processes; choose a multiple")
    step = -(-n_latents // mesh.latent.size)
    if step * (mesh.latent.size - 1) >= n_latents:
        raise UserError(f"{n_latents} latents are too few for {mesh.latent.size} processes; use fewer, or set latent_ranks")
