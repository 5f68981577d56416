"""Places that show the metrics of a training while it runs: TensorBoard, and Weights & Biases.

They are a convenience: one that fails is reported once and dropped, and the training continues. So nothing here may wait for
a thread or a queue, which a full disk or a clock that jumps would block for ever.
"""

from __future__ import annotations

import os
import socket
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from crossdiff.errors import UserError


@runtime_checkable
class Tracker(Protocol):
    """A place that shows metrics while a training runs."""

    def write(self, step: int, record: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """A TensorBoard event file in a folder; records after the step that a training resumes from are purged."""

    def __init__(self, folder: Path, name: str, step: int) -> None:
        from tensorboardX.proto import event_pb2

        self._event: Callable[..., Any] = event_pb2.Event
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = path.open("ab", buffering=0)
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, record: dict[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in record.items()]
        self._add(step=step, summary=Summary(value=values))

    def _add(self, **parts: Any) -> None:
        """Append an event in TensorFlow's record format: length, its checksum, content, its checksum."""
        from tensorboardX.record_writer import masked_crc32c

        content = self._event(wall_time=time.time(), **parts).SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        record = length + next(checksums) + content + next(checksums)
        if self._file.write(record) != len(record):
            raise OSError(f"only a part of a record fits on the disk of {self._file.name}")

    def close(self) -> None:
        self._file.close()


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


Opener: TypeAlias = Callable[[Path, str, int], Tracker]
"""Opens a tracker that writes into a folder, for a crosscoder of a name, at a step."""

TRACKERS: dict[str, Opener] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Guarded:
    """A tracker that is reported with a warning and dropped when it fails.

    Raises:
        UserError: its package is not installed.
    """

    def __init__(self, kind: str, folder: Path, name: str, step: int) -> None:
        self._kind = kind
        self._tracker: Tracker | None = None
        with self._dropped_on_failure():
            self._tracker = TRACKERS[kind](folder, name, step)

    def write(self, step: int, record: dict[str, float]) -> None:
        with self._dropped_on_failure():
            if self._tracker is not None:
                self._tracker.write(step, record)

    def close(self) -> None:
        with self._dropped_on_failure():
            if self._tracker is not None:
                self._tracker.close()

    @contextmanager
    def _dropped_on_failure(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # a tracker may fail in any way, and none may stop a training
            self._tracker = None
            warnings.warn(
                f"the tracker {self._kind} failed and shows nothing more of this training, which continues: "
                f"{type(error).__name__}: {error}",
                stacklevel=1,
            )
