"""Training: planted concepts are found, runs resume, thresholds hold, and what cannot work is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig, BatchTopKConfig, CrosscoderConfig, L1Config, UserError
from crossdiff.crosscoder.checkpoint import load, save
from crossdiff.crosscoder.metrics import health, heldout_sums
from crossdiff.crosscoder.sparsity import rule_of
from crossdiff.crosscoder.train import Job, train, train_together
from crossdiff.crosscoder.trainer import Schedule, Trainer
from crossdiff.latents.activity import Activity, group_of
from crossdiff.latents.scaling import ScalingAccumulator
from crossdiff.latents.stream import chunks
from crossdiff.latents.table import latent_table
from planted import CHAT_ONLY, SHARED, WEAKER, planted_activations
from stores import make_store


def config(sparsity: Any, **changes: Any) -> CrosscoderConfig:
    values = {"n_latents": 32, "batch_size": 128, "epochs": 2, "warmup_steps": 5, "lr": 3e-3, **changes}
    return CrosscoderConfig(sparsity=sparsity, **values)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"), planted_activations(12_000)[0])


@pytest.mark.parametrize("sparsity", [L1Config(mu=0.8), BatchTopKConfig(k=1)], ids=["l1", "batchtopk"])
def test_planted_concepts_get_the_nu_they_were_planted_with(tmp_path: Path, store: Store, sparsity: Any) -> None:
    coder = train(tmp_path, store, config(sparsity, epochs=40, decoder_norm=0.3))
    accumulator, activity = ScalingAccumulator(coder, 20), Activity.empty(32)
    groups, norms = group_of(store.column("flags")), coder.norms().sum(1)
    for chunk in chunks(coder, store, 20, 2000):
        accumulator.add(chunk)
        activity.add(chunk, groups[chunk.rows], norms)
    table = latent_table(coder, accumulator.finish(), activity, AnalyzeConfig(min_active=30))
    directions = planted_activations(1)[1]  # [concept, d]
    cosine = torch.nn.functional.cosine_similarity(coder.directions()[1][:, None], directions[None], dim=2)
    best = cosine.max(0)
    assert float(best.values.min()) > 0.9, "every concept has a latent"
    rows = table[best.indices.tolist()]
    sums = (rows["nu_error"] + rows["nu_reconstruction"]).to_list()
    for concept in CHAT_ONLY:
        assert rows["nu_error"][concept] < 0.2
        assert rows["nu_reconstruction"][concept] < 0.3
    for concept in SHARED:
        assert rows["nu_error"][concept] > 0.75
    assert max(sums[c] for c in CHAT_ONLY) < min(sums[c] for c in (*SHARED, *WEAKER))


def test_inference_threshold_keeps_l0_near_k(tmp_path: Path, store: Store) -> None:
    coder = train(tmp_path, store, config(BatchTopKConfig(k=1), epochs=20))
    report = health(coder, heldout_sums(coder, store, "heldout", 1000))
    assert report["l0"] == pytest.approx(1, rel=0.1)
    assert report["fve"]["total"] > 0.8
    low, high = report["fve_interval"]["total"]
    assert low < report["fve"]["total"] < high


def test_fve_is_one_minus_residual_over_variance(tmp_path: Path, store: Store) -> None:
    coder = train(tmp_path, store, config(BatchTopKConfig(k=3)))
    h = store.gather(store.rows("heldout")).double()
    x = (h - coder.mean.double()) * coder.scale
    error = x - coder.decode(coder.code(x.float())).double()
    expected = 1 - error.square().sum((0, 2)) / (x - x.mean(0)).square().sum((0, 2))
    fve = health(coder, heldout_sums(coder, store, "heldout", 700))["fve"]
    assert fve["base"] == pytest.approx(float(expected[0]), rel=1e-4)
    assert fve["chat"] == pytest.approx(float(expected[1]), rel=1e-4)


def test_round_trip_and_published_names(tmp_path: Path, store: Store) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    coder = train(tmp_path / "a", store, config(BatchTopKConfig(k=3)))
    save(coder, tmp_path / "b")
    again = load(tmp_path / "b")
    for name, parameter in coder.parameters().items():
        assert torch.equal(parameter, again.parameters()[name]), name
    assert (again.threshold, again.scale, again.sparsity) == (coder.threshold, coder.scale, coder.sparsity)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "b" / "model.safetensors")
    assert tensors["encoder.weight"].shape == (2, 16, 32)  # source, d, latent
    assert tensors["decoder.weight"].shape == (2, 32, 16)  # source, latent, d
    x = torch.randn(3, 2, 16)
    dense = torch.einsum("bsd,sdf->bf", x, tensors["encoder.weight"]) + tensors["encoder.bias"]
    torch.testing.assert_close(coder.pre_activations(x), dense, rtol=1e-4, atol=1e-4)


KILLED = """
import sys
from pathlib import Path
from crossdiff.activations.store import Store
from crossdiff.config import BatchTopKConfig, CrosscoderConfig
from crossdiff.crosscoder.train import train
import torch
torch.set_num_threads(1)
settings = {"n_latents": 32, "batch_size": 128, "epochs": 5, "warmup_steps": 5, "checkpoint_seconds": 0.01}
config = CrosscoderConfig(sparsity=BatchTopKConfig(k=3), **settings)
train(Path(sys.argv[1]), Store(Path(sys.argv[2])), config, report=lambda step, n, records: print(step, flush=True))
"""


def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, store: Store) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    arguments = [sys.executable, "-c", KILLED]
    subprocess.run([*arguments, str(whole), str(store.folder)], check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen([*arguments, str(killed), str(store.folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 137:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists()
    assert (killed / "checkpoint.safetensors").exists()
    subprocess.run([*arguments, str(killed), str(store.folder)], check=True, stdout=subprocess.DEVNULL)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (killed / "train.jsonl").read_text() == (whole / "train.jsonl").read_text()


def test_the_log_holds_the_loss_that_is_trained_on(tmp_path: Path, store: Store) -> None:
    train(tmp_path, store, config(L1Config(mu=0.5)))
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for record in records:
        assert record["loss"] == pytest.approx(record["reconstruction"] + record["sparsity"] + record["aux"])
    assert records[-1]["sparsity"] > 0


def test_schedules() -> None:
    settings = L1Config(mu=2.0, mu_warmup_share=0.5, resamplings=2)
    schedule = Schedule(100, config(settings, lr=1.0, warmup_steps=10, decay_share=0.2, batch_size=10))
    assert [schedule.rate(step) for step in (0, 4, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.05])
    assert [rule_of(settings).weight(share) for share in (0.01, 0.25, 0.5, 1)] == pytest.approx([0.04, 1.0, 2.0, 2.0])
    assert [step for step in range(101) if schedule.resamples_after(step)] == [25, 50]
    assert schedule.dead_after == 50  # 5% of 1,000 tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": BatchTopKConfig(k=40)}, "k 40 is larger than the number of latents 32"),
        ({"sparsity": L1Config(), "warmup_steps": 10_000}, r"warmup_steps 10000 is longer than the training \(\d+ steps\)"),
        ({"sparsity": L1Config(), "batch_size": 10**6}, "batch_size 1000000 is larger than the"),
        ({"sparsity": L1Config(), "lr": 1e30, "warmup_steps": 0}, "the loss is (nan|inf) at step"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, store: Store, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path, store, config(**changes))


def test_a_corrupt_checkpoint_is_named(tmp_path: Path, store: Store) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(os.urandom(100))
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is damaged"):
        train(tmp_path, store, config(L1Config()))


def test_progress_is_reported(tmp_path: Path, store: Store) -> None:
    seen: list[int] = []
    train(tmp_path, store, config(L1Config()), report=lambda step, n_steps, records: seen.append(step))
    assert seen == list(range(1, len(seen) + 1))
