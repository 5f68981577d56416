"""The training loop: schedules, clipping, Adam, dead-latent counts, log and checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crossdiff.activations.loader import Batches
from crossdiff.activations.store import Store
from crossdiff.config import BatchTopKConfig, CrosscoderConfig, L1Config, UserError
from crossdiff.crosscoder.checkpoint import TrainingState, load_state, save, save_state
from crossdiff.crosscoder.losses import StepResult, step_gradients
from crossdiff.crosscoder.model import Crosscoder, new_crosscoder
from crossdiff.shapes import Tensor

LOG_EVERY = 25
GUESS_MARGIN = 0.93
"""The k-th largest v moves by a few percent from batch to batch; the search starts a little under the last one."""


@dataclass(frozen=True)
class Schedule:
    """Everything that depends on the step number alone."""

    n_steps: int
    batch_size: int
    config: CrosscoderConfig

    def rate(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to 0."""
        up = (step + 1) / max(1, self.config.warmup_steps)
        down = (self.n_steps - step) / max(1.0, self.config.decay_share * self.n_steps)
        return self.config.lr * min(1.0, up, down)

    def mu(self, step: int) -> float:
        """Weight of the L1 penalty: grows linearly from 0 over the first share of the run."""
        if not isinstance(self.config.sparsity, L1Config):
            return 0.0
        steps = self.config.sparsity.mu_warmup_share * self.n_steps
        return self.config.sparsity.mu * min(1.0, (step + 1) / max(1.0, steps))

    @property
    def dead_after(self) -> int:
        """Tokens without an activation after which a latent is dead (METHOD: min(10M, 5% of the run's tokens))."""
        given = self.config.sparsity.dead_after_tokens if isinstance(self.config.sparsity, BatchTopKConfig) else None
        return given if given is not None else min(10_000_000, max(1, self.n_steps * self.batch_size // 20))


class Trainer:
    """One crosscoder in training."""

    def __init__(self, config: CrosscoderConfig, crosscoder: Crosscoder, n_steps: int) -> None:
        self.config, self.crosscoder = config, crosscoder
        self.schedule = Schedule(n_steps, config.batch_size, config)
        self.step, self.guess = 0, 0.0
        self.tokens_since_fired = torch.zeros(crosscoder.n_latents, dtype=torch.int64)
        self.first_moments = {name: torch.zeros_like(p) for name, p in crosscoder.parameters().items()}
        self.second_moments = {name: torch.zeros_like(p) for name, p in crosscoder.parameters().items()}

    def train_step(self, x: Tensor) -> StepResult:
        """One update from normalised inputs `[batch, source, d_model]`."""
        dead = self.tokens_since_fired >= self.schedule.dead_after
        result = step_gradients(self.crosscoder, x, self.config.reconstruction, self.schedule.mu(self.step), dead, self.guess)
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[result.counts > 0] = 0
        if result.smallest_kept is not None:
            self._update_threshold(result.smallest_kept)
        self._adam(result)
        self.step += 1
        return result

    def _update_threshold(self, smallest: float) -> None:
        """theta: the running mean of the smallest kept v, begun anew when the run has settled."""
        assert isinstance(self.config.sparsity, BatchTopKConfig)
        self.guess = GUESS_MARGIN * smallest
        if self.step <= self.config.sparsity.threshold_start_share * self.schedule.n_steps:
            self.crosscoder.threshold = smallest
        else:
            beta = self.config.sparsity.threshold_beta
            self.crosscoder.threshold = beta * self.crosscoder.threshold + (1 - beta) * smallest

    def _adam(self, result: StepResult) -> None:
        """Adam (Kingma & Ba 2015) on clipped gradients."""
        parameters = self.crosscoder.parameters()
        gradients = {name: getattr(result.gradients, name) for name in parameters}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        scale = min(1.0, self.config.gradient_clip / norm) if norm > 0 else 1.0
        if scale < 1.0:
            for gradient in gradients.values():
                gradient *= scale
        names = list(parameters)
        torch._fused_adam_(
            [parameters[n] for n in names],
            [gradients[n] for n in names],
            [self.first_moments[n] for n in names],
            [self.second_moments[n] for n in names],
            [],
            [torch.tensor(float(self.step + 1)) for _ in names],
            lr=self.schedule.rate(self.step), beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def state(self) -> TrainingState:
        return TrainingState(
            step=self.step,
            threshold=self.crosscoder.threshold,
            guess=self.guess,
            tokens_since_fired=self.tokens_since_fired,
            parameters=self.crosscoder.parameters(),
            first_moments=self.first_moments,
            second_moments=self.second_moments,
        )

    def restore(self, state: TrainingState) -> None:
        self.step, self.guess, self.tokens_since_fired = state.step, state.guess, state.tokens_since_fired
        self.crosscoder.threshold = state.threshold
        for name, tensor in state.parameters.items():
            setattr(self.crosscoder, name, tensor)
        self.first_moments, self.second_moments = state.first_moments, state.second_moments


class _Log:
    """Means of the metrics since the last record, one JSON object a line."""

    def __init__(self, path: Path, trainer: Trainer, sources: tuple[str, ...]) -> None:
        self.path, self.trainer, self.sources = path, trainer, sources
        self.results: list[StepResult] = []

    def add(self, result: StepResult) -> dict[str, Any] | None:
        """Collect a step; writes and returns a record every `LOG_EVERY` steps and at the end."""
        self.results.append(result)
        trainer = self.trainer
        if trainer.step % LOG_EVERY and trainer.step != trainer.schedule.n_steps:
            return None
        n = len(self.results)
        squared_error = torch.stack([r.squared_error for r in self.results]).sum(0)
        fve = 1 - squared_error / torch.stack([r.squared_input for r in self.results]).sum(0)
        dead = trainer.tokens_since_fired >= trainer.schedule.dead_after
        record: dict[str, Any] = {"step": trainer.step, "tokens": trainer.step * trainer.config.batch_size}
        for key in ("loss", "reconstruction", "sparsity", "aux", "l0"):
            record[key] = sum(getattr(r, key) for r in self.results) / n
        record |= {f"fve_{name}": float(value) for name, value in zip(self.sources, fve, strict=True)}
        record |= {"dead_share": float(dead.double().mean()), "rate": trainer.schedule.rate(trainer.step - 1)}
        record["threshold"] = trainer.crosscoder.threshold
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.results = []
        return record


def train(
    folder: Path,
    store: Store,
    config: CrosscoderConfig,
    report: Callable[[int, int, dict[str, Any]], None] = lambda step, n_steps, record: None,
) -> Crosscoder:
    """Train a crosscoder on a store; writes config.json, model.safetensors and train.jsonl into `folder`.

    A folder with a checkpoint is gone on with from there.

    Args:
        report: called with step, number of steps and the last log record.

    Raises:
        UserError: settings that do not fit the store or each other, or a loss that is not finite.
    """
    batches = Batches(store, config.batch_size, config.seed)
    n_steps = max(1, round(config.epochs * batches.per_epoch))
    n_latents = config.latents_for(store.d_model)
    _check(config, n_steps, n_latents)
    normalisation = store.normalisation
    crosscoder = new_crosscoder(
        n_latents, normalisation.mean, normalisation.scale, config.sparsity, config.decoder_norm, config.seed
    )
    crosscoder.origin = {
        "pair": store.pair, "layer": store.layer, "sources": list(store.sources), "settings": config.model_dump(mode="json"),
        "training_tokens": n_steps * config.batch_size,
    }  # fmt: skip
    trainer = Trainer(config, crosscoder, n_steps)
    checkpoint = folder / "checkpoint.safetensors"
    if checkpoint.exists():
        trainer.restore(load_state(checkpoint))
        _truncate_log(folder / "train.jsonl", trainer.step)
    log = _Log(folder / "train.jsonl", trainer, store.sources)
    saved_at = time.monotonic()
    record: dict[str, Any] = {}
    while trainer.step < n_steps:
        result = trainer.train_step(batches[trainer.step])
        if not math.isfinite(result.loss):
            raise UserError(
                f"the loss is {result.loss} at step {trainer.step} of {n_steps}; lower lr (now {config.lr}) and run again: "
                f"{'training goes on from the last checkpoint' if checkpoint.exists() else 'there is no checkpoint yet'}"
            )
        record = log.add(result) or record
        report(trainer.step, n_steps, record)
        # Only at a log record, so that the records of a resumed run are means over the same steps.
        if time.monotonic() - saved_at > config.checkpoint_seconds and not log.results:
            save_state(trainer.state(), checkpoint)
            saved_at = time.monotonic()
    save(crosscoder, folder)
    return crosscoder


def _truncate_log(path: Path, step: int) -> None:
    """Drop the records after the checkpoint; the resumed run writes them again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _check(config: CrosscoderConfig, n_steps: int, n_latents: int) -> None:
    if isinstance(config.sparsity, BatchTopKConfig) and config.sparsity.k > n_latents:
        raise UserError(f"k {config.sparsity.k} is larger than the number of latents {n_latents}; lower k or raise expansion")
    if config.warmup_steps > n_steps:
        raise UserError(
            f"warmup_steps {config.warmup_steps} is longer than the training ({n_steps} steps); lower it or raise epochs"
        )
