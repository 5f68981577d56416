"""What happens around a training: trackers that fail, disks that fill, and folders that disappear."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from crossdiff.activations.store import Store
from crossdiff.config import BatchTopKConfig, CrosscoderConfig
from crossdiff.crosscoder import trackers as trackers_module
from crossdiff.crosscoder.checkpoint import load
from crossdiff.crosscoder.trackers import Guarded, TensorBoard
from crossdiff.crosscoder.train import Job, train, train_together
from crossdiff.errors import UserError
from planted import planted_activations
from stores import make_store


def config(**changes: Any) -> CrosscoderConfig:
    values = {"n_latents": 32, "batch_size": 128, "epochs": 2, "warmup_steps": 5, "lr": 3e-3, **changes}
    return CrosscoderConfig(sparsity=BatchTopKConfig(k=2), **values)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"), planted_activations(12_000)[0])


def events_of(folder: Path) -> list[Event]:
    """The events of a folder, in TensorFlow's record format; every checksum is verified."""
    events = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            assert struct.unpack_from("<I", content, at + 8)[0] == masked_crc32c(content[at : at + 8])
            data = content[at + 12 : at + 12 + length]
            assert struct.unpack_from("<I", content, at + 12 + length)[0] == masked_crc32c(data)
            events.append(Event.FromString(data))
            at += 16 + length
    return events


def test_tensorboard_gets_the_records_of_the_log_and_purges_those_after_a_resumption(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, "demo", 0)
    board.write(25, {"loss": 0.5, "l0": 2.0})
    board.write(50, {"loss": 0.25})
    board.close()
    again = TensorBoard(tmp_path, "demo", 25)
    again.write(50, {"loss": 0.125})
    again.close()
    events = events_of(tmp_path)
    shown = [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in events]
    assert [part for part in shown if part[1]] == [(25, {"loss": 0.5, "l0": 2.0}), (50, {"loss": 0.25}), (50, {"loss": 0.125})]
    assert [event.step for event in events if event.session_log.status == SessionLog.START] == [1, 26]
    assert events[0].file_version == "brain.Event:2"


class Failing:
    """Fails at one of its methods."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.written: list[int] = []
        if at == "open":
            raise OSError(28, "No space left on device")

    def write(self, step: int, record: dict[str, float]) -> None:
        self.written.append(step)
        if self.at == "write" and step == 50:
            raise ValueError("the service is down")

    def close(self) -> None:
        if self.at == "close":
            raise RuntimeError("the service is down")


@pytest.mark.parametrize("at", ["open", "write", "close"])
def test_a_tracker_that_fails_is_reported_once_and_does_not_stop_the_training(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    opened: list[Failing] = []

    def make(folder: Path, name: str, step: int) -> Failing:
        opened.append(Failing(at))
        return opened[-1]

    monkeypatch.setitem(trackers_module.TRACKERS, "wandb", make)
    with pytest.warns(UserWarning, match="tracker wandb failed and shows nothing more of this training") as told:
        train_together([Job(tmp_path, config(), tmp_path / "t")], store, torch.device("cpu"), ("wandb", "tensorboard"))
    assert len(told) == 1
    assert [tracker.written for tracker in opened] == {"open": [], "write": [[25, 50]]}.get(at, [[25, 50, 75, 100, 125, 142]])
    assert load(tmp_path).n_latents == 32
    assert [event.step for event in events_of(tmp_path / "t") if event.summary.value] == [25, 50, 75, 100, 125, 142]


def test_a_tracker_whose_package_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        Guarded("wandb", tmp_path, "demo", 0)


LIMITED = """
import resource, signal, sys
from pathlib import Path
from crossdiff.crosscoder.trackers import Guarded
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
board = Guarded("tensorboard", Path(sys.argv[1]), "demo", 0)
for step in range(1000):
    board.write(step, {"loss": 0.5})
board.close()
print("done")
"""


@pytest.mark.parametrize("n_bytes", [0, 2000])
def test_a_disk_without_room_for_events_blocks_nothing(tmp_path: Path, n_bytes: int) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(n_bytes)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    assert result.stderr.count("the tracker tensorboard failed") == 1


def test_a_log_that_cannot_be_written_ends_the_training_and_is_repaired_by_the_next(tmp_path: Path, store: Store) -> None:
    (tmp_path / "cut").mkdir()
    whole = train(tmp_path, store, config())
    size = len((tmp_path / "train.jsonl").read_bytes())
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(step: int, n_steps: int, records: dict[str, Any]) -> None:
        if step == 60:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2 + 10, limits[1]))  # the 4th of 6 records is cut off

    try:
        with pytest.raises(UserError, match=r"cannot write .*train\.jsonl: File too large; run the same"):
            train(tmp_path / "cut", store, config(), report=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "cut" / "train.jsonl").read_text().endswith("\n")
    assert torch.equal(train(tmp_path / "cut", store, config()).encoder, whole.encoder)
    assert (tmp_path / "cut" / "train.jsonl").read_text() == (tmp_path / "train.jsonl").read_text()


def test_a_damaged_record_of_the_log_is_named(tmp_path: Path, store: Store) -> None:
    (tmp_path / "train.jsonl").write_text('{"step": 0}\n[]\n')
    with pytest.raises(UserError, match=r"train\.jsonl, line 2 is damaged: TypeError.*remove the line"):
        train(tmp_path, store, config())


@pytest.mark.parametrize("happens", ["deleted", "renamed", "replaced", "copied"])
@pytest.mark.parametrize("seconds", [1e-9, 1e9])
def test_a_folder_that_disappears_stops_the_training_and_is_not_made_again(
    tmp_path: Path, store: Store, happens: str, seconds: float
) -> None:
    """At the next checkpoint, or without one at the next record of the log, 25 steps later."""
    folder, away, steps = tmp_path / "run" / "one", tmp_path / "away", []
    folder.mkdir(parents=True)

    def act(step: int, n_steps: int, records: dict[str, Any]) -> None:
        steps.append(step)
        if step == 30:
            if happens == "deleted":
                shutil.rmtree(folder.parent)
            else:
                folder.parent.rename(away)
            if happens == "replaced":
                folder.mkdir(parents=True)
            if happens == "copied":
                shutil.copytree(away, folder.parent)

    with pytest.raises(UserError, match=r"folder of this training was deleted or renamed while it ran: .*run/one; nothing"):
        train(folder, store, config(checkpoint_seconds=seconds), report=act)
    assert steps[-1] == (30 if seconds < 1 else 49)
    left = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    assert left == (sorted(path.name for path in (away / "one").iterdir()) if happens == "copied" else [])
    assert (tmp_path / "run").exists() == (happens in ("replaced", "copied"))
    if happens != "deleted":
        assert (away / "one" / "train.jsonl").read_text().count("\n") == 1
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        away.rename(tmp_path / "run")  # what the message advises
        train(folder, store, config())
        assert json.loads((folder / "train.jsonl").read_text().splitlines()[-1])["step"] == 142


def test_a_folder_whose_filesystem_reuses_its_number_counts_as_lost(tmp_path: Path, store: Store) -> None:
    def act(step: int, n_steps: int, records: dict[str, Any]) -> None:
        if step == 30:
            os.unlink(tmp_path / "train.jsonl")

    with pytest.raises(UserError, match="was deleted or renamed while it ran"):
        train(tmp_path, store, config(), report=act)
    assert not list(tmp_path.iterdir())
