"""The log of a training: one JSON object per line, and the same numbers for TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from crossdiff.crosscoder.losses import StepResult
from crossdiff.crosscoder.trainer import Diverged, Trainer
from crossdiff.errors import UserError
from crossdiff.files import to_json

LOG_EVERY = 25
DIVERGED = 10.0
"""A training has diverged when, after the warm-up, the squared error of a record is this many times the squared input."""


@runtime_checkable
class Tracker(Protocol):
    """A place that shows metrics while a training runs."""

    def write(self, step: int, record: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard event files in a folder; records after the step that a training resumes from are purged."""

    def __init__(self, folder: Path, name: str, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, record: dict[str, float]) -> None:
        for key, value in record.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run, named after the crosscoder; needs the package `wandb`."""

    def __init__(self, folder: Path, name: str, step: int) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "trackers: wandb is not installed; pip install 'crossdiff[wandb]', or remove it from the trackers"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project="crossdiff", name=name, dir=str(folder), resume="allow", id=folder.name)

    def write(self, step: int, record: dict[str, float]) -> None:
        self._run.log(record, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, str, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Log:
    """Writes the means of the metrics over the steps since the last record to a file and to the trackers.

    Args:
        path: the file; None on ranks that only keep the means.
        sums: sums over the steps since the last record, from the checkpoint that the training resumes from.
    """

    def __init__(self, path: Path | None, trainer: Trainer, trackers: Sequence[Tracker], sums: dict[str, float]) -> None:
        self.path, self.trainer, self.trackers, self.sums = path, trainer, trackers, dict(sums)
        self._drop_records_after(trainer.step)

    def _drop_records_after(self, step: int) -> None:
        """Drop the records after the checkpoint, which the resumed training writes again."""
        if self.path is None:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def add(self, result: StepResult) -> dict[str, Any] | None:
        """Add a step. Every `LOG_EVERY` steps and at the end, write and return a record."""
        parts = {key: getattr(result, key) for key in ("loss", "reconstruction", "sparsity", "aux", "l0")}
        for name, error, square in zip(
            self.trainer.crosscoder.sources, result.squared_error.tolist(), result.squared_input.tolist(), strict=True
        ):
            parts |= {f"error_{name}": error, f"square_{name}": square}
        for key, value in (parts | {"n": 1.0}).items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        trainer = self.trainer
        if trainer.step % LOG_EVERY and not trainer.is_done:
            return None
        record = self._record()
        excess = self._error_over_input()
        self.sums = {}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(record) + "\n")
        for tracker in self.trackers:
            tracker.write(trainer.step, {key: float(value) for key, value in record.items() if key != "step"})
        if excess > DIVERGED and trainer.step > trainer.config.warmup_steps:
            raise Diverged(f"the squared error is {excess:.3g} times the squared input")
        return record

    def _error_over_input(self) -> float:
        names = self.trainer.crosscoder.sources
        return sum(self.sums[f"error_{name}"] for name in names) / sum(self.sums[f"square_{name}"] for name in names)

    def _record(self) -> dict[str, Any]:
        sums, trainer = self.sums, self.trainer
        record: dict[str, Any] = {"step": trainer.step, "tokens": trainer.step * trainer.config.batch_size}
        record |= {key: sums[key] / sums["n"] for key in ("loss", "reconstruction", "sparsity", "aux", "l0")}
        record |= {f"fve_{name}": 1 - sums[f"error_{name}"] / sums[f"square_{name}"] for name in trainer.crosscoder.sources}
        n_dead = trainer.mesh.latent.total(len(trainer.since_fired.dead()))
        record |= {"dead_share": n_dead / trainer.n_latents, "rate": trainer.schedule.rate(trainer.step - 1)}
        record["threshold"] = trainer.crosscoder.threshold
        return record

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
