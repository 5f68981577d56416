"""Training: planted concepts are found, runs resume, thresholds hold, and what cannot work is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdiff.activations.loader import Batches
from crossdiff.activations.store import Store
from crossdiff.config import AnalyzeConfig, BatchTopKConfig, CrosscoderConfig, JumpReLUConfig, L1Config
from crossdiff.crosscoder import checkpoint as checkpoint_module
from crossdiff.crosscoder import trainer as trainer_module
from crossdiff.crosscoder.checkpoint import Checkpoints, load, save
from crossdiff.crosscoder.crosscoder import new_crosscoder
from crossdiff.crosscoder.log import Log
from crossdiff.crosscoder.losses import Loss, StepResult
from crossdiff.crosscoder.metrics import health, heldout_sums
from crossdiff.crosscoder.sparsity import rule_of
from crossdiff.crosscoder.train import Job, stop_between_steps, train, train_together
from crossdiff.crosscoder.trainer import Schedule, Trainer
from crossdiff.errors import UserError
from crossdiff.latents.activity import Activity
from crossdiff.latents.groups import cells_of
from crossdiff.latents.latent_table import latent_table
from crossdiff.latents.scaling import ScalingAccumulator
from crossdiff.latents.stream import accumulate
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
    accumulator, activity = ScalingAccumulator(coder, 20), Activity.empty(cells_of(store, None), 32)
    accumulate([(coder, [accumulator, activity])], store, 20, 2000)
    table = latent_table(coder, accumulator.sums, activity, AnalyzeConfig(min_active=30))
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
    assert (killed / "checkpoint" / "state.json").exists()
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
    assert [rule_of(settings).weight(share) for share in (0.01, 0.25, 0.5, 1.0)] == pytest.approx([0.04, 1.0, 2.0, 2.0])
    assert [step for step in range(101) if schedule.resamples_after(step)] == [25, 50]
    assert schedule.dead_after == 50  # 5% of 1,000 tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": BatchTopKConfig(k=40)}, "k 40 is larger than the number of latents 32"),
        ({"sparsity": L1Config(), "warmup_steps": 10_000}, r"warmup_steps 10000 is longer than the training \(\d+ steps\)"),
        ({"sparsity": L1Config(), "batch_size": 10**6}, "batch_size 1000000 is larger than the"),
        ({"sparsity": L1Config(), "lr": 1e30, "warmup_steps": 0}, r"has diverged: .* (is|made) .*(nan|inf).* at step \d+ of"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, store: Store, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path, store, config(**changes))


def interrupted(folder: Path, store: Store, settings: CrosscoderConfig, steps: list[int]) -> None:
    """Train with a checkpoint at each of the steps; the last of them ends the training."""
    folder.mkdir(exist_ok=True)
    batches, trainer = Batches(store, settings.batch_size, settings.seed), new_trainer(store, settings)
    log = Log(folder / "train.jsonl", trainer, [], {})
    for step in range(max(steps)):
        log.add(trainer.train_step(trainer.crosscoder.normalise(batches[step])))
        if step + 1 in steps:
            state = trainer.state()
            state.log_sums = log.sums
            Checkpoints(folder).save(state)


def saved_step(folder: Path) -> int:
    return int(json.loads((folder / "checkpoint" / "state.json").read_text())["step"])


def new_trainer(store: Store, settings: CrosscoderConfig) -> Trainer:
    n_steps = round(settings.epochs * Batches(store, settings.batch_size, settings.seed).per_epoch)
    moments = store.normalisation
    coder = new_crosscoder(32, moments.mean, moments.scale, settings.sparsity, settings.decoder_norm, settings.seed)
    return Trainer(settings, coder, n_steps)


@pytest.mark.parametrize("sparsity", [L1Config(mu=0.5, resamplings=3), BatchTopKConfig(k=1), JumpReLUConfig()])
@pytest.mark.parametrize("damage", [False, True])
def test_a_resumed_training_equals_an_undisturbed_one(tmp_path: Path, store: Store, sparsity: Any, damage: bool) -> None:
    settings = config(sparsity, lr=1e-2)
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", store, settings)
    interrupted(tmp_path / "cut", store, settings, [31, 60])  # neither is at a record of the log
    if damage:
        last = next((tmp_path / "cut" / "checkpoint").glob("*.distcp"))
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
        with pytest.warns(UserWarning, match=r"checksum of .* does not match; resuming from the one before it, at step 31"):
            resumed = train(tmp_path / "cut", store, settings)
    else:
        resumed = train(tmp_path / "cut", store, settings)
    for name, parameter in whole.parameters().items():
        assert torch.equal(parameter, resumed.parameters()[name]), name
    assert (tmp_path / "cut" / "train.jsonl").read_text() == (tmp_path / "whole" / "train.jsonl").read_text()


def test_damaged_checkpoints_are_named(tmp_path: Path, store: Store) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.json").write_bytes(os.urandom(100))
    with pytest.raises(UserError, match=r"/checkpoint is damaged.*delete it to restart this training"):
        train(tmp_path, store, config(L1Config()))


def test_a_shared_pass_gives_each_what_it_gets_alone(tmp_path: Path, store: Store) -> None:
    settings = {"one": config(L1Config(mu=0.5)), "two": config(BatchTopKConfig(k=2), epochs=1)}
    for name in (*settings, *(f"{name}-alone" for name in settings)):
        (tmp_path / name).mkdir()
    read: list[int] = []
    original = Batches.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__getitem__", lambda self, step: read.append(step) or original(self, step))
        together = train_together(
            [Job(tmp_path / name, value, tmp_path / "t" / name) for name, value in settings.items()],
            store, torch.device("cpu"), ("tensorboard",),
        )  # fmt: skip
    assert read == list(range(len(read))), "every batch is read once"
    for coder, (name, value) in zip(together, settings.items(), strict=True):
        alone = train(tmp_path / f"{name}-alone", store, value)
        assert torch.equal(coder.encoder, alone.encoder)
        assert list((tmp_path / "t" / name).glob("events.*"))


def test_resampled_latents_come_to_life(tmp_path: Path, store: Store) -> None:
    settings = config(L1Config(mu=0.5, resamplings=1), dead_after_tokens=1000)
    trainer, batches = new_trainer(store, settings), Batches(store, 128, 0)
    trainer.crosscoder.encoder_bias[:10] = -1e3  # silent, whatever comes
    half = trainer.schedule.n_steps // 2
    for step in range(half - 1):
        trainer.train_step(trainer.crosscoder.normalise(batches[step]))
    assert set(range(10)) <= set(trainer.since_fired.dead().tolist())
    trainer.train_step(trainer.crosscoder.normalise(batches[half - 1]))
    coder = trainer.crosscoder
    assert not trainer.since_fired.dead().tolist()
    alive = torch.arange(10, 32)
    assert not trainer.adam.first["encoder"][:10].any()
    assert float(coder.decoder[:10].norm(dim=1).mean()) == pytest.approx(
        float(coder.decoder[alive].norm(dim=1).mean()), rel=0.3
    )
    result = trainer.train_step(coder.normalise(batches[half]))
    assert int((result.since_fired.tokens[:10] == 0).sum()) >= 8


def test_a_full_disk_is_found_before_training(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"has 0 MB left, but the training writes up to"):
        train(tmp_path, store, config(L1Config()))
    assert not (tmp_path / "train.jsonl").exists()


def test_a_disk_that_fills_during_training_is_named_and_costs_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(L1Config(), checkpoint_seconds=1e-9)
    whole = train(tmp_path, store, settings)
    cut, writes, original = tmp_path / "cut", 0, checkpoint_module.save_shared
    cut.mkdir()

    def fill(*args: Any, **more: Any) -> None:
        nonlocal writes
        writes += 1
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if writes == 30:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the system refuses what comes after so many bytes
        try:
            original(*args, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint_module, "save_shared", fill)
    with pytest.raises(UserError, match=r"cannot write .*checkpoint-30\.partial: .*File too large.*run the same command again"):
        train(cut, store, settings)
    assert not list(cut.glob("*.partial"))
    assert saved_step(cut) == 29
    assert torch.equal(train(cut, store, settings).encoder, whole.encoder)


def test_divergence_stops_the_run(tmp_path: Path, store: Store) -> None:
    message = r"has diverged: the squared error is .* times the squared input at step \d+ of .*lower lr \(now 50.0\)"
    with pytest.raises(UserError, match=message):
        train(tmp_path, store, config(BatchTopKConfig(k=3), lr=50, warmup_steps=10, gradient_clip=1e9, epochs=8))


@pytest.mark.parametrize("where", ["loss", "gradient", "weights"])
def test_what_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Step 100 goes wrong; an epoch has 71 batches of 128 of the 9,120 training tokens, so it is batch 29 of the second."""
    original = trainer_module.Loss.gradients
    calls = 0

    def spoilt(loss: Loss, *rest: Any) -> StepResult:
        nonlocal calls
        calls += 1
        result = original(loss, *rest)
        if calls == 100 and where == "loss":
            result.loss = torch.tensor(float("nan"), dtype=torch.float64)
        if calls == 100 and where == "gradient":
            result.gradients["decoder"][3, 3] = torch.inf
        if calls == 100 and where == "weights":
            loss.crosscoder.encoder[3, 3] = torch.nan
        return result

    monkeypatch.setattr(trainer_module.Loss, "gradients", spoilt)
    (tmp_path / "one").mkdir()
    settings = config(L1Config(), checkpoint_seconds=1e-9)
    message = (
        r"one has diverged: .* at step 100 of 142, batch 29 of 71 in epoch 2 .*the last good checkpoint is .*one/checkpoint"
    )
    with pytest.raises(UserError, match=message):
        train(tmp_path / "one", store, settings)
    assert saved_step(tmp_path / "one") == 99
    trainer = new_trainer(store, settings)
    assert Checkpoints(tmp_path / "one").load(trainer.state(), pytest.fail)
    assert all(torch.isfinite(tensor).all() for tensor in trainer.crosscoder.parameters().values())


def test_one_that_diverges_does_not_cost_the_others_their_steps(tmp_path: Path, store: Store) -> None:
    settings = {"good": config(L1Config()), "bad": config(L1Config(), lr=1e30, warmup_steps=0)}
    for name in settings:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"^bad has diverged") as caught:
        train_together([Job(tmp_path / n, s, tmp_path / "t") for n, s in settings.items()], store, torch.device("cpu"))
    assert f"at step {saved_step(tmp_path / 'good')} of" in str(caught.value)


def test_progress_is_reported(tmp_path: Path, store: Store) -> None:
    seen: list[int] = []
    train(tmp_path, store, config(L1Config()), report=lambda step, n_steps, records: seen.append(step))
    assert seen == list(range(1, len(seen) + 1))


def test_only_a_second_ctrl_c_ends_a_step() -> None:
    """A scheduler and torchrun may both send a SIGTERM."""
    with stop_between_steps() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, store: Store) -> None:
    interrupted(tmp_path, store, config(BatchTopKConfig(k=2)), [31])
    with pytest.raises(UserError, match="checkpoint belongs to a training with other settings; delete it"):
        train(tmp_path, store, config(BatchTopKConfig(k=3)))
