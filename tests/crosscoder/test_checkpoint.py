"""Checkpoints and weights that come from others: nothing in them is run, and what cannot be used is named."""

from __future__ import annotations

import errno
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from crossdiff.config import BatchTopKConfig, JumpReLUConfig
from crossdiff.crosscoder import checkpoint as checkpoint_module
from crossdiff.crosscoder.checkpoint import Checkpoints, TrainingState, load, origin_of, save
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.crosscoder.plain_reader import read_contents
from crossdiff.errors import UserError


class Call:
    """What a pickle holds that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def state(step: int = 3) -> TrainingState:
    tensors = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor([step])}
    return TrainingState(step, 0.5, 0.25, tensors, "settings", {"loss": 1.5})


def replace_contents(folder: Path, content: bytes) -> None:
    """Put something else in the place of the table of contents, with its checksum."""
    (folder / "checkpoint" / ".metadata").write_bytes(content)
    path = folder / "checkpoint" / "state.json"
    numbers = json.loads(path.read_text())
    numbers["checksums"][".metadata"] = zlib.crc32(content)
    path.write_text(json.dumps(numbers))


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(state())
    found = TrainingState(0, 0.0, 0.0, {"weight": torch.zeros(2, 3), "count": torch.tensor([0])}, "settings")
    assert Checkpoints(tmp_path).load(found, pytest.fail)
    assert (found.step, found.threshold, found.guess, found.log_sums) == (3, 0.5, 0.25, {"loss": 1.5})
    assert torch.equal(found.tensors["weight"], state().tensors["weight"])
    assert found.tensors["count"].tolist() == [3]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_checkpoint_that_would_run_something_is_refused(tmp_path: Path, protocol: int) -> None:
    Checkpoints(tmp_path).save(state())
    replace_contents(tmp_path, pickle.dumps(Call(tmp_path / "made"), protocol))
    message = r"cannot read the checkpoint .*: it holds \w+\.open, which a checkpoint of crossdiff does not contain; delete it"
    with pytest.raises(UserError, match=message):
        Checkpoints(tmp_path).load(state(), pytest.fail)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1]), "its table of contents is a list"),
        (b"junk", "truncated|invalid load key"),
        (b"", "its table of contents is damaged: EOFError"),
        (b"ctorch\nload\n.", "it holds torch.load, which"),
        (b"ctorch\nSize.__class__\n.", "it holds torch.Size.__class__, which"),
        (b"cbuiltins\neval\n.", "it holds builtins.eval, which"),
    ],
)
def test_only_the_classes_of_a_checkpoint_are_read(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError, match=message):
        read_contents(tmp_path / ".metadata")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "many"}, r"state\.json: step: "),
        ({"log_sums": [1]}, r"state\.json: log_sums: "),
        ({"checksums": None}, r"state\.json: checksums: "),
    ],
)
def test_numbers_of_another_shape_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    Checkpoints(tmp_path).save(state())
    path = tmp_path / "checkpoint" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"checkpoint is damaged: {message}.*delete it to restart"):
        Checkpoints(tmp_path).load(state(), pytest.fail)


@pytest.mark.parametrize("fails", ["tensors", "numbers"])
def test_a_disk_that_fills_half_way_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    Checkpoints(tmp_path).save(state(3))
    original = checkpoint_module.write_json

    def fill(path: Path, value: Any) -> None:
        path.write_bytes(b'{"half')
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_tensors(tensors: Any, checkpoint_id: Path, no_dist: bool) -> None:
        checkpoint_id.mkdir()
        fill(checkpoint_id / "__0_0.distcp", None)

    if fails == "tensors":
        monkeypatch.setattr(checkpoint_module, "save_shared", fill_tensors)
    else:
        monkeypatch.setattr(checkpoint_module, "write_json", fill)
    with pytest.raises(UserError, match=r"the disk of .* is full"):
        Checkpoints(tmp_path).save(state(9))
    monkeypatch.setattr(checkpoint_module, "write_json", original)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    found = state(0)
    assert Checkpoints(tmp_path).load(found, pytest.fail)
    assert found.step == 3


def coder(sparsity: Any) -> Crosscoder:
    return new_crosscoder(4, torch.zeros(2, 3), 1.0, sparsity, 0.1, 0)


def change(folder: Path, name: str, number: float | None = None, own: dict[str, Any] | None = None) -> None:
    """Put a number into a tensor of the saved crosscoder, or entries into its settings."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings = json.loads(file.metadata()["crossdiff"])
    if number is not None:
        tensors[name].view(-1)[1] = number
    save_file(tensors, folder / "model.safetensors", {"crossdiff": json.dumps(settings | (own or {}))})


@pytest.mark.parametrize("name", ["encoder.weight", "decoder.bias", "activation_mean"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, number: float) -> None:
    save(coder(BatchTopKConfig(k=2)), tmp_path)
    change(tmp_path, name, number)
    with pytest.raises(
        UserError, match=rf"{name} of .*model\.safetensors contains NaN or infinite numbers.*copy the file again"
    ):
        load(tmp_path)


@pytest.mark.parametrize("key", ["scale", "threshold"])
def test_settings_that_are_not_finite_are_refused(tmp_path: Path, key: str) -> None:
    save(coder(BatchTopKConfig(k=2)), tmp_path)
    change(tmp_path, "", own={key: float("nan")})
    with pytest.raises(UserError, match=f"{key} of .* contains NaN"):
        load(tmp_path)


def test_an_infinite_threshold_is_a_latent_that_is_never_active_and_nan_is_none(tmp_path: Path) -> None:
    save(coder(JumpReLUConfig()), tmp_path)
    change(tmp_path, "log_threshold", float("inf"))
    assert load(tmp_path).own["log_threshold"][1] == torch.inf
    change(tmp_path, "log_threshold", float("nan"))
    with pytest.raises(UserError, match=r"log_threshold of .* contains NaN"):
        load(tmp_path)


@pytest.mark.parametrize("own", [{"view": []}, {"view": {"matrix": 1}}, {"sparsity": []}, {"scale": None}, {"view": None}])
def test_settings_of_another_shape_are_damage(tmp_path: Path, own: dict[str, Any]) -> None:
    save(coder(BatchTopKConfig(k=2)), tmp_path)
    change(tmp_path, "", own=own)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load(tmp_path)


def test_an_origin_of_another_shape_is_damage(tmp_path: Path) -> None:
    save(coder(BatchTopKConfig(k=2)), tmp_path)
    change(tmp_path, "", own={"origin": [1]})
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: expected an object"):
        origin_of(tmp_path)
