"""Several processes do what one does: the same gradients, weights, stores and tables, also after a rank has died."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml

from crossdiff.activations.store import Store
from crossdiff.cli import run_command
from crossdiff.crosscoder.checkpoint import load
from planted import planted_activations
from stores import make_store

HERE = Path(__file__).parent
WORKER = str(HERE / "worker.py")


def torchrun(n: int, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start `n` ranks on this machine; options are torchrun's."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *flags, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def done(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"), planted_activations(6000)[0])


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_share_a_step(tmp_path: Path, n: int) -> None:
    out = tmp_path / "errors.json"
    done(torchrun(n, WORKER, "gradients", str(out)))
    found = json.loads(out.read_text())
    assert len(found) == 24 * (2 if n == 2 else 3)
    for title, errors in found.items():
        # With equal values everywhere another choice among them is as good, and the gradients are those of that choice.
        free = {"decoder", "encoder", "encoder_bias", "decoder_bias", "silence", "loss", "reconstruction", "aux", "aux_loss"}
        ignored = free if " equal " in title and "topk" in title else {"aux_loss"}
        assert {key: error for key, error in errors.items() if key not in ignored and error > 1e-5} == {}, title
        if "topk" in title and " equal " not in title:
            assert errors["aux_loss"] > 0, title


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    done(torchrun(1, WORKER, "training", str(folder), str(store.folder), "1"))
    return folder


def close(one: Path, other: Path, tolerance: float) -> None:
    for name in ("l1", "batchtopk", "partitioned"):
        ours, theirs = load(one / name), load(other / name)
        assert ours.threshold == pytest.approx(theirs.threshold, rel=1e-3)
        for key, parameter in ours.parameters().items():
            error = float((parameter - theirs.parameters()[key]).norm() / parameter.norm())
            assert error <= tolerance, (name, key, error)
        records = [json.loads(line) for line in (one / name / "train.jsonl").read_text().splitlines()]
        others = [json.loads(line) for line in (other / name / "train.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [record["step"] for record in others]
        assert records[-1]["loss"] == pytest.approx(others[-1]["loss"], rel=1e-3)


@pytest.mark.parametrize(("n", "latent_ranks"), [(2, 2), (2, 1), (4, 2)])
def test_ranks_share_a_training(tmp_path: Path, store: Store, alone: Path, n: int, latent_ranks: int) -> None:
    done(torchrun(n, WORKER, "training", str(tmp_path), str(store.folder), str(latent_ranks)))
    close(alone, tmp_path, 2e-3)


def test_a_training_goes_on_when_a_rank_dies(tmp_path: Path, store: Store) -> None:
    done(torchrun(2, WORKER, "training", str(tmp_path / "whole"), str(store.folder), "2"))
    output = done(torchrun(2, WORKER, "training", str(tmp_path / "cut"), str(store.folder), "2", "60", max_restarts=1))
    assert (tmp_path / "cut" / "died").exists(), output
    steps = [int(line) for line in (tmp_path / "cut" / "steps").read_text().split()]
    assert steps.count(1) == 1, "it went on from a checkpoint"
    close(tmp_path / "whole", tmp_path / "cut", 0.0)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4)])
def test_another_number_of_ranks_goes_on(tmp_path: Path, store: Store, alone: Path, before: int, after: int) -> None:
    process = torchrun(before, WORKER, "training", str(tmp_path), str(store.folder), str(before))
    while not (tmp_path / "steps").exists() or len((tmp_path / "steps").read_text().split()) < 40:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert not (tmp_path / "l1" / "model.safetensors").exists()
    n_before = len((tmp_path / "steps").read_text().split())
    done(torchrun(after, WORKER, "training", str(tmp_path), str(store.folder), str(after)))
    steps = [int(line) for line in (tmp_path / "steps").read_text().split()]
    assert steps[n_before] == n_before + 1, "the signal wrote a checkpoint, which the others read"
    close(alone, tmp_path, 2e-3)


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_share_a_run(tmp_path: Path, tiny_settings: dict[str, Any], n: int) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(tiny_settings))
    one, shared = tmp_path / "one", tmp_path / "shared"
    run_command(["run", str(one), "--config", str(path)])
    done(torchrun(n, "-m", "crossdiff", "run", str(shared), "--config", str(path)))
    assert Store(one / "activations").manifest["shards"] == Store(shared / "activations").manifest["shards"]
    assert len(Store(one / "activations").manifest["shards"]) >= n
    assert (one / "report.html").exists() and not list((shared / "work").iterdir())
    for coder in ("l1", "batchtopk"):
        # The trainings differ by rounding; the analysis of the same crosscoder does not.
        ours, theirs = load(one / coder), load(shared / coder)
        torch.testing.assert_close(ours.encoder, theirs.encoder, rtol=1e-2, atol=1e-3)
    again = tmp_path / "again"
    done(torchrun(n, "-m", "crossdiff", "run", str(again), "--config", str(path), "--latent_ranks", "1"))
    assert (again / "report.html").exists()
