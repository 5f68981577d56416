"""Train crosscoders on a store. Those with the same batches share one pass over it; each can be killed and resumed."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch

from crossdiff.activations.loader import Batches, check_batch_size, source_indices
from crossdiff.activations.store import Store
from crossdiff.config import CrosscoderConfig
from crossdiff.crosscoder.checkpoint import Checkpoints, save
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.crosscoder.log import Log
from crossdiff.crosscoder.mesh import Mesh, mesh_of
from crossdiff.crosscoder.structure import check_sizes
from crossdiff.crosscoder.trackers import Guarded
from crossdiff.crosscoder.trainer import Diverged, Trainer
from crossdiff.crosscoder.view import View, view_of
from crossdiff.errors import UserError
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Float, Tensor

Report: TypeAlias = Callable[[int, int, dict[str, Any]], None]
"""Called after each step of a shared pass with the step, the number of steps, and the last log record of each crosscoder."""


def _ignore(step: int, n_steps: int, records: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Job:
    """One crosscoder to train into a folder; the trackers write their files into `shown_in`."""

    folder: Path
    config: CrosscoderConfig
    shown_in: Path


class _Training:
    """A job in progress."""

    def __init__(
        self, job: Job, store: Store, n_steps: int, device: torch.device, trackers: tuple[str, ...], mesh: Mesh
    ) -> None:
        self.job, self.mesh = job, mesh
        self.trainer = Trainer(job.config, _start(job.config, store, n_steps), n_steps, mesh, device)
        self.checkpoints = Checkpoints(job.folder, mesh.all)
        state = self.trainer.state()
        if self.checkpoints.load(state, warnings.warn):
            self.trainer.restore(state)
        if mesh.all.is_first:
            self.checkpoints.check_space(state)
        shown = [Guarded(kind, job.shown_in, job.folder.name, self.trainer.step) for kind in trackers if mesh.all.is_first]
        self.log = Log(job.folder / "train.jsonl" if mesh.all.is_first else None, self.trainer, shown, state.log_sums)
        self.record: dict[str, Any] = {}
        self._index = source_indices(store, self.trainer.crosscoder.view.reads).to(device)
        self._saved_at = time.monotonic()
        self._saved_step = self.trainer.step

    @property
    def is_due(self) -> bool:
        """Whether it is time for another checkpoint."""
        return time.monotonic() - self._saved_at > self.job.config.checkpoint_seconds

    def step(self, h: Float[Tensor, "batch stored_source d_model"], place: str, due: bool) -> None:
        """Make one update from stored activations, and write a checkpoint if one is due.

        Args:
            place: where in the data the activations are, for messages.
        """
        trainer = self.trainer
        number = trainer.step + 1
        try:
            mine = h[self.mesh.data.part(len(h))][:, self._index]
            result = trainer.train_step(trainer.crosscoder.normalise(mine))
            self.record = self.log.add(result) or self.record
            if due or trainer.is_done:
                trainer.check()
        except Diverged as found:
            number = found.step or number
            raise UserError(
                f"{self.job.folder.name} has diverged: {found} at step {number} of {trainer.schedule.n_steps}, {place}; "
                f"lower lr (now {trainer.config.lr}) or lengthen warmup_steps (now {trainer.config.warmup_steps}); "
                + self._last_good()
            ) from None
        if due:
            self.save()

    def _last_good(self) -> str:
        if not self.checkpoints.last.exists():
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.checkpoints.last}"

    def save(self) -> None:
        """Write a checkpoint, unless something is not finite, so that the last one stays good."""
        if self.trainer.step == self._saved_step:
            return
        try:
            self.trainer.check()
        except Diverged:
            return
        self._check_folder()
        state = self.trainer.state()
        state.log_sums = self.log.sums
        self.checkpoints.save(state)
        self._saved_at = time.monotonic()
        self._saved_step = self.trainer.step

    def _check_folder(self) -> None:
        """Check that the folder is still where it was, because what is written would make a new one in its place."""
        if (problem := self.mesh.all.agree(self.log.lost())) is not None:
            raise UserError(problem)

    def finish(self) -> Crosscoder | None:
        """Write the crosscoder, and return it on the first rank."""
        self.log.close()
        self._check_folder()
        crosscoder = self.trainer.assembled()
        if crosscoder is not None:
            save(crosscoder, self.job.folder)
        return crosscoder


def _start(config: CrosscoderConfig, store: Store, n_steps: int) -> Crosscoder:
    view = view_of(config.inputs, store.sources)
    mean, scale = normalisation_of(view, store)
    crosscoder = new_crosscoder(
        config.latents_for(store.d_model), mean, scale, config.sparsity, config.decoder_norm, config.seed, view
    )
    crosscoder.origin = origin_of(store, config, n_steps * config.batch_size)
    return crosscoder


def origin_of(store: Store, config: CrosscoderConfig, training_tokens: int | None) -> dict[str, Any]:
    """The origin of a crosscoder of these settings on a store; training_tokens is None if nobody knows it."""
    return {
        "pair": store.pair, "model_dtype": store.manifest.get("model_dtype"), "layer": store.layer, "harvest": store.settings,
        "norm_limits": store.rule.norm_limits,
        "settings": config.model_dump(mode="json"), "training_tokens": training_tokens,
    }  # fmt: skip


def normalisation_of(view: View, store: Store) -> tuple[Float[Tensor, "source d_model"], float]:
    """Normalisation (mean and scale) of a view of a store's sources."""
    index = source_indices(store, view.reads)
    matrix = torch.zeros(len(view.names), len(store.sources), dtype=torch.float64)
    matrix[:, index] = view.matrix.double()
    return (matrix @ store.normalisation.mean).float(), store.normalisation.scale_of(matrix)


def check_trainings(configs: Mapping[str, CrosscoderConfig], store: Store) -> None:
    """Check, before anything is trained, that crosscoders of these names can be trained on a store.

    Raises:
        UserError: names the first one whose sources, sizes or batch size do not fit the store.
    """
    n_tokens = len(store.rows("train"))
    for name, config in configs.items():
        try:
            check_sizes(config, store.d_model, store.sources)
            check_batch_size(config.batch_size, n_tokens, store)
        except UserError as error:
            raise UserError(f"crosscoders.{name}: {error}") from None


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGTERM and the first Ctrl-C only request a stop. Yields a function that tells whether one was."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:  # a scheduler and torchrun may both send a SIGTERM
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone handles signals
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_together(
    jobs: Sequence[Job],
    store: Store,
    device: torch.device,
    trackers: tuple[str, ...] = (),
    report: Report = _ignore,
    ranks: Ranks = ALONE,
    latent_ranks: int | None = None,
) -> list[Crosscoder]:
    """Train several crosscoders; those with the same batch size and batch seed see the same batches, which are read once.

    Writes config.json, model.safetensors and train.jsonl into each folder. A folder with a checkpoint is resumed from there;
    SIGTERM and Ctrl-C write one.

    Args:
        ranks, latent_ranks: the processes that share the training, see `mesh_of`. Only the first returns the crosscoders.

    Raises:
        UserError: settings that do not fit the store or each other, a disk too full, or a loss that is not finite.
        KeyboardInterrupt: after a signal, once the checkpoints are written.
    """
    for job in jobs:
        if job.config.published is not None:
            raise UserError(
                f"{job.folder.name} is a published crosscoder ({job.config.published}), which cannot be trained again"
            )
    passes: dict[tuple[int, int], Batches] = {}
    mesh = mesh_of(ranks, latent_ranks, device)
    trainings = []
    for job in jobs:
        key = (job.config.batch_size, job.config.order_seed)
        if key not in passes:
            passes[key] = Batches(store, *key, device=device)
        n_steps = max(1, round(job.config.epochs * passes[key].per_epoch))
        trainings.append(_Training(job, store, n_steps, device, trackers, mesh))
    for (batch_size, seed), batches in passes.items():
        members = [t for t in trainings if (t.job.config.batch_size, t.job.config.order_seed) == (batch_size, seed)]
        try:
            _shared_pass(members, batches, report, ranks)
        finally:
            batches.close()
    finished = [training.finish() for training in trainings]
    return [crosscoder for crosscoder in finished if crosscoder is not None]


def _shared_pass(trainings: list[_Training], batches: Batches, report: Report, ranks: Ranks) -> None:
    n_steps = max(training.trainer.schedule.n_steps for training in trainings)
    first = min((t.trainer.step for t in trainings if not t.trainer.is_done), default=n_steps)
    with stop_between_steps() as asked:
        for step in range(first, n_steps):
            h = batches[step]
            # The ranks write their checkpoints together, so they agree on when to do so and on whether to stop.
            stop, *due = ranks.any([asked(), *(training.is_due for training in trainings)])
            for training, is_due in zip(trainings, due, strict=True):
                if training.trainer.step == step and not training.trainer.is_done:
                    try:
                        training.step(h, batches.describe(step), is_due)
                    except UserError:
                        _save_all(other for other in trainings if other is not training)
                        raise
            report(step + 1, n_steps, {training.job.folder.name: training.record for training in trainings})
            if stop:
                _save_all(trainings)
                raise KeyboardInterrupt


def _save_all(trainings: Iterable[_Training]) -> None:
    for training in trainings:
        training.save()


def train(
    folder: str | Path, store: Store, config: CrosscoderConfig, device: torch.device | None = None, report: Report = _ignore
) -> Crosscoder:
    """Train one crosscoder on a store into `folder`; see `train_together`.

    Examples:
        >>> store = crossdiff.open("runs/demo").store
        >>> config = crossdiff.CrosscoderConfig(sparsity={"kind": "batchtopk", "k": 4}, expansion=2, epochs=1, warmup_steps=0)
        >>> crossdiff.train("runs/small", store, config).n_latents == 2 * store.d_model
        True
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return train_together([Job(folder, config, folder)], store, device or torch.device("cpu"), (), report)[0]
