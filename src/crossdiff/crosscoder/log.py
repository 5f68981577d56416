"""The log of a training: one JSON object per line, and the same numbers for TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from crossdiff.crosscoder.losses import StepResult
from crossdiff.crosscoder.trackers import Tracker
from crossdiff.crosscoder.trainer import Diverged, Trainer
from crossdiff.errors import UserError
from crossdiff.files import explain_disk_error, to_json, write_text

LOG_EVERY = 25
MEANS = ("loss", "reconstruction", "sparsity", "aux", "l0")
DIVERGED = 10.0
"""A training has diverged when, after the warm-up, the squared error of a record is this many times the squared input."""


class Log:
    """Writes the means of the metrics over the steps since the last record to a file and to the trackers.

    Args:
        path: the file; None on ranks that only keep the means.
        sums: sums over the steps since the last record, from the checkpoint that the training resumes from.
    """

    def __init__(self, path: Path | None, trainer: Trainer, trackers: Sequence[Tracker], sums: dict[str, float]) -> None:
        self.path, self.trainer, self.trackers = path, trainer, trackers
        names = trainer.crosscoder.sources
        self._keys = (*MEANS, *(f"error_{name}" for name in names), *(f"square_{name}" for name in names), "n")
        device = trainer.crosscoder.encoder.device
        self._sums = torch.tensor([sums.get(key, 0.0) for key in self._keys], dtype=torch.float64, device=device)
        if path is not None:
            _drop_records_after(path, trainer.step)
            self._folder = _identity(path.parent)

    def add(self, result: StepResult) -> dict[str, Any] | None:
        """Add a step. Every `LOG_EVERY` steps and at the end, write and return a record."""
        means = torch.stack([getattr(result, key) for key in MEANS])
        self._sums = self._sums + torch.cat([means, result.squared_error, result.squared_input, means.new_ones(1)])
        trainer = self.trainer
        if trainer.step % LOG_EVERY and not trainer.is_done:
            return None
        trainer.check()
        sums = self.sums
        record = self._record(sums)
        excess = self._error_over_input(sums)
        self._sums = torch.zeros_like(self._sums)
        if (problem := trainer.mesh.all.agree(self._append(record))) is not None:
            raise UserError(problem)
        for tracker in self.trackers:
            tracker.write(trainer.step, {key: float(value) for key, value in record.items() if key != "step"})
        if excess > DIVERGED and trainer.step > trainer.config.warmup_steps:
            raise Diverged(f"the squared error is {excess:.3g} times the squared input")
        return record

    @property
    def sums(self) -> dict[str, float]:
        """Sums over the steps since the last record; empty right after one. They are on the trainer's device until then."""
        sums = dict(zip(self._keys, self._sums.tolist(), strict=True))
        return sums if sums["n"] else {}

    def _append(self, record: dict[str, Any]) -> str | None:
        """Write a record to the file; returns the problem if there is one."""
        if self.path is None or (problem := self.lost()) is not None:
            return None if self.path is None else problem
        try:
            with self.path.open("r+", encoding="utf-8") as file:  # unlike "a", this makes no file
                file.seek(0, os.SEEK_END)
                file.write(to_json(record) + "\n")
        except OSError as error:
            full = explain_disk_error(error, self.path.parent)
            return str(full or f"cannot write {self.path}: {error.strerror}; run the same command again")
        return None

    def lost(self) -> str | None:
        """What is wrong with the folder of the training, if it is not the one that the log began in."""
        if self.path is None or (_identity(self.path.parent) == self._folder and self.path.is_file()):
            return None
        return (
            f"the folder of this training was deleted or renamed while it ran: {self.path.parent}; nothing more was written. "
            "Give it its name back and run the same command again to resume, or run it without the folder to start over"
        )

    def _error_over_input(self, sums: dict[str, float]) -> float:
        names = self.trainer.crosscoder.sources
        return sum(sums[f"error_{name}"] for name in names) / sum(sums[f"square_{name}"] for name in names)

    def _record(self, sums: dict[str, float]) -> dict[str, Any]:
        trainer = self.trainer
        record: dict[str, Any] = {"step": trainer.step, "tokens": trainer.step * trainer.config.batch_size}
        record |= {key: sums[key] / sums["n"] for key in MEANS}
        record |= {f"fve_{name}": 1 - sums[f"error_{name}"] / sums[f"square_{name}"] for name in trainer.crosscoder.sources}
        n_dead = trainer.mesh.latent.total(len(trainer.since_fired.dead()))
        record |= {"dead_share": n_dead / trainer.n_latents, "rate": trainer.schedule.rate(trainer.step - 1)}
        record["threshold"] = trainer.crosscoder.threshold
        return record

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def _drop_records_after(path: Path, step: int) -> None:
    """Drop the records after a checkpoint, which the resumed training writes again, and one that was cut off by a kill.

    Raises:
        UserError: a record before them is damaged.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n") and _step_of(line, f"{path}, line {number}") <= step:
            kept.append(line)
    write_text(path, "".join(kept))


def _step_of(line: str, place: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{place} is damaged: {type(error).__name__}: {error}; remove the line and run the same command again"
        ) from None


def _identity(folder: Path) -> tuple[int, int] | None:
    """The device and number of a folder, by which one that took its name is told apart; None if there is none."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
