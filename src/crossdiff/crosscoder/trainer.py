"""One crosscoder in training: schedules, Adam on clipped gradients, threshold, dead latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from crossdiff.config import BatchTopKConfig, CrosscoderConfig, L1Config, UserError
from crossdiff.crosscoder.checkpoint import TrainingState
from crossdiff.crosscoder.losses import Silence, StepResult, step_gradients
from crossdiff.crosscoder.model import Crosscoder
from crossdiff.crosscoder.structure import constraint_of
from crossdiff.shapes import Float, Tensor

GUESS_MARGIN = 0.93
"""The k-th largest v moves by a few percent from batch to batch; the search starts a little under the last one."""
RESAMPLED_ENCODER = 0.2
"""Norm of a resampled latent's encoder direction over the mean of the living ones (Bricken et al. 2023)."""


class Diverged(Exception):
    """A training has come to where it cannot go on from; says what was found."""


@dataclass(frozen=True)
class Schedule:
    """Everything that depends on the step number alone."""

    n_steps: int
    config: CrosscoderConfig

    def rate(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to 0."""
        up = (step + 1) / max(1, self.config.warmup_steps)
        down = (self.n_steps - step) / max(1.0, self.config.decay_share * self.n_steps)
        return self.config.lr * min(1.0, up, down)

    @property
    def dead_after(self) -> int:
        """Tokens without an activation after which a latent is dead (METHOD: min(10M, 5% of the run's tokens))."""
        given = self.config.dead_after_tokens
        return given if given is not None else min(10_000_000, max(1, self.n_steps * self.config.batch_size // 20))

    def resamples_after(self, step: int) -> bool:
        """Whether dead latents are started anew after this many steps: evenly up to the middle of the run."""
        if not isinstance(self.config.sparsity, L1Config):
            return False
        times = self.config.sparsity.resamplings
        return step in {self.n_steps * (i + 1) // (2 * times) for i in range(times)}


class Trainer:
    """Updates a crosscoder batch by batch. The same batches give the same weights, wherever it is stopped and resumed.

    Raises:
        UserError: settings that do not fit the sizes.
    """

    def __init__(self, config: CrosscoderConfig, crosscoder: Crosscoder, n_steps: int) -> None:
        if config.warmup_steps > n_steps:
            raise UserError(
                f"warmup_steps {config.warmup_steps} is longer than the training ({n_steps} steps); lower it or raise epochs"
            )
        crosscoder.rule.check(crosscoder.n_latents)
        self.config, self.crosscoder, self.rule = config, crosscoder, crosscoder.rule
        self.constraint = constraint_of(config.structure, crosscoder.n_latents, crosscoder.n_sources)
        self.constraint.settle(crosscoder.parameters())
        self.schedule = Schedule(n_steps, config)
        self.step, self.guess = 0, 0.0
        self.silence = Silence(crosscoder.encoder.new_zeros(crosscoder.n_latents, dtype=torch.int64), self.schedule.dead_after)
        self.first_moments = {name: torch.zeros_like(p) for name, p in crosscoder.parameters().items()}
        self.second_moments = {name: torch.zeros_like(p) for name, p in crosscoder.parameters().items()}
        self._raw: Tensor | None = None

    @property
    def is_done(self) -> bool:
        return self.step >= self.schedule.n_steps

    def train_step(self, x: Float[Tensor, "batch source d_model"]) -> StepResult:
        """One update from normalised inputs.

        Raises:
            Diverged: the loss or its gradient is not finite; the weights are those of before the step.
        """
        if self._raw is None and x.device.type == "cpu":
            self._raw = x.new_empty(len(x), self.crosscoder.n_latents)
        weight = self.rule.weight((self.step + 1) / self.schedule.n_steps)
        result = step_gradients(
            self.crosscoder, x, self.config.reconstruction, self.constraint, self.silence, weight, self.guess, self._raw
        )
        if not math.isfinite(result.loss):
            raise Diverged(f"the loss is {result.loss}")
        norm = math.sqrt(sum(float(torch.linalg.vector_norm(result.gradients[n])) ** 2 for n in self.crosscoder.parameters()))
        if not math.isfinite(norm):
            raise Diverged(f"the gradient's norm is {norm}")
        self.silence = result.silence
        if result.smallest_kept is not None:
            self._update_threshold(result.smallest_kept)
        self._adam(result.gradients, norm)
        self.step += 1
        if self.schedule.resamples_after(self.step):
            self._resample(x, result.token_error)
        return result

    def _update_threshold(self, smallest: float) -> None:
        """theta: the running mean of the smallest kept v, begun anew when the run has settled.

        Until there are 1 / (1 - beta) values it is their plain mean: in a short run the first value would outweigh the rest.
        """
        settings = self.config.sparsity
        assert isinstance(settings, BatchTopKConfig)
        self.guess = GUESS_MARGIN * smallest
        n_values = max(1, self.step - round(settings.threshold_start_share * self.schedule.n_steps) + 1)
        share = max(1 - settings.threshold_beta, 1 / n_values)
        self.crosscoder.threshold += share * (smallest - self.crosscoder.threshold)

    def check_weights(self) -> None:
        """Raises `Diverged` when a weight is not finite."""
        for name, tensor in self.crosscoder.parameters().items():
            if not torch.isfinite(tensor.sum()):  # one NaN or infinity makes the sum one, too
                raise Diverged(f"the update made {name} infinite or NaN")

    def _adam(self, gradients: dict[str, Tensor], norm: float) -> None:
        """Adam (Kingma & Ba 2015); clipping to the norm of the whole gradient is passed to it as a scale of the gradients."""
        parameters = self.crosscoder.parameters()
        device = self.crosscoder.encoder.device
        torch._fused_adam_(
            list(parameters.values()),
            [gradients[name] for name in parameters],
            [self.first_moments[name] for name in parameters],
            [self.second_moments[name] for name in parameters],
            [],
            [torch.tensor(float(self.step + 1), device=device) for _ in parameters],
            lr=self.schedule.rate(self.step), beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8,
            amsgrad=False, maximize=False, grad_scale=torch.tensor(max(1.0, norm / self.config.gradient_clip), device=device),
        )  # fmt: skip

    def _resample(self, x: Float[Tensor, "batch source d_model"], token_error: Float[Tensor, " batch"]) -> None:
        """Start dead latents anew at inputs that are reconstructed badly (Bricken et al. 2023).

        A token is drawn with probability in proportion to its squared loss; its input less the decoder's bias gives the
        direction, with the living latents' mean decoder norm and a fifth of their mean encoder norm.
        """
        dead, coder = self.silence.dead(), self.crosscoder
        if not len(dead) or len(dead) == coder.n_latents:
            return
        generator = np.random.default_rng([self.config.seed, self.step])
        chances = token_error.double().square().cpu().numpy()
        drawn = generator.choice(len(x), size=len(dead), p=chances / chances.sum())
        directions = x.flatten(1)[torch.from_numpy(drawn).to(x.device)] - coder.decoder_bias
        directions /= directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
        alive = torch.ones(coder.n_latents, dtype=torch.bool, device=x.device)
        alive[dead] = False
        coder.decoder[dead] = directions * coder.decoder[alive].norm(dim=1).mean()
        coder.encoder[dead] = directions * (RESAMPLED_ENCODER * coder.encoder[alive].norm(dim=1).mean())
        coder.encoder_bias[dead] = 0.0
        self.constraint.settle(coder.parameters())
        for moments in (self.first_moments, self.second_moments):
            for name in ("encoder", "decoder", "encoder_bias"):
                moments[name][dead] = 0.0
        self.silence.tokens[dead] = 0

    def state(self) -> TrainingState:
        """Everything that the next step depends on."""
        return TrainingState(
            step=self.step,
            threshold=self.crosscoder.threshold,
            guess=self.guess,
            silent_tokens=self.silence.tokens,
            parameters=self.crosscoder.parameters(),
            first_moments=self.first_moments,
            second_moments=self.second_moments,
        )

    def restore(self, state: TrainingState) -> None:
        """Go on from a state; it must be of a crosscoder of the same settings."""
        self.step, self.guess, self.crosscoder.threshold = state.step, state.guess, state.threshold
        self.silence.tokens.copy_(state.silent_tokens)
        mine = (self.crosscoder.parameters(), self.first_moments, self.second_moments)
        for tensors, saved in zip(mine, (state.parameters, state.first_moments, state.second_moments), strict=True):
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])
